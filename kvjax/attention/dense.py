"""Plain causal attention without a cache: the training path."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.attention.context import Context, cross_dense
from kvjax.attention.partial import attend_over, merged
from kvjax.attention.sharded import attention
from kvjax.typing import Held, Rotate, Scoring


@dataclasses.dataclass(frozen=True)
class DenseAttend:
    """Causal attention among the tokens of one call, per-layer windows included; the cache stays as it is.

    It is None, or the `Context` of models with an encoder.

    Attributes:
      windows: per layer, how many positions it sees (None: all); empty: every layer sees all.
      backend: which kernel, None for the best that can serve.
      causal: False: every token sees all others, as in an encoder; then there are no windows.
    """

    windows: tuple[int | None, ...] = ()
    backend: str | None = None
    causal: bool = True

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
        assert v is not None, "without a cache latents are expanded to keys and values"
        part = attention(
            rotate(q, positions),
            rotate(k, positions),
            v,
            causal=self.causal,
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

    def hold(self, cache: Any, layer: int, k: jax.Array, v: jax.Array, positions: jax.Array) -> tuple[Held, Any]:
        """What is held is what is given."""
        return Held(k, v, positions), cache

    def over(
        self, q: jax.Array, k: jax.Array, v: jax.Array, held: jax.Array, positions: jax.Array, rotate: Rotate
    ) -> jax.Array:
        """Causal attention of q [B,T,H,D] at positions to k, v [B,S,K,*] at `held`, unrotated -> [B,T,H,Dv]."""
        return attend_over(q, k, v, held, positions, rotate, self.backend)

    def cross(
        self, cache: Any, q: jax.Array, to_k: jax.Array, to_v: jax.Array, positions: jax.Array
    ) -> jax.Array | None:
        """Makes keys and values of the context, if one is given."""
        return cross_dense(cache, q, to_k, to_v, positions, self.backend) if isinstance(cache, Context) else None

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
