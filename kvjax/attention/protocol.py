"""The `attend` protocol: the one point where a model meets whatever holds its keys and values."""

from __future__ import annotations

from typing import Any, Protocol

import jax

from kvjax.typing import Rotate


class Attend(Protocol):
    """What a forward pass calls: `begin` once, the object itself once per layer, `end` once.

    Implementations are frozen dataclasses, passed as static arguments. `cache` is any pytree, or None.
    """

    def begin(self, cache: Any, tokens: jax.Array, positions: jax.Array) -> Any:
        """tokens, positions int32[B, T]; position -1 marks padding. Returns what is carried through the layers."""
        ...

    def __call__(
        self,
        cache: Any,
        layer: Any,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        positions: jax.Array,
        rotate: Rotate,
    ) -> tuple[jax.Array, Any]:
        """q [B,T,H,D], k [B,T,K,D], v [B,T,K,Dv], unrotated; layer int or int32[] -> out [B,T,H,Dv], the carry."""
        ...

    def end(self, cache: Any) -> Any:
        """After the last layer: lengths have advanced and evictions happen here, the same for every layer."""
        ...
