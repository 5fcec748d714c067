"""FP8: e4m3 numbers, one scale per vector."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from kvjax.cache.bits import numbers
from kvjax.cache.codecs.protocol import Encoded

LARGEST = 448.0
"""The largest e4m3 number; what is rounded up beyond it would be NaN."""


@dataclasses.dataclass(frozen=True)
class FP8:
    """float8_e4m3fn numbers with one float32 scale per token and head: scale = max|x| / 448, code = x / scale.

    e4m3 is the format of Micikevicius et al. 2022, 2209.05433: 4 bits of exponent and 3 of fraction, so an element is
    off by at most 1/16 of itself, or scale * 2^-10 if it is tiny. Everything is read back as stored, prompt and current
    token included; a zero vector stays zero. D + 4 bytes per vector.
    """

    bits_for_floats: ClassVar[bool] = True

    def encode(self, x: jax.Array) -> Encoded:
        """x [..., D] -> codes float8_e4m3fn[..., D], scale float32[...]."""
        wide = x.astype(jnp.float32)
        scale = jnp.max(jnp.abs(wide), axis=-1) / LARGEST
        quotient = wide / jnp.where(scale > 0, scale, 1.0)[..., None]
        return Encoded(jnp.clip(quotient, -LARGEST, LARGEST).astype(jnp.float8_e4m3fn), scale)

    def decode(self, stored: Encoded, dtype: Any) -> jax.Array:
        """codes * scale."""
        assert stored.scale is not None
        return (numbers(stored.values).astype(jnp.float32) * stored.scale[..., None]).astype(dtype)

    def bytes_per_vector(self, width: int, dtype: Any) -> int:
        """One byte an element and four for the scale."""
        return width + 4
