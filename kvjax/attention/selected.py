"""A step that reads only what its select chooses: a block table of the chosen pages, or slots, in place of the row's.

Every KV head chooses for itself, and a page may hold all heads of all layers. But seen flat, the pool is one of pages
of a single layer and head, or of single slots, and it is these that the shorter table names: nothing is copied. Only
single slots of a codec whose keys share their page's scales are read out one by one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.attention.calibrated import calibrated_attention, calibrated_weights
from kvjax.attention.sharded import paged_attention, paged_weights
from kvjax.cache.calibrated import known
from kvjax.cache.codecs import Encoded
from kvjax.cache.codecs.calibrated import calibrated
from kvjax.cache.page_state import flat, page_numbers
from kvjax.cache.policies.protocol import EMPTY
from kvjax.cache.selects import Chosen, View
from kvjax.cache.state import Group
from kvjax.cache.tail import beside, codec_of, coded
from kvjax.cache.write import layer_rows
from kvjax.typing import Rotate


@dataclasses.dataclass(frozen=True)
class Selected:
    """What one step of one layer reads.

    Attributes:
      k, v: pools, leaves [X, 1, 1, slots of a unit, ...]; v None: the value lies in the key.
      table: int32[B, K, n], the chosen units in it, -1 is none. lengths: int32[B, K], slots in them.
      positions: int32[B, K, n * slots of a unit], the token in each slot, -1 for none.
      slots: int32[B, K, n * slots of a unit], which slot of the row each is, S for none.
      width: S. value_dim: None unless the value lies in the key.
      chosen: as the select gave it.
      unrotated: the group, the layer's index and its `rotate` where the codec was calibrated; None for others.
    """

    k: Encoded
    v: Encoded | None
    table: jax.Array
    lengths: jax.Array
    positions: jax.Array
    slots: jax.Array
    width: int
    value_dim: int | None
    chosen: Chosen
    unrotated: tuple[Group, Any, Rotate] | None = None

    def attend(
        self, q: jax.Array, q_positions: jax.Array, soft_cap: float | None, backend: str | None
    ) -> tuple[jax.Array, jax.Array]:
        """Attention of rotated q [B, 1, H, D] to the chosen alone: out [B, 1, H, Dv], lse float32[B, 1, H]."""
        if self.unrotated is not None:
            group, index, rotate = self.unrotated
            return calibrated_attention(
                group,
                index,
                q,
                self.table,
                self.lengths,
                rotate,
                units=(self.k, self.v),
                positions=self.positions,
                q_positions=q_positions,
                window=None,
                soft_cap=soft_cap,
            )
        return paged_attention(
            q,
            self.k.values,
            None if self.v is None else self.v.values,
            self.table,
            self.lengths,
            layer=jnp.zeros(1, jnp.int32),
            positions=self.positions,
            q_positions=q_positions,
            soft_cap=soft_cap,
            value_dim=self.value_dim,
            k_scale=self.k.scale,
            k_min=self.k.minimum,
            v_scale=None if self.v is None else self.v.scale,
            v_min=None if self.v is None else self.v.minimum,
            backend=backend,
        )

    def completed(self, out: jax.Array) -> jax.Array:
        """out [B, 1, H, Dv] with the share of what was not read in it."""
        share, rest = self.chosen.share, self.chosen.rest
        if share is None:
            return out
        mixed = out.reshape(*share.shape, -1).astype(jnp.float32) * share[..., None]
        if rest is not None:
            mixed = mixed + (1 - share[..., None]) * rest[:, :, None].astype(jnp.float32)
        return mixed.reshape(out.shape).astype(out.dtype)

    def weights(
        self, q: jax.Array, q_positions: jax.Array, lse: jax.Array, soft_cap: float | None, backend: str | None
    ) -> jax.Array:
        """The attention each slot of the row receives, float32[B, K, S], 0 where nothing was read."""
        row_weights = jnp.ones(q_positions.shape, jnp.float32)
        if self.unrotated is not None:
            group, index, rotate = self.unrotated
            some = calibrated_weights(
                group,
                index,
                q,
                self.table,
                self.lengths,
                rotate,
                units=(self.k, self.v),
                lse=lse,
                row_weights=row_weights,
                positions=self.positions,
                q_positions=q_positions,
                window=None,
                soft_cap=soft_cap,
            )
        else:
            some = paged_weights(
                q,
                self.k.values,
                self.table,
                self.lengths,
                lse=lse,
                row_weights=row_weights,
                layer=jnp.zeros(1, jnp.int32),
                positions=self.positions,
                q_positions=q_positions,
                soft_cap=soft_cap,
                k_scale=self.k.scale,
                k_min=self.k.minimum,
                backend=backend,
            )
        batch, heads = jnp.arange(some.shape[0])[:, None, None], jnp.arange(some.shape[1])[None, :, None]
        return jnp.zeros((*some.shape[:2], self.width)).at[batch, heads, self.slots].set(some, mode="drop")

    def read_positions(self, position: jax.Array) -> jax.Array:
        """position int32[r, B, S] for every head, int32[K, B, S], -1 where nothing was read."""
        batch, heads = jnp.arange(self.slots.shape[0])[:, None, None], jnp.arange(self.slots.shape[1])[None, :, None]
        read = jnp.zeros((*self.slots.shape[:2], self.width), bool).at[batch, heads, self.slots].set(True, mode="drop")
        return jnp.where(jnp.moveaxis(read, 1, 0), position, EMPTY)


def selected(
    group: Group,
    index: Any,
    q: jax.Array,
    q_positions: jax.Array,
    window: int | None,
    tail: tuple[jax.Array, jax.Array | None, jax.Array] | None = None,
    rotate: Rotate | None = None,
) -> Selected:
    """What the group's select chooses for rotated queries q [B, 1, H, D] of the layer at `index`.

    Args:
      q_positions: int32[B, 1], -1 is padding. window: only positions less than this far behind; None: all.
      tail: of a codec that waits, what lies beside the pages (`newest`): it is chosen among the others.
      rotate: the layer's, for a codec that holds keys unrotated.
    """
    layout, select = group.layout, group.layout.select
    assert select is not None
    size, heads = layout.page_size, layout.spec.kv_heads
    pages = page_numbers(group, layer_rows(group, group.table, index), index)
    held = layer_rows(group, group.position, index)
    if tail is not None:
        in_pages = coded(group, layer_rows(group, group.length, index) - 1)[1]
        held = jnp.where(jnp.arange(held.shape[-1]) < in_pages[..., None], held, EMPTY)
    held = jnp.moveaxis(held, 0, 1)
    if window is not None:
        held = jnp.where(held > q_positions[:, :, None] - window, held, EMPTY)
    position = jnp.broadcast_to(held.reshape(*held.shape[:2], -1, size), (*pages.shape, size))
    grouped = q.reshape(q.shape[0], heads, -1, q.shape[-1])
    others = None if tail is None else beside(group, index, tail)
    chosen = select.choose(grouped, View(jax.tree.map(flat, group.page_state), pages, position, others))

    some, real = jnp.maximum(chosen.picks, 0), chosen.picks >= 0
    if select.unit == "page":
        slots, unit = some[..., None] * size + jnp.arange(size), size
        table = jnp.take_along_axis(pages, some, axis=-1)
    else:
        slots, unit = some[..., None], 1
        table = jnp.take_along_axis(pages, some // size, axis=-1) * size + some % size
    slots = jnp.where(real[..., None], slots, held.shape[-1]).reshape(*some.shape[:2], -1)
    flattened = position.reshape(*position.shape[:2], -1)
    positions = jnp.take_along_axis(flattened, jnp.minimum(slots, held.shape[-1] - 1), axis=-1)

    def units(pool: jax.Array) -> jax.Array:
        # A leaf that has one of something for a whole page keeps it.
        slots = min(unit, pool.shape[3])
        return pool.reshape(math.prod(pool.shape[:4]) // slots, 1, 1, slots, *pool.shape[4:])

    if tail is None or select.unit == "page":
        k, v = jax.tree.map(units, group.k), None if group.v is None else jax.tree.map(units, group.v)
        table, lengths = jnp.where(real, table, EMPTY), jnp.sum(real, axis=-1, dtype=jnp.int32) * unit
    else:
        k, v = _picked(group, jnp.take_along_axis(pages, some // size, axis=-1), some % size, q.dtype)
        table = jnp.arange(some.shape[0] * heads).reshape(*some.shape[:2], 1)
        lengths = jnp.full(some.shape[:2], some.shape[2], jnp.int32)
    return Selected(
        k=k,
        v=v,
        table=table,
        lengths=lengths,
        positions=jnp.where(slots < held.shape[-1], positions, EMPTY),
        slots=slots,
        width=held.shape[-1],
        value_dim=layout.spec.value_dim if group.v is None else None,
        chosen=chosen,
        unrotated=(group, index, known(group, rotate)) if calibrated(layout.codec) else None,
    )


def _picked(group: Group, pages: jax.Array, offsets: jax.Array, dtype: Any) -> tuple[Encoded, Encoded | None]:
    """Single coded tokens int32[B, K, n] read out: each head of a sequence has a page of them, [B * K, 1, 1, n, *]."""
    codec = codec_of(group.layout)

    def at(pool: Encoded, scales: jax.Array | int) -> Encoded:
        assert pool.scale is not None
        assert pool.minimum is not None
        return Encoded(
            flat(pool.values)[pages, offsets], flat(pool.scale)[pages, scales], flat(pool.minimum)[pages, scales]
        )

    def alone(x: jax.Array) -> Encoded:
        return Encoded(x.reshape(-1, 1, 1, *x.shape[2:]))

    keys = alone(codec.read_keys(at(group.k, 0), dtype))
    return keys, None if group.v is None else alone(codec.read_values(at(group.v, offsets), dtype))
