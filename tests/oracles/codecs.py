"""Oracle codecs: what a key or value vector is once it was stored and read back.

`roundtrip` takes and returns float64[..., D]; each leading index is one token of one head. Codecs that need to know
more of a vector than itself, or wait until several tokens are held, are in `page_codecs`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from tests.oracles.policies import Entry


class OracleCodec:
    """How a vector is stored."""

    before_rotation: ClassVar[bool] = False
    """Keys are coded as they are before RoPE, and rotated when they are read."""
    waits: ClassVar[bool] = False
    """Codes tokens in groups of slots once they are complete, so no slot may ever be written twice."""

    def roundtrip(self, x: np.ndarray) -> np.ndarray:
        """x float64[..., D] -> what is read back, float64[..., D]."""
        raise NotImplementedError

    def write(self, layer: int, head: int, part: str, x: np.ndarray, positions: Sequence[int]) -> np.ndarray:
        """What is read back of the "key" or "value" vectors [T, D] of new tokens; `layer` counts owners."""
        return self.roundtrip(x)

    def settle(self, entries: list[Entry], rank: int | None) -> None:
        """Codes, in place and after the step's attention, what the codec let wait; `entries` in the order of slots.

        rank: the value is the key's first so many columns, as stored (None: it is stored by itself).
        """


@dataclasses.dataclass(frozen=True)
class Vectorwise(OracleCodec):
    """Any object that has a `roundtrip`."""

    inner: Any

    def roundtrip(self, x: np.ndarray) -> np.ndarray:
        """The object's."""
        return self.inner.roundtrip(x)


def complete(codec: Any) -> OracleCodec:
    """The codec, or an object with nothing but `roundtrip` made into one."""
    return codec if isinstance(codec, OracleCodec) else Vectorwise(codec)


@dataclasses.dataclass(frozen=True)
class Dense(OracleCodec):
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
class Int8(OracleCodec):
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


@dataclasses.dataclass(frozen=True)
class FP8(OracleCodec):
    """e4m3 numbers with one fp32 scale per token and head: scale = max|x| / 448, the largest number there is."""

    def codes(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x [..., D] -> codes float8_e4m3fn[..., D] and scale float32[..., 1]."""
        x = np.asarray(x, np.float32)
        scale = np.max(np.abs(x), axis=-1, keepdims=True) / np.float32(448)
        quotient = x / np.where(scale == 0, np.float32(1), scale)
        # A quotient rounded up beyond 448 would become NaN.
        return np.clip(quotient, -448, 448).astype(ml_dtypes.float8_e4m3fn), scale

    def roundtrip(self, x: np.ndarray) -> np.ndarray:
        """codes * scale, as a float32 product."""
        codes, scale = self.codes(x)
        return (codes.astype(np.float32) * scale).astype(np.float64)


def affine_codes(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Asymmetric codes over the last axis: x [..., n] -> codes int[..., n], fp16 scale [..., 1] and minimum [..., 1].

    scale = (max - min) / (2^bits - 1); code = round((x - min) / scale), half to even. Both are rounded to fp16 first,
    so that codes are the nearest to what will be read.
    """
    x = np.asarray(x, np.float32)
    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    scale = ((high - low) / np.float32(2**bits - 1)).astype(np.float16)
    low = low.astype(np.float16)
    # A constant group has scale 0; any divisor then gives codes that are multiplied by 0.
    divisor = np.where(scale == 0, np.float32(1), scale.astype(np.float32))
    codes = np.rint((x - low.astype(np.float32)) / divisor)
    return np.clip(codes, 0, 2**bits - 1).astype(np.int64), scale, low


def affine(x: np.ndarray, bits: int) -> np.ndarray:
    """codes * scale + minimum over the last axis, as float32: [..., n] -> float64[..., n]."""
    codes, scale, low = affine_codes(x, bits)
    return (codes.astype(np.float32) * scale.astype(np.float32) + low.astype(np.float32)).astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Int4(OracleCodec):
    """Asymmetric 4-bit integers 0..15 with an fp16 scale and minimum per `group` channels of a token and head."""

    group: int = 32

    def roundtrip(self, x: np.ndarray) -> np.ndarray:
        """codes * scale + minimum."""
        groups = np.reshape(x, (*np.shape(x)[:-1], -1, self.group))
        return affine(groups, 4).reshape(np.shape(x))


def counterpart(codec: Any) -> OracleCodec:
    """The oracle of a kvjax codec, found by its class name."""
    from tests.oracles.page_codecs import KIVI

    match type(codec).__name__:
        case "Int8":
            return Int8()
        case "FP8":
            return FP8()
        case "Int4":
            return Int4(codec.group)
        case "KIVI":
            return KIVI(codec.bits, codec.group, codec.residual)
        case "Dense":
            return Dense(None if codec.dtype is None else np.dtype(codec.dtype).name)
    raise ValueError(
        f"there is no oracle of the codec {codec!r}; Dense, Int8, FP8, Int4 and KIVI have one,"
        " and KVQuant one that is given its calibration"
    )
