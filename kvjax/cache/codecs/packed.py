"""Codes of less than a byte, several to a byte, and the rounding onto even steps that makes them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

FINITE = 65504.0
"""The largest float16: a scale or a minimum beyond it would be infinite and what is read back NaN."""


def affine_codes(x: jax.Array, bits: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes over the last axis: x [..., n] -> uint8[..., n] below 2^bits, scale float16[...], minimum float16[...].

    scale = (max - min) / (2^bits - 1), code = round((x - min) / scale), half to even. Scale and minimum are rounded
    first, so that codes are the nearest to what will be read; a constant group has scale 0 and the codes 0.
    """
    wide, levels = x.astype(jnp.float32), 2**bits - 1
    low, high = jnp.min(wide, axis=-1), jnp.max(wide, axis=-1)
    scale = jnp.minimum((high - low) / levels, FINITE).astype(jnp.float16)
    minimum = jnp.clip(low, -FINITE, FINITE).astype(jnp.float16)
    step = jnp.where(scale > 0, scale.astype(jnp.float32), 1.0)
    codes = jnp.round((wide - minimum.astype(jnp.float32)[..., None]) / step[..., None])
    return jnp.clip(codes, 0, levels).astype(jnp.uint8), scale, minimum


def affine(codes: jax.Array, scale: jax.Array, minimum: jax.Array) -> jax.Array:
    """codes * scale + minimum: codes [..., n], scale and minimum [...] -> float32[..., n]."""
    step, low = scale.astype(jnp.float32), minimum.astype(jnp.float32)
    return codes.astype(jnp.float32) * step[..., None] + low[..., None]


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """uint8[..., D] below 2^bits -> uint8[..., D * bits / 8].

    Byte i holds the codes i, i + D * bits / 8, ... from its low bits up: whoever unpacks joins whole runs of columns,
    and needs not weave them.
    """
    count = 8 // bits
    planes = codes.reshape(*codes.shape[:-1], count, -1)
    packed = planes[..., 0, :]
    for plane in range(1, count):
        packed = packed | (planes[..., plane, :] << jnp.uint8(plane * bits))
    return packed


def unpack(packed: jax.Array, bits: int) -> jax.Array:
    """The inverse of `pack`."""
    mask = jnp.uint8(2**bits - 1)
    return jnp.concatenate([(packed >> jnp.uint8(shift)) & mask for shift in range(0, 8, bits)], axis=-1)
