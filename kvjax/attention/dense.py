"""Plain causal attention without a cache: the training path."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.attention.partial import merged
from kvjax.typing import Rotate, Scoring
from pallas_kernels import attention


@dataclasses.dataclass(frozen=True)
class DenseAttend:
    """Causal attention among the tokens of one call, per-layer windows included; the cache stays as it is (None).

    Attributes:
      windows: per layer, how many positions it sees (None: all); empty: every layer sees all.
      backend: which kernel, None for the best that can serve.
    """

    windows: tuple[int | None, ...] = ()
    backend: str | None = None

    def begin(self, cache: Any, tokens: jax.Array, positions: jax.Array) -> Any:
        """Nothing to prepare."""
        return cache

    def __call__(
        self,
        cache: Any,
        layer: Any,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array | None,
        positions: jax.Array,
        rotate: Rotate,
        *,
        scoring: Scoring = Scoring(),
        write: bool = True,
    ) -> tuple[jax.Array, Any]:
        """q [B,T,H,D], k [B,T,K,D], v [B,T,K,Dv], positions int32[B,T] -> out [B,T,H,Dv]."""
        assert v is not None, "without a cache every head has values of its own"
        part = attention(
            rotate(q, positions),
            rotate(k, positions),
            v,
            causal=True,
            window=self._window(layer),
            positions=positions,
            q_positions=positions,
            soft_cap=scoring.soft_cap,
            backend=self.backend,
        )
        return merged([part], scoring.sinks)[0], cache

    def put(
        self, cache: Any, layer: Any, k: jax.Array, v: jax.Array | None, positions: jax.Array, rotate: Rotate
    ) -> Any:
        """Nothing to store: readers are given the keys and values."""
        return cache

    def state(self, cache: Any, layer: int) -> None:
        """Whole texts begin with nothing."""
        return None

    def keep(self, cache: Any, layer: int, state: tuple[jax.Array, ...]) -> Any:
        """Nothing follows."""
        return cache

    def end(self, cache: Any) -> Any:
        """Nothing to finish."""
        return cache

    def _window(self, layer: Any) -> jax.Array | int | None:
        if not any(self.windows):
            return None
        if isinstance(layer, int):
            return self.windows[layer]
        # A scan over layers has one body: the window becomes data.
        every = [jnp.iinfo(jnp.int32).max if w is None else w for w in self.windows]
        return jnp.asarray(every, jnp.int32)[layer]
