"""KIVI: 2-bit keys by channel and values by token, the newest tokens exact."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax

from kvjax.cache.codecs.packed import affine_codes, pack, unpack
from kvjax.cache.codecs.protocol import Encoded
from kvjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class KIVI:
    """Codes of 2 or 4 bits with float16 scales and minima (Liu et al. 2024, 2402.02750).

    scale = (max - min) / (2^bits - 1), code = round((x - min) / scale): of keys per channel over `group` tokens, which
    are one page, of values per token over `group` channels. With n tokens held after a step, the oldest
    n - n mod residual keys and max(0, n - residual) values are coded, each once; the others stay exact beside the pages
    (`kvjax.cache.tail`). Coding follows the step's attention, and that of a whole prompt layer by layer. Where the
    value lies within the key, the key's coding serves both. An element is off by at most scale / 2 and the rounding of
    scale and minimum to float16; up to `residual` - 1 tokens everything is exact.

    Slots must never be written twice, so it serves policies that only append. A prompt behind what is held already goes
    in token by token.

    Attributes:
      bits: 2 or 4. group: slots of a page, a power of two that divides the width of keys and values.
      residual: a multiple of `group`.
    """

    bits: int = 2
    group: int = 32
    residual: int = 128
    waits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("bits", "group", "residual"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ConfigError(f"codecs.KIVI({name}) must be an integer, got {value!r}")
        if self.bits not in (2, 4):
            raise ConfigError(f"codecs.KIVI(bits) must be 2 or 4, got {self.bits}")
        if self.group < 8 // self.bits or self.group & (self.group - 1):
            raise ConfigError(
                f"codecs.KIVI(group) must be a power of two of at least {8 // self.bits}, the codes of a byte, "
                f"got {self.group}"
            )
        if self.residual < 1 or self.residual % self.group:
            raise ConfigError(
                f"codecs.KIVI(residual) must be a positive multiple of group={self.group}, got {self.residual}"
            )

    @property
    def page_size(self) -> int:
        """Slots of a page: the tokens over which keys share their scales."""
        return self.group

    @property
    def ring(self) -> int:
        """Tokens kept exact beside the pages: `residual`, and the current one."""
        return self.residual + 1

    def check_width(self, width: int) -> None:
        """Raises ConfigError for vectors that no whole number of groups makes up."""
        if width % self.group:
            raise ConfigError(
                f"codecs.KIVI(group={self.group}) must divide the width of what it codes, and this model's vectors "
                f"have {width} channels; choose a power of two that divides {width}"
            )

    def encode(self, x: jax.Array) -> Encoded:
        """What is new is exact."""
        return Encoded(x)

    def decode(self, stored: Encoded, dtype: Any) -> jax.Array:
        """What is new, in `dtype`."""
        return stored.values.astype(dtype)

    def bytes_per_vector(self, width: int, dtype: Any) -> int:
        """`bits` an element, and four bytes for each group's scale and minimum: of keys a page's share of them."""
        return width * self.bits // 8 + 4 * width // self.group

    def code_keys(self, x: jax.Array) -> Encoded:
        """Whole pages x [..., group, D] -> uint8[..., group, D * bits / 8], scale and minimum float16[..., 1, D]."""
        codes, scale, minimum = affine_codes(x.swapaxes(-1, -2), self.bits)
        return Encoded(pack(codes.swapaxes(-1, -2), self.bits), scale[..., None, :], minimum[..., None, :])

    def code_values(self, x: jax.Array) -> Encoded:
        """x [..., D] -> uint8[..., D * bits / 8], scale and minimum float16[..., D / group]."""
        codes, scale, minimum = affine_codes(x.reshape(*x.shape[:-1], -1, self.group), self.bits)
        return Encoded(pack(codes.reshape(x.shape), self.bits), scale, minimum)

    def read_keys(self, stored: Encoded, dtype: Any) -> jax.Array:
        """Keys uint8[..., D * bits / 8], each with its page's scale and minimum [..., D] or [..., 1, D] -> [..., D]."""
        assert stored.scale is not None
        assert stored.minimum is not None
        codes = unpack(stored.values, self.bits)
        return (codes.astype("float32") * stored.scale.astype("float32") + stored.minimum.astype("float32")).astype(
            dtype
        )

    def read_values(self, stored: Encoded, dtype: Any) -> jax.Array:
        """Values uint8[..., D * bits / 8] with scales and minima [..., D / group] -> [..., D]."""
        assert stored.scale is not None
        assert stored.minimum is not None
        codes = unpack(stored.values, self.bits)
        grouped = codes.astype("float32").reshape(*stored.scale.shape, self.group)
        read = grouped * stored.scale.astype("float32")[..., None] + stored.minimum.astype("float32")[..., None]
        return read.reshape(codes.shape).astype(dtype)
