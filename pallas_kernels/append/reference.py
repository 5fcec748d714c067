"""Writing new keys and values in plain jnp: what every step of decoding does in every layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def turned(x: jax.Array, positions: jax.Array, frequencies: jax.Array) -> jax.Array:
    """x [B, T, K, D] with its last 2 * frequencies.size channels turned to positions int32[B, T] (RoPE, 2104.09864)."""
    width = 2 * frequencies.shape[0]
    still, moving = x[..., : x.shape[-1] - width], x[..., x.shape[-1] - width :]
    angle = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    first, second = jnp.split(moving.astype(jnp.float32), 2, axis=-1)
    moved = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([still, moved], axis=-1) if still.shape[-1] else moved


def quantised(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [..., D] -> int8 codes in -127..127 and float32 scales [...], the largest magnitude over 127."""
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / 127.0
    codes = jnp.round(wide / jnp.where(scale > 0, scale, 1.0)[..., None])
    return jnp.clip(codes, -127, 127).astype(jnp.int8), scale


def append(
    k_pool: jax.Array,
    v_pool: jax.Array | None,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    k: jax.Array,
    v: jax.Array | None,
    block_table: jax.Array,
    slots: jax.Array,
    positions: jax.Array,
    *,
    layer: jax.Array,
    frequencies: jax.Array,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None, jax.Array | None]:
    """See `api.append`. Every index is a vector: a scatter by a scalar index was seen to copy the pool."""
    pages, _, heads, size = k_pool.shape[:4]
    batch, rows = jnp.arange(slots.shape[0])[:, None, None], jnp.arange(slots.shape[1])[None, :, None]
    page = block_table.at[batch, rows, slots // size].get(mode="fill", fill_value=-1)
    page = jnp.where((slots >= 0) & (page >= 0), page, pages)  # out of range: dropped
    offset = jnp.where(slots >= 0, slots % size, 0)
    place = jnp.broadcast_to(layer, page.shape)

    def scatter(pool: jax.Array | None, values: jax.Array | None) -> jax.Array | None:
        """values [B, T, K, ...] into [P, layers, heads, page, ...]."""
        if pool is None or values is None:
            return None
        values = values.astype(pool.dtype)
        if heads == 1:
            by_row = jnp.moveaxis(values, 2, 1)  # a row for each head
            return pool.at[page, place, jnp.zeros_like(page), offset].set(by_row, mode="drop")
        return pool.at[page[:, 0], place[:, 0], :, offset[:, 0]].set(values, mode="drop")

    keys, values = turned(k, positions, frequencies), v
    key_scales = value_scales = None
    if k_scale is not None:
        keys, key_scales = quantised(keys)
    if v_scale is not None and v is not None:
        values, value_scales = quantised(v)
    new_k = scatter(k_pool, keys)
    assert new_k is not None
    return new_k, scatter(v_pool, values), scatter(k_scale, key_scales), scatter(v_scale, value_scales)
