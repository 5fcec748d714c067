"""Int4: asymmetric 4-bit codes over groups of channels."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from kvjax.cache.codecs.packed import affine, affine_codes, pack, unpack
from kvjax.cache.codecs.protocol import Encoded
from kvjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Int4:
    """Codes in 0..15, two to a byte, with a float16 scale and minimum per `group` channels of a token and head.

    scale = (max - min) / 15, code = round((x - min) / scale), half to even. Everything is read back as stored, prompt
    and current token included. An element is off by at most scale / 2 and the rounding of scale and minimum to float16;
    a zero vector stays zero. D / 2 + 4 D / group bytes per vector, 5 bits an element with groups of 32.

    Attributes:
      group: channels that share a scale: even, and a divisor of the width of keys and of values.
    """

    group: int = 32

    def __post_init__(self) -> None:
        if not isinstance(self.group, int) or isinstance(self.group, bool) or self.group < 2 or self.group % 2:
            raise ConfigError(f"codecs.Int4(group) must be a positive even integer, got {self.group!r}")

    def check_width(self, width: int) -> None:
        """Raises ConfigError for vectors that no whole number of groups makes up."""
        if width % self.group:
            raise ConfigError(
                f"codecs.Int4(group={self.group}) must divide the width of what it codes, and this model's vectors "
                f"have {width} channels; choose an even divisor of {width}"
            )

    def encode(self, x: jax.Array) -> Encoded:
        """x [..., D] -> codes uint8[..., D / 2], scale and minimum float16[..., D / group]."""
        codes, scale, minimum = affine_codes(x.reshape(*x.shape[:-1], -1, self.group), 4)
        return Encoded(pack(codes.reshape(x.shape), 4), scale, minimum)

    def decode(self, stored: Encoded, dtype: Any) -> jax.Array:
        """codes * scale + minimum."""
        assert stored.scale is not None
        assert stored.minimum is not None
        codes = unpack(stored.values, 4)
        grouped = codes.reshape(*codes.shape[:-1], -1, self.group)
        return affine(grouped, stored.scale, stored.minimum).reshape(codes.shape).astype(dtype)

    def bytes_per_vector(self, width: int, dtype: Any) -> int:
        """Half a byte an element and four for each group's scale and minimum."""
        return width // 2 + 4 * (width // self.group)
