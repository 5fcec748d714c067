"""Attention over the paged cache: writes a step's tokens and reads what their policy keeps."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.attention.partial import attend_among, covered, turned
from kvjax.cache.codecs import Encoded
from kvjax.cache.policies.protocol import Read
from kvjax.cache.state import Cache, Group, with_victims
from kvjax.cache.write import layer_rows, place, place_in_page, update_layer_rows, write
from kvjax.typing import Rotate
from pallas_kernels import merge, paged_attention, paged_weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """What is carried through the layers of one forward pass.

    Attributes:
      cache: metadata already says where the new tokens are; keys and values follow layer by layer.
      slots: per group int32[R, B, T], where the new tokens land.
      before: per group, the group's positions and lengths before this step, for chunks that may overwrite what their
        own first queries still need; None where writing first is safe.
      active: bool[B], sequences that have a token in this step.
    """

    cache: Cache
    slots: tuple[jax.Array, ...]
    before: tuple[tuple[jax.Array, jax.Array] | None, ...]
    active: jax.Array


@dataclasses.dataclass(frozen=True)
class PagedAttend:
    """The `attend` of prefill and decoding over a `Cache` whose pages were reserved.

    One token a step, or a chunk of tokens under a policy that needs no attention weights. Writes come first where no
    slot is overwritten that a query of the same call still needs: one token at a time, or an append-only policy.
    Otherwise a chunk attends to what is held and to itself, and then writes what stays.

    Attributes:
      backend: which kernel, None for the best that can serve.
    """

    backend: str | None = None

    def begin(self, cache: Cache, tokens: jax.Array, positions: jax.Array) -> Step:
        """positions int32[B, T], -1 is padding. Decides where every token lands, in every row."""
        chunk = positions.shape[1] > 1
        groups, slots, before = [], [], []
        for group in cache.groups:
            policy = group.layout.policy
            if chunk and policy.observes:
                raise ValueError(f"{policy!r} takes one token a step once its prompt is in, got {positions.shape[1]}")
            landing = policy.slots(group.length, group.victim, cache.seen, positions)
            groups.append(place(group, landing, positions))
            slots.append(landing)
            before.append((group.position, group.length) if chunk and not policy.append_only else None)
        seen = cache.seen + jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
        return Step(Cache(tuple(groups), seen), tuple(slots), tuple(before), jnp.any(positions >= 0, axis=1))

    def __call__(
        self,
        cache: Step,
        layer: Any,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        positions: jax.Array,
        rotate: Rotate,
    ) -> tuple[jax.Array, Step]:
        """q [B,T,H,D], k [B,T,K,D], v [B,T,K,Dv] unrotated, positions int32[B,T] -> out [B,T,H,Dv], the step."""
        number, index = cache.cache.locate(layer)
        group = cache.cache.groups[number]
        layout = group.layout
        slots = layer_rows(group, cache.slots[number], index)
        key = layout.codec.encode(rotate(k, positions))
        value = None if layout.spec.value_in_key else layout.codec.encode(v)
        before = cache.before[number]
        if before is None:
            group = write(group, index, slots, key, value)
            out, group = self._read(group, index, q, positions, rotate, cache.active)
        else:
            out = self._read_then_self(group, before, index, q, key, value, positions, rotate)
            group = write(group, index, after(slots, out), key, value)
        groups = (*cache.cache.groups[:number], group, *cache.cache.groups[number + 1 :])
        return out, dataclasses.replace(cache, cache=dataclasses.replace(cache.cache, groups=groups))

    def end(self, cache: Step) -> Cache:
        """Marks what the next token overwrites."""
        return with_victims(cache.cache)

    def _read(
        self, group: Group, index: Any, q: jax.Array, positions: jax.Array, rotate: Rotate, active: jax.Array
    ) -> tuple[jax.Array, Group]:
        """Attention over what is held, the new tokens included; scores follow where the policy wants them."""
        layout = group.layout
        reads = layout.policy.reads(layout.window)
        parts = [
            self._partial(group, group.position, group.length, index, read, q, positions, rotate) for read in reads
        ]
        out, lse = parts[0] if len(parts) == 1 else merge(*(jnp.stack(part) for part in zip(*parts, strict=True)))
        if not layout.policy.observes:
            return out, group
        weights = paged_weights(
            rotate(q, positions),
            group.k.values,
            *_rows(group, group.length, index),
            lse=lse,
            row_weights=jnp.ones(positions.shape, jnp.float32),
            layer=place_in_page(group, index),
            positions=_by_row(layer_rows(group, group.position, index)),
            q_positions=positions,
            window=layout.window,
            k_scale=group.k.scale,
            k_min=group.k.minimum,
            backend=self.backend,
        )
        held = jax.tree.map(lambda state: layer_rows(group, state, index), group.row_state)
        seen = layout.policy.observe(held, jnp.moveaxis(weights, 1, 0), active)
        state = jax.tree.map(lambda old, new: update_layer_rows(group, old, new, index), group.row_state, seen)
        return after(out, weights), dataclasses.replace(group, row_state=state)

    def _read_then_self(
        self,
        group: Group,
        before: tuple[jax.Array, jax.Array],
        index: Any,
        q: jax.Array,
        key: Encoded,
        value: Encoded | None,
        positions: jax.Array,
        rotate: Rotate,
    ) -> jax.Array:
        """A chunk's attention: to what was held before it, and to itself as it will be read back."""
        layout = group.layout
        reads = layout.policy.reads(layout.window)
        parts = [self._partial(group, *before, index, read, q, positions, rotate) for read in reads]
        k = layout.codec.decode(key, q.dtype)
        v = k[..., : layout.spec.value_dim] if value is None else layout.codec.decode(value, q.dtype)
        parts.append(attend_among(q, k, v, positions, positions, reads, rotate, self.backend))
        return merge(*(jnp.stack(part) for part in zip(*parts, strict=True)))[0]

    def _partial(
        self,
        group: Group,
        position: jax.Array,
        length: jax.Array,
        index: Any,
        read: Read,
        q: jax.Array,
        positions: jax.Array,
        rotate: Rotate,
    ) -> tuple[jax.Array, jax.Array]:
        """One read over the pool, as positions and lengths [R, B, ...] describe it."""
        layout = group.layout
        table, lengths = _rows(group, length, index)
        places = _by_row(layer_rows(group, position, index))
        if read.slots is not None:
            pages = min(-(-read.slots // layout.page_size), table.shape[2])
            table, places = table[..., :pages], places[..., : pages * layout.page_size]
        simple = layout.policy.in_order and read.first == 0 and read.last is None
        return paged_attention(
            rotate(q, turned(positions, read)),
            group.k.values,
            None if group.v is None else group.v.values,
            table,
            lengths,
            layer=place_in_page(group, index),
            positions=None if simple else covered(places, read),
            q_positions=positions,
            window=read.window,
            value_dim=layout.spec.value_dim if group.v is None else None,
            k_scale=group.k.scale,
            k_min=group.k.minimum,
            v_scale=None if group.v is None else group.v.scale,
            v_min=None if group.v is None else group.v.minimum,
            backend=self.backend,
        )


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
