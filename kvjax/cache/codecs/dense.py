"""Dense: vectors as they are."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from kvjax.cache.bits import numbers
from kvjax.cache.codecs.protocol import Encoded
from kvjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Dense:
    """Stores vectors in a floating dtype.

    Attributes:
      dtype: "float32", "bfloat16" or "float16"; None: the model's own.
    """

    dtype: str | None = None
    bits_for_floats: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.dtype is not None:
            name = self.dtype if isinstance(self.dtype, str) else jnp.dtype(self.dtype).name
            if name not in ("float32", "bfloat16", "float16"):
                raise ConfigError(f"codecs.Dense(dtype) must be None, float32, bfloat16 or float16, got {name!r}")
            object.__setattr__(self, "dtype", name)

    def encode(self, x: jax.Array) -> Encoded:
        """x [..., D] -> the same in the codec's dtype."""
        return Encoded(x if self.dtype is None else x.astype(self.dtype))

    def decode(self, stored: Encoded, dtype: Any) -> jax.Array:
        """Back to `dtype`."""
        return numbers(stored.values).astype(dtype)

    def bytes_per_vector(self, width: int, dtype: Any) -> int:
        """width * itemsize."""
        return width * jnp.dtype(self.dtype or dtype).itemsize
