"""What a codec must provide, and the encoded form all of them share."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax


class Apart(NamedTuple):
    """Channels that are kept exact beside the codes: their numbers uint8 or uint16 [..., n], and float16[..., n]."""

    channel: jax.Array
    exact: jax.Array


class Encoded(NamedTuple):
    """Vectors as stored: a pytree of [..., D] values with [...] or [..., groups] scales and minima.

    The same type holds one call's tokens and a whole pool ([P, layers_per_page, heads_per_page, page_size, ...]), so
    writing is one scatter per leaf and the kernels take `values`, `scale` and `minimum` as they are. What is `apart` no
    kernel knows of. Pools on CPUs may hold short floats as integers: `kvjax.cache.bits`.
    """

    values: Any
    scale: jax.Array | None = None
    minimum: jax.Array | None = None
    apart: Apart | None = None


@runtime_checkable
class Codec(Protocol):
    """How a vector becomes bytes. Implementations are frozen dataclasses: equal ones never compile again."""

    def encode(self, x: jax.Array) -> Encoded:
        """x [..., D] in the model's dtype -> its stored form, each vector on its own."""
        ...

    def decode(self, stored: Encoded, dtype: Any) -> jax.Array:
        """The stored form -> [..., D] in `dtype`."""
        ...

    def bytes_per_vector(self, width: int, dtype: Any) -> int:
        """Bytes one vector of `width` elements takes, scales included, in a model of `dtype`."""
        ...
