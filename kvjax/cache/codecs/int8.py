"""Int8: symmetric rounding, one scale per vector."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.cache.codecs.protocol import Encoded


@dataclasses.dataclass(frozen=True)
class Int8:
    """Codes in -127..127 with one float32 scale per token and head: scale = max|x| / 127, code = round(x / scale).

    Everything is read back as stored, prompt and current token included. Rounding is half to even; the error of an
    element is at most scale / 2; a zero vector stays zero; coding a decoded vector again changes no code.
    D + 4 bytes per vector.
    """

    def encode(self, x: jax.Array) -> Encoded:
        """x [..., D] -> codes int8[..., D], scale float32[...]."""
        wide = x.astype(jnp.float32)
        scale = jnp.max(jnp.abs(wide), axis=-1) / 127.0
        codes = jnp.round(wide / jnp.where(scale > 0, scale, 1.0)[..., None])
        return Encoded(jnp.clip(codes, -127, 127).astype(jnp.int8), scale)

    def decode(self, stored: Encoded, dtype: Any) -> jax.Array:
        """codes * scale."""
        assert stored.scale is not None
        return (stored.values.astype(jnp.float32) * stored.scale[..., None]).astype(dtype)

    def bytes_per_vector(self, width: int, dtype: Any) -> int:
        """One byte an element and four for the scale."""
        return width + 4
