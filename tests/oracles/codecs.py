"""Oracle codecs: what a key or value vector is once it was stored and read back.

`roundtrip` takes and returns float64[..., D]; each leading index is one token of one head.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import ml_dtypes
import numpy as np


class OracleCodec(Protocol):
    """How a vector is stored."""

    def roundtrip(self, x: np.ndarray) -> np.ndarray:
        """x float64[..., D] -> what is read back, float64[..., D]."""
        ...


@dataclasses.dataclass(frozen=True)
class Dense:
    """Stored as it is, or rounded to `dtype` ("float32", "bfloat16" or "float16")."""

    dtype: str | None = None

    def roundtrip(self, x: np.ndarray) -> np.ndarray:
        """Identity, or the value of the nearest number of `dtype`."""
        if self.dtype is None:
            return np.asarray(x, np.float64)
        kind: Any = ml_dtypes.bfloat16 if self.dtype == "bfloat16" else np.dtype(self.dtype)
        # By way of float32, because that is what a model computes in before it stores.
        return np.asarray(x, np.float32).astype(kind).astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Int8:
    """Symmetric 8-bit integers with one fp32 scale per token and head: scale = max|x| / 127, codes -127..127."""

    def codes(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x [..., D] -> codes int8[..., D] (rounded half to even) and scale float32[..., 1]."""
        x = np.asarray(x, np.float32)
        scale = np.max(np.abs(x), axis=-1, keepdims=True) / np.float32(127)
        # A zero vector has scale 0; any divisor then gives the codes 0.
        codes = np.rint(x / np.where(scale == 0, np.float32(1), scale))
        return np.clip(codes, -127, 127).astype(np.int8), scale

    def roundtrip(self, x: np.ndarray) -> np.ndarray:
        """codes * scale, as a float32 product."""
        codes, scale = self.codes(x)
        return (codes.astype(np.float32) * scale).astype(np.float64)


def counterpart(codec: Any) -> OracleCodec:
    """The oracle of a kvjax codec, found by its class name."""
    name = type(codec).__name__
    if name == "Int8":
        return Int8()
    if name == "Dense":
        return Dense(None if codec.dtype is None else np.dtype(codec.dtype).name)
    raise ValueError(f"there is no oracle of the codec {codec!r}; Dense and Int8 have one")
