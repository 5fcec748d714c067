"""Tokens that go into the newest entry: one step over pages, and a prompt in which every query sees what it would have.

For policies that decide so token by token (`kvjax.cache.policies.optional.decides`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvjax.cache.codecs import Codec, Encoded
from kvjax.cache.page_state import store
from kvjax.cache.policies.optional import Decision
from kvjax.cache.state import Group
from kvjax.cache.write import layer_rows, place_in_layer, place_in_page
from kvjax.partition import partitioned
from kvjax.typing import Rotate
from pallas_kernels import attention


class Entries(NamedTuple):
    """Entries of T tokens: k and v as stored, leaves [B, T, K, ...], and weight float32[B, T, K].

    v None: the value lies in the key.
    """

    k: Encoded
    v: Encoded | None
    weight: jax.Array


class Tokens(NamedTuple):
    """New tokens: k [B, T, K, D], rotated, v [B, T, K, Dv] or None, and weight float32[B, T, K]."""

    k: jax.Array
    v: jax.Array | None
    weight: jax.Array


def alone(codec: Codec, tokens: Tokens) -> Entries:
    """Each token as an entry of its own."""
    return Entries(codec.encode(tokens.k), None if tokens.v is None else codec.encode(tokens.v), tokens.weight)


def joined(codec: Codec, before: Entries, tokens: Tokens, rotate: Rotate) -> Entries:
    """Each token in the entry that ends with the token before it: means in float32, under both weights.

    What was stored is read back, blended and stored again.
    """
    total = before.weight + tokens.weight
    share = (tokens.weight / jnp.where(total > 0, total, 1.0))[..., None]

    def mean(old: jax.Array, new: jax.Array) -> Encoded:
        return codec.encode((old + share * (new.astype(jnp.float32) - old)).astype(new.dtype))

    keys = mean(one_further(codec.decode(before.k, jnp.float32), rotate), tokens.k)
    if tokens.v is None or before.v is None:
        return Entries(keys, None, total)
    return Entries(keys, mean(codec.decode(before.v, jnp.float32), tokens.v), total)


def one_further(k: jax.Array, rotate: Rotate) -> jax.Array:
    """Rotated keys [B, T, K, D], each turned on by one position.

    Beside turning, `rotate` may reorder channels (pairs that weights keep side by side) and scale them (YaRN,
    LongRoPE), which is what it does at position 0. Stored keys have been through that: it is undone before it is done
    again.
    """
    probe = jnp.stack([jnp.ones(k.shape[-1]), 1.0 + jnp.arange(k.shape[-1])])[None, :, None]
    scale, numbers = rotate(probe, jnp.zeros((1, 2), jnp.int32))[0, :, 0]
    place = jnp.argsort(numbers / scale)  # where each channel has gone
    return rotate((k / scale)[..., place], jnp.ones(k.shape[:2], jnp.int32))


def chosen(which: jax.Array, yes: Entries, no: Entries) -> Entries:
    """Entry by entry, by which bool[B, T, K]."""

    def one(yes: jax.Array, no: jax.Array) -> jax.Array:
        return jnp.where(which.reshape(*which.shape, *(1,) * (yes.ndim - 3)), yes, no)

    result: Entries = jax.tree.map(one, yes, no)
    return result


# A step


def blend_step(
    group: Group,
    index: int | jax.Array,
    landing: jax.Array,
    decision: Decision,
    v: jax.Array | None,
    positions: jax.Array,
    rotate: Rotate,
) -> Group:
    """Stores one token of each sequence in the layer at `index`: in its heads' newest entries, or behind them.

    Args:
      landing: int32[K, B, 1], the slot behind what each row holds; -1: no token.
      v: [B, 1, K, Dv]. positions: int32[B, 1].
    """
    codec = group.layout.codec
    tokens = Tokens(rotate(decision.k, positions), v, decision.weight)
    by_token = jnp.moveaxis(landing, 0, 2)
    joins = decision.joins & (by_token > 0)
    newest = _stored(group, index, jnp.maximum(landing - 1, 0))
    entries = chosen(joins, joined(codec, newest, tokens, rotate), alone(codec, tokens))
    slots = landing - jnp.moveaxis(joins, 2, 0)
    group = place_in_layer(group, index, slots, positions, {"weight": jnp.moveaxis(entries.weight, 2, 0)})
    return store(group, index, slots, entries.k, entries.v)


def _stored(group: Group, index: int | jax.Array, slots: jax.Array) -> Entries:
    """What slots int32[K, B, 1] of the layer at `index` hold."""
    size = group.layout.page_size
    page = jnp.take_along_axis(layer_rows(group, group.table, index), slots // size, axis=2)
    page, offset = jnp.maximum(page, 0), slots % size
    layer, head = place_in_page(group, index), jnp.zeros_like(page)

    def gathered(pool: jax.Array) -> jax.Array:
        return jnp.moveaxis(pool[page, layer, head, offset], 0, 2)

    weight = jnp.take_along_axis(layer_rows(group, group.row_state["weight"], index), slots, axis=2)
    k, v = jax.tree.map(gathered, (group.k, group.v))
    return Entries(k, v, jnp.moveaxis(weight, 0, 2))


# A prompt


def blend_chunk(codec: Codec, before: Entries, tokens: Tokens, joins: jax.Array, rotate: Rotate) -> Entries:
    """The entry each token of a chunk has gone into, as of that token; joins bool[B, T, K].

    before: the entry that ends with the token before the chunk, T = 1. One pass over the chunk for each token of the
    longest run: with each token blended into what its predecessor left stored, this is what single steps give.
    """
    order = jnp.arange(joins.shape[1])[:, None]
    begins = jax.lax.cummax(jnp.where(joins, -1, order), axis=1)
    rank = order - begins  # how many tokens of the run came before, within this chunk and the entry before it

    def unfinished(carry: tuple[jax.Array, Entries]) -> jax.Array:
        return carry[0] <= jnp.max(rank)

    def follow(carry: tuple[jax.Array, Entries]) -> tuple[jax.Array, Entries]:
        step, entries = carry
        previous = jax.tree.map(lambda first, rest: jnp.concatenate([first, rest[:, :-1]], axis=1), before, entries)
        return step + 1, chosen(rank == step, joined(codec, previous, tokens, rotate), entries)

    start = (jnp.ones((), jnp.int32), alone(codec, tokens))
    return jax.lax.while_loop(unfinished, follow, start)[1]


def _attend_runs(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    held: jax.Array,
    q_positions: jax.Array,
    window: int | None,
    soft_cap: float | None,
    backend: str | None,
) -> tuple[jax.Array, jax.Array]:
    """Causal attention where every KV head has tokens of its own to see: out [B, T, H, Dv], lse float32[B, T, H].

    Args:
      q: [B, T, H, D], rotated; k, v: [B, S, K, *], rotated.
      held: int32[B, S, K], where a head's entries stand, -1 is none. q_positions: int32[B, T], -1 is padding.
    """
    batch, tokens, heads = q.shape[:3]
    kv_heads = k.shape[2]

    def apart(x: jax.Array) -> jax.Array:
        """[B, n, K * g, D] -> [B * K, n, g, D]: each KV head as if it were a sequence."""
        x = x.reshape(batch, x.shape[1], kv_heads, -1, x.shape[3])
        return jnp.moveaxis(x, 2, 1).reshape(-1, x.shape[1], *x.shape[3:])

    def together(x: jax.Array) -> jax.Array:
        """[B * K, T, g, ...] -> [B, T, H, ...]."""
        x = jnp.moveaxis(x.reshape(batch, kv_heads, tokens, *x.shape[2:]), 1, 2)
        return x.reshape(batch, tokens, heads, *x.shape[4:])

    out, lse = attention(
        *map(apart, (q, k, v)),
        causal=True,
        window=window,
        soft_cap=soft_cap,
        positions=jnp.moveaxis(held, 2, 1).reshape(-1, k.shape[1]),
        q_positions=jnp.repeat(q_positions, kv_heads, axis=0),
        backend=backend,
    )
    return together(out), together(lse)


# Whole: once heads are sequences, a mesh could no longer split them.
attend_runs = partitioned(
    _attend_runs, {"q": "BTH", "k": "BSK", "v": "BSK", "held": "BSK", "q_positions": "BT"}, ("BTH", "BTH")
)


def attend_own(
    q: jax.Array, k: jax.Array, v: jax.Array, sees: jax.Array, soft_cap: float | None
) -> tuple[jax.Array, jax.Array]:
    """The part of each token's attention that goes to its own entry: out [B, T, H, Dv], lse float32[B, T, H].

    q [B, T, H, D], k, v [B, T, K, *], rotated; sees bool[B, T, K], False where it is seen with the others.
    """
    group = q.shape[2] // k.shape[2]
    k, v, sees = (jnp.repeat(x, group, axis=2) for x in (k, v, sees))
    scores = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=-1) * q.shape[3] ** -0.5
    scores = scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)
    return v.astype(q.dtype), jnp.where(sees, scores, -jnp.inf)
