"""Paged attention in plain jnp: gather the pages a table names, dequantise, attend. The definition of right."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.softmax import column_weights, softmax_attention, visible


def unsupported(**call: object) -> str | None:
    """Serves every call."""
    return None


def gather(pool: jax.Array, table: jax.Array, layer: jax.Array) -> jax.Array:
    """pool [P, layers, heads, page, *], table int32[B, K or 1, N] -> one layer's slots [B, K, N * page, *]."""
    pages, layers, heads = pool.shape[:3]
    # One index per page of one head, already in the order wanted: contiguous copies, and nothing to transpose after.
    number = (jnp.maximum(table, 0) * layers + layer[0]) * heads + jnp.arange(heads)[:, None]
    rows = jnp.asarray(pool).reshape(pages * layers * heads, -1)[number]
    return rows.reshape(*number.shape[:2], number.shape[2] * pool.shape[3], *pool.shape[4:])


def codes_per_byte(q: jax.Array, k_pool: jax.Array) -> int:
    """How many codes share a byte of the pools: uint8 keys narrower than the queries hold several."""
    return q.shape[-1] // k_pool.shape[-1] if k_pool.dtype == jnp.uint8 else 1


def unpacked(codes: jax.Array, packed: int) -> jax.Array:
    """uint8[..., W] -> uint8[..., W * packed]: byte i holds columns i, i + W, ... from its low bits up."""
    bits = 8 // packed
    mask = jnp.uint8(2**bits - 1)
    return jnp.concatenate([(codes >> jnp.uint8(shift)) & mask for shift in range(0, 8, bits)], axis=-1)


def numbers(codes: jax.Array, scale: jax.Array | None, minimum: jax.Array | None) -> jax.Array:
    """Codes or numbers as they are, but where integers hold the bits of short floats, which CPUs cannot scatter.

    uint16 is bfloat16, and uint8 with one scale per vector and no minimum is float8_e4m3fn.
    """
    if codes.dtype == jnp.uint16:
        return codes.view(jnp.bfloat16)
    if codes.dtype == jnp.uint8 and scale is not None and minimum is None and scale.ndim == 4:
        return codes.view(jnp.float8_e4m3fn)
    return codes


def dequantised(
    pool: jax.Array,
    scale: jax.Array | None,
    minimum: jax.Array | None,
    table: jax.Array,
    layer: jax.Array,
    dtype: jnp.dtype,
    packed: int = 1,
) -> jax.Array:
    """One layer's slots [B, K, N * page, *] as the codec reads them back, in `dtype`; `packed` codes share a byte."""
    codes = numbers(gather(pool, table, layer), scale, minimum)
    if scale is None:
        return codes.astype(dtype)
    if packed > 1:
        codes = unpacked(codes, packed)
    steps = gather(scale, table, layer).astype(jnp.float32)
    if steps.ndim == 3:
        return (codes.astype(jnp.float32) * steps[..., None]).astype(dtype)
    low = None if minimum is None else gather(minimum, table, layer).astype(jnp.float32)
    if scale.shape[3] != pool.shape[3]:
        by_page = codes.astype(jnp.float32).reshape(*steps.shape[:3], -1, codes.shape[-1]) * steps[:, :, :, None]
        by_page = by_page if low is None else by_page + low[:, :, :, None]
        return by_page.reshape(codes.shape).astype(dtype)
    grouped = codes.astype(jnp.float32).reshape(*steps.shape, -1) * steps[..., None]
    if low is not None:
        grouped = grouped + low[..., None]
    return grouped.reshape(codes.shape).astype(dtype)


def seen_and_held(
    table: jax.Array,
    lengths: jax.Array,
    positions: jax.Array | None,
    q_positions: jax.Array,
    window: jax.Array | int | None,
    page: int,
) -> tuple[jax.Array, jax.Array]:
    """Who sees what, bool[B, K or 1, 1, T, S], and which slots hold a token, bool[B, K or 1, S]."""
    order = jnp.arange(table.shape[2] * page)
    held = jnp.repeat(table >= 0, page, axis=-1) & (order < lengths[..., None])
    where = jnp.where(held, order if positions is None else positions, -1)
    return visible(where, q_positions[:, None], window)[:, :, None], where >= 0


def paged_attention(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array | None,
    block_table: jax.Array,
    lengths: jax.Array,
    *,
    layer: jax.Array,
    positions: jax.Array | None,
    q_positions: jax.Array,
    window: jax.Array | int | None,
    soft_cap: float | None,
    scale: float,
    value_dim: int | None,
    k_scale: jax.Array | None,
    k_min: jax.Array | None,
    v_scale: jax.Array | None,
    v_min: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.paged_attention`."""
    packed = codes_per_byte(q, k_pool)
    k = dequantised(k_pool, k_scale, k_min, block_table, layer, q.dtype, packed)
    if v_pool is None:
        v = k[..., :value_dim]
    else:
        v = dequantised(v_pool, v_scale, v_min, block_table, layer, q.dtype, packed)
    mask, held = seen_and_held(block_table, lengths, positions, q_positions, window, k_pool.shape[3])
    # Unused slots may hold anything, NaN too, and a weight of 0 does not silence a NaN.
    v = jnp.where(held[..., None], v, 0)
    return softmax_attention(q, k, v, mask, scale, soft_cap)


def paged_weights(
    q: jax.Array,
    k_pool: jax.Array,
    block_table: jax.Array,
    lengths: jax.Array,
    *,
    lse: jax.Array,
    row_weights: jax.Array,
    layer: jax.Array,
    positions: jax.Array | None,
    q_positions: jax.Array,
    window: jax.Array | int | None,
    soft_cap: float | None,
    scale: float,
    k_scale: jax.Array | None,
    k_min: jax.Array | None,
) -> jax.Array:
    """See `api.paged_weights`."""
    packed = codes_per_byte(q, k_pool)
    k = dequantised(k_pool, k_scale, k_min, block_table, layer, q.dtype, packed)
    mask, _ = seen_and_held(block_table, lengths, positions, q_positions, window, k_pool.shape[3])
    return column_weights(q, k, mask, lse, row_weights, scale, soft_cap)
