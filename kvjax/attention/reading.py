"""What one layer reads of the paged cache: pages, the exact newest tokens beside them, what a select picks."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kvjax.attention.calibrated import calibrated_attention, calibrated_weights
from kvjax.attention.copies import attend_copies, worth_sharing
from kvjax.attention.partial import attend_among, covered, fanned, gathered, merged, turned
from kvjax.attention.selected import selected
from kvjax.attention.sharded import paged_attention, paged_weights
from kvjax.cache.calibrated import first_of, read_back, tables_of
from kvjax.cache.codecs import Encoded
from kvjax.cache.codecs.calibrated import calibrated
from kvjax.cache.codecs.waiting import waits
from kvjax.cache.policies.optional import Attended, observes_steps
from kvjax.cache.policies.optional import observe as observe_weights
from kvjax.cache.policies.protocol import EMPTY, Read
from kvjax.cache.state import Group
from kvjax.cache.tail import coded, newest
from kvjax.cache.write import layer_rows, place_in_page, update_layer_rows
from kvjax.partition import partitioned
from kvjax.typing import Rotate, Scoring


class Call(NamedTuple):
    """What one layer asks of its group.

    Attributes:
      index: of the layer in the group. q: [B,T,H,D] unrotated. positions: int32[B,T].
      prompt: the tokens are a prompt's, which reads everything whatever the select.
      backend: which kernel, None for the best that can serve.
      copies: so many sequences side by side may have first pages in common.
    """

    index: Any
    q: jax.Array
    positions: jax.Array
    rotate: Rotate
    scoring: Scoring
    prompt: bool
    backend: str | None
    copies: int = 1


def read_held(group: Group, call: Call, active: jax.Array, observe: bool) -> tuple[jax.Array, Group]:
    """Attention over what is held, the new tokens included; scores follow where the policy wants them."""
    layout, index = group.layout, call.index
    reads = layout.policy.reads(layout.window)
    few, tail = None, newest(group, index, call.q.dtype) if waits(layout.codec) else None
    if _selects(group, call):
        turned_q, (read,) = call.rotate(call.q, call.positions), reads
        few = selected(group, index, turned_q, call.positions, read.window, tail, call.rotate)
        parts = [few.attend(turned_q, call.positions, call.scoring.soft_cap, call.backend)]
    elif tail is not None:
        parts = [_partial(group, group.position, coded(group, group.length - 1)[1], reads[0], call)]
    else:
        parts = [_partial(group, group.position, group.length, read, call) for read in reads]
    if tail is not None:
        parts.append(_exact(group, tail, reads[0], call))
    out, lse = merged(parts, call.scoring.sinks)
    out = out if few is None else few.completed(out)
    if not (observes_steps(layout.policy) and observe):
        return out, group
    places = layer_rows(group, group.position, index)
    if few is not None:
        weights = few.weights(turned_q, call.positions, lse, call.scoring.soft_cap, call.backend)
        places = few.read_positions(places)
    else:
        weights = _weights(group, call, lse, _by_row(places))
    held = jax.tree.map(lambda state: layer_rows(group, state, index), group.row_state)
    attended = Attended(
        places if layout.window is None else jnp.where(places > call.positions - layout.window, places, EMPTY),
        call.q.shape[2] // layout.spec.kv_heads,
    )
    seen = observe_weights(layout.policy, held, jnp.moveaxis(weights, 1, 0), active, attended)
    state = jax.tree.map(lambda old, new: update_layer_rows(group, old, new, index), group.row_state, seen)
    return after(out, weights), dataclasses.replace(group, row_state=state)


def _weights(group: Group, call: Call, lse: jax.Array, positions: jax.Array) -> jax.Array:
    """What the step's queries gave each slot, over the lse [B,T,H] of everything they read -> float32[B,K,S]."""
    layout, index = group.layout, call.index
    queries = call.rotate(call.q, call.positions)
    table, lengths = _rows(group, group.length, index)
    common: dict[str, Any] = {
        "lse": lse,
        "row_weights": jnp.ones(call.positions.shape, jnp.float32),
        "positions": positions,
        "q_positions": call.positions,
        "window": layout.window,
        "soft_cap": call.scoring.soft_cap,
    }
    if calibrated(layout.codec):
        return calibrated_weights(group, index, queries, table, lengths, call.rotate, **common)
    return paged_weights(
        queries,
        group.k.values,
        table,
        lengths,
        layer=place_in_page(group, index),
        k_scale=group.k.scale,
        k_min=group.k.minimum,
        backend=call.backend,
        **common,
    )


def _exact(
    group: Group, tail: tuple[jax.Array, jax.Array | None, jax.Array], read: Read, call: Call
) -> tuple[jax.Array, jax.Array]:
    """Attention to the newest tokens beside the pages."""
    keys, values, position = tail
    return _attend_ring(
        call.rotate(call.q, call.positions),
        keys,
        values,
        position,
        call.positions,
        window=read.window,
        soft_cap=call.scoring.soft_cap,
        value_dim=group.layout.spec.value_dim if values is None else None,
        backend=call.backend,
    )


def _attend_ring_of_each(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array | None,
    position: jax.Array,
    q_positions: jax.Array,
    *,
    window: int | None,
    soft_cap: float | None,
    value_dim: int | None,
    backend: str | None,
) -> tuple[jax.Array, jax.Array]:
    """q [B, T, H, D] over keys and values [B, ring, K, *] at position int32[B, K, ring]: pages of one head each."""

    def by_head(x: jax.Array) -> jax.Array:
        """[B, ring, K, D] -> [B * K, 1, 1, ring, D]."""
        return jnp.moveaxis(x, 2, 1).reshape(-1, 1, 1, x.shape[1], x.shape[3])

    table = jnp.arange(position.shape[0] * position.shape[1]).reshape(*position.shape[:2], 1)
    return paged_attention(
        q,
        by_head(keys),
        None if values is None else by_head(values),
        table,
        jnp.full(position.shape[:2], position.shape[2]),
        layer=jnp.zeros(1, jnp.int32),
        positions=position,
        q_positions=q_positions,
        window=window,
        soft_cap=soft_cap,
        value_dim=value_dim,
        backend=backend,
    )


# Whole: of pages numbered by sequence and head, a device would be given all.
_attend_ring = partitioned(
    _attend_ring_of_each,
    {"q": "BTH", "keys": "BSK", "values": "BSK", "position": "BK", "q_positions": "BT"},
    ("BTH", "BTH"),
)


def _selects(group: Group, call: Call) -> bool:
    """Whether this is a step of which a select leaves something unread."""
    select, pages = group.layout.select, group.table.shape[2]
    step = call.positions.shape[1] == 1 and not call.prompt
    return select is not None and step and not select.covers(pages, group.layout.page_size)


def read_then_self(
    group: Group, before: tuple[jax.Array, jax.Array], call: Call, key: Encoded, value: Encoded | None
) -> jax.Array:
    """A chunk's attention: to what was held before it, and to itself as it will be read back."""
    layout, q, positions = group.layout, call.q, call.positions
    reads = layout.policy.reads(layout.window)
    parts = [_partial(group, *before, read, call) for read in reads]
    tables, first = tables_of(group, call.index), first_of(group, call.index)
    k, v = read_back(layout.codec, tables, first, key, value, positions, call.rotate, layout.spec.value_dim, q.dtype)
    cap = call.scoring.soft_cap
    parts.append(attend_among(q, k, v, positions, positions, reads, call.rotate, cap, call.backend))
    return merged(parts, call.scoring.sinks)[0]


def _partial(
    group: Group, position: jax.Array, length: jax.Array, read: Read, call: Call
) -> tuple[jax.Array, jax.Array]:
    """One read over the pool, as positions and lengths [R, B, ...] describe it."""
    layout, index = group.layout, call.index
    table, lengths = _rows(group, length, index)
    places = _by_row(layer_rows(group, position, index))
    if read.slots is not None:
        pages = min(-(-read.slots // layout.page_size), table.shape[2])
        table, places = table[..., :pages], places[..., : pages * layout.page_size]
    simple = layout.policy.in_order and read.first == 0 and read.last is None
    fan = read.lag is not None
    if fan:
        queries, sees = fanned(call.q, call.positions, read, call.rotate)
    else:
        queries, sees = call.rotate(call.q, turned(call.positions, read)), call.positions
    common: dict[str, Any] = {
        "positions": None if simple else covered(places, read),
        "q_positions": sees,
        "window": 1 if fan else read.window,
        "soft_cap": call.scoring.soft_cap,
    }
    if calibrated(layout.codec):
        out, lse = calibrated_attention(group, index, queries, table, lengths, call.rotate, **common)
    else:
        sharing = simple and queries.shape[1] == 1 and worth_sharing(call.copies, places.shape[2])
        read_pages = functools.partial(attend_copies, copies=call.copies) if sharing else paged_attention
        out, lse = read_pages(
            queries,
            group.k.values,
            None if group.v is None else group.v.values,
            table,
            lengths,
            layer=place_in_page(group, index),
            value_dim=layout.spec.value_dim if group.v is None else None,
            k_scale=group.k.scale,
            k_min=group.k.minimum,
            v_scale=None if group.v is None else group.v.scale,
            v_min=None if group.v is None else group.v.minimum,
            backend=call.backend,
            **common,
        )
    return gathered(out, lse, call.q.shape[1]) if fan else (out, lse)


def after(value: jax.Array, result: jax.Array) -> jax.Array:
    """`value`, but computed only once `result` is known.

    What writes to a pool next must depend on whatever read it before: without that order the compiler keeps the old
    pool for the reader and copies all of it. An optimization barrier is gone by the time copies are decided; a zero
    that the compiler cannot see through is not.
    """
    bits = jax.lax.bitcast_convert_type(jnp.max(result).astype(jnp.float32), jnp.uint32)
    return value + ((bits >> 31) >> 1).astype(value.dtype)


def _by_row(rows: jax.Array) -> jax.Array:
    """[r, B, ...] -> [B, r, ...], as kernels take it."""
    return jnp.moveaxis(rows, 0, 1)


def _rows(group: Group, length: jax.Array, index: Any) -> tuple[jax.Array, jax.Array]:
    """A layer's block table int32[B, r, N] and lengths int32[B, r]."""
    return _by_row(layer_rows(group, group.table, index)), _by_row(layer_rows(group, length, index))
