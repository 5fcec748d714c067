"""Putting tokens into slots: the metadata of a whole step at once, keys and values layer by layer.

Every index is a vector: a scalar-indexed update was seen to copy the pool.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.cache.codecs import Encoded
from kvjax.cache.placement import as_pool
from kvjax.cache.policies.protocol import EMPTY, RowState
from kvjax.cache.put import put
from kvjax.cache.state import Group


def place(group: Group, slots: jax.Array, positions: jax.Array, remembered: RowState | None = None) -> Group:
    """Marks slots int32[R, B, T] as holding the tokens at positions int32[B, T]; slot -1 is not stored.

    What the policy remembered of an overwritten slot is forgotten; of the new tokens it remembers `remembered`, name ->
    [B, T] or [R, B, T], and else zeros.
    """
    rows, batch = jnp.arange(slots.shape[0])[:, None, None], jnp.arange(slots.shape[1])[None, :, None]
    target = jnp.where(slots >= 0, slots, group.position.shape[2])
    positions = jnp.broadcast_to(positions, slots.shape)
    values = remembered or {}

    def fresh(name: str, state: jax.Array) -> jax.Array:
        value = jnp.broadcast_to(values[name], slots.shape) if name in values else 0
        return state.at[rows, batch, target].set(value, mode="drop")

    return dataclasses.replace(
        group,
        position=group.position.at[rows, batch, target].set(positions, mode="drop"),
        row_state={name: fresh(name, state) for name, state in group.row_state.items()},
        length=jnp.maximum(group.length, jnp.max(slots, axis=2) + 1),
    )


def layer_rows(group: Group, array: jax.Array, index: int | jax.Array) -> jax.Array:
    """The rows [r, ...] of an array [R, ...] that hold the layer at `index`: 1, or one per KV head."""
    count = group.layout.rows_per_layer
    if group.layout.policy.rows == "shared":
        return array
    return jax.lax.dynamic_slice_in_dim(array, index * count, count, axis=0)


def update_layer_rows(group: Group, array: jax.Array, rows: jax.Array, index: int | jax.Array) -> jax.Array:
    """`array` with the rows of the layer at `index` replaced."""
    if group.layout.policy.rows == "shared":
        return rows
    return jax.lax.dynamic_update_slice_in_dim(array, rows, index * group.layout.rows_per_layer, axis=0)


def place_in_layer(
    group: Group, index: int | jax.Array, slots: jax.Array, positions: jax.Array, remembered: RowState
) -> Group:
    """`place` in the rows of the layer at `index` alone, slots int32[r, B, T]: for tokens that it finds a slot for."""

    def rows(state: jax.Array) -> jax.Array:
        return layer_rows(group, state, index)

    def renewed(state: jax.Array, new: jax.Array) -> jax.Array:
        return update_layer_rows(group, state, new, index)

    view = dataclasses.replace(
        group,
        position=rows(group.position),
        length=rows(group.length),
        row_state=jax.tree.map(rows, group.row_state),
    )
    view = place(view, slots, positions, remembered)
    return dataclasses.replace(
        group,
        position=renewed(group.position, view.position),
        length=renewed(group.length, view.length),
        row_state=jax.tree.map(renewed, group.row_state, view.row_state),
    )


def place_in_page(group: Group, index: int | jax.Array) -> jax.Array:
    """int32[1]: the layer's place within a page."""
    inside = index if group.layout.policy.rows == "shared" else 0
    return jnp.asarray(inside, jnp.int32).reshape(1)


def write(group: Group, index: int | jax.Array, slots: jax.Array, k: Encoded, v: Encoded | None) -> Group:
    """Stores the encoded keys and values [B, T, K, ...] of the layer at `index` in slots int32[r, B, T] of its rows.

    Tokens with slot -1, or whose page was never reserved, are dropped.
    """
    k, v = as_pool(group.layout, (k, v))
    size = group.layout.page_size
    table = layer_rows(group, group.table, index)
    batch = jnp.arange(slots.shape[1])[None, :, None]
    row = jnp.arange(slots.shape[0])[:, None, None]
    page = table.at[row, batch, slots // size].get(mode="fill", fill_value=EMPTY)
    page = jnp.where((slots >= 0) & (page >= 0), page, group.num_pages)  # out of range: dropped
    offset = jnp.where(slots >= 0, slots % size, 0)
    layer = jnp.broadcast_to(place_in_page(group, index), page.shape)

    def scatter(pool: jax.Array, values: jax.Array) -> jax.Array:
        if group.layout.heads_per_page == 1:
            heads_first = jnp.moveaxis(values, 2, 0)  # a row for each head
            return put(pool, (page, layer, jnp.zeros_like(page), offset), heads_first)
        return put(pool, (page[0], layer[0], slice(None), offset[0]), values)

    return dataclasses.replace(
        group, k=jax.tree.map(scatter, group.k, k), v=None if v is None else jax.tree.map(scatter, group.v, v)
    )
