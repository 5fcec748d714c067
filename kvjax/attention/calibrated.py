"""Paged attention over keys that lie there before RoPE: a block of pages is decoded and turned at a time.

Whatever the row's length, no more than one block's keys and values are ever made. Plain XLA on every device.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kvjax.cache.calibrated import first_of, tables_of, turned, with_first
from kvjax.cache.codecs import Encoded
from kvjax.cache.state import Group
from kvjax.cache.write import place_in_page
from kvjax.typing import Rotate
from pallas_kernels.paged_attention.blocks import attend_blocks, cut, weigh_blocks
from pallas_kernels.paged_attention.reference import gather

Units = tuple[Encoded, Encoded | None]
"""Pools seen as units of a single layer and head, which a table then names: leaves [X, 1, 1, slots of a unit, ...]."""


class _Layer:
    """One layer's pages, read block by block: table int32[B, K or 1, n] and where its slots' tokens stand."""

    def __init__(self, group: Group, index: int | jax.Array, rotate: Rotate, dtype: Any, units: Units | None):
        tables = tables_of(group, index)
        self.group, self.rotate, self.dtype = group, rotate, dtype
        # Slots lie between heads and channels.
        self.tables = {name: table[:, None] if table.ndim == 2 else table for name, table in tables.items()}
        self.first = first_of(group, index)
        if units is None:
            self.place, self.k, self.v = place_in_page(group, index), group.k, group.v
        else:
            self.place, (self.k, self.v) = jnp.zeros(1, jnp.int32), units

    def keys(self, table: jax.Array, where: jax.Array) -> jax.Array:
        """Unrotated [B, K, S, D]."""
        codec: Any = self.group.layout.codec
        stored = jax.tree.map(lambda pool: gather(pool, table, self.place), self.k)
        return with_first(codec.decode_keys(stored, self.tables, self.dtype), self.first.get("k"), where)

    def turned_keys(self, table: jax.Array, where: jax.Array) -> jax.Array:
        """The same, each turned to its position."""
        return turned(self.keys(table, where), where, self.rotate)

    def both(self, table: jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys turned, and values [B, K, S, Dv]."""
        codec: Any = self.group.layout.codec
        keys = self.keys(table, where)
        if self.v is None:
            values = keys[..., : self.group.layout.spec.value_dim]
        else:
            stored = jax.tree.map(lambda pool: gather(pool, table, self.place), self.v)
            values = with_first(codec.decode_values(stored, self.tables, self.dtype), self.first.get("v"), where)
        return turned(keys, where, self.rotate), values


def calibrated_attention(
    group: Group,
    index: int | jax.Array,
    q: jax.Array,
    table: jax.Array,
    lengths: jax.Array,
    rotate: Rotate,
    *,
    units: Units | None = None,
    positions: jax.Array | None,
    q_positions: jax.Array,
    window: jax.Array | int | None,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """`pallas_kernels.paged_attention` of rotated q [B, T, H, D] over a layer whose keys `rotate` turns.

    units: what the table names in place of the group's pages.
    """
    layer = _Layer(group, index, rotate, q.dtype, units)
    return attend_blocks(
        cut(q, layer.k.values, table, lengths, positions, q_positions, window),
        q,
        group.layout.spec.kv_heads,
        group.layout.spec.value_dim,
        layer.both,
        q_positions=q_positions,
        window=window,
        soft_cap=soft_cap,
        scale=q.shape[-1] ** -0.5,
    )


def calibrated_weights(
    group: Group,
    index: int | jax.Array,
    q: jax.Array,
    table: jax.Array,
    lengths: jax.Array,
    rotate: Rotate,
    *,
    units: Units | None = None,
    lse: jax.Array,
    row_weights: jax.Array,
    positions: jax.Array | None,
    q_positions: jax.Array,
    window: jax.Array | int | None,
    soft_cap: float | None,
) -> jax.Array:
    """`pallas_kernels.paged_weights` over the same: float32[B, K, S]."""
    layer = _Layer(group, index, rotate, q.dtype, units)
    return weigh_blocks(
        cut(q, layer.k.values, table, lengths, positions, q_positions, window),
        q,
        group.layout.spec.kv_heads,
        layer.turned_keys,
        table.shape[2] * layer.k.values.shape[3],
        lse=lse,
        row_weights=row_weights,
        q_positions=q_positions,
        window=window,
        soft_cap=soft_cap,
        scale=q.shape[-1] ** -0.5,
    )
