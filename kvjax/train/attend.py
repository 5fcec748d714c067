"""Causal attention for training: over whole rows, or over rows that hold several documents each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kvjax.attention.context import Context, cross_dense
from kvjax.attention.dense import DenseAttend
from kvjax.attention.partial import merged
from kvjax.attention.sharded import attention
from kvjax.config import ModelConfig
from kvjax.typing import Held, Rotate, Scoring


class Segments(NamedTuple):
    """What stands for the cache where rows are packed: `ids` int32[B, T], tokens of equal ids are one document."""

    ids: jax.Array


class Asked(NamedTuple):
    """What an attention asks of a model beside the text: float32[] that is added to the loss, and numbers to tell."""

    loss: jax.Array
    told: dict[str, jax.Array]


class Reading(NamedTuple):
    """An attention for training, and what stands for its cache.

    Attributes:
      attend: as a `Decoder` takes it.
      carry: (segments int32[B, T] or None, a step's random key, its number) -> what stands for the cache.
      asks: (that, after all layers; the step's number) -> `Asked`; None: it asks for nothing.
    """

    attend: Any
    carry: Callable[[jax.Array | None, jax.Array | None, jax.Array | int], Any]
    asks: Callable[[Any, jax.Array | int], Asked] | None = None


def reading(attend: Any) -> Reading:
    """With an attention that takes `Segments`, or None where each row is one document."""
    return Reading(attend, lambda ids, key, step: None if ids is None else Segments(ids))


def training_attend(config: ModelConfig, accelerator: bool | None = None, backend: str | None = None) -> Any:
    """The quickest attention for training that computes what the model asks for; it takes `Segments` as its cache.

    Args:
      accelerator: whether it runs on one; None: whether the default backend is one.
      backend: which kernel; None: the best that can serve.
    """
    plain = not any(config.windows) and config.attention_soft_cap is None and not config.attention_sinks
    on = jax.default_backend() != "cpu" if accelerator is None else accelerator
    return BlockCausalAttend() if plain and not on else PackedAttend(config.cache_windows, backend)


@dataclasses.dataclass(frozen=True)
class PackedAttend(DenseAttend):
    """Flash attention in the order of a row's tokens, each document of a packed row apart from the others.

    Kernels are told segments and not positions: within a document both order tokens alike.
    """

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
        """q [B,T,H,D], k [B,T,K,D], v [B,T,K,Dv], positions int32[B,T] (used for rotation only) -> out [B,T,H,Dv]."""
        assert v is not None, "without a cache latents are expanded to keys and values"
        part = attention(
            rotate(q, positions),
            rotate(k, positions),
            v,
            window=self._window(layer),
            segment_ids=cache.ids if isinstance(cache, Segments) else None,
            soft_cap=scoring.soft_cap,
            backend=self.backend,
        )
        return merged([part], scoring.sinks)[0], cache


@dataclasses.dataclass(frozen=True)
class BlockCausalAttend:
    """Full causal attention in the order of a row's tokens, without a cache; `Segments` keep documents apart.

    Each block of queries multiplies only the keys up to its own end, so about half of the score matrix is never made,
    and every product is a plain batched matrix product. On a CPU both matter: forward and backward at T = 512
    took a third of the time of one masked [T, T] matrix per head.

    Attributes:
      block: queries per block.
    """

    block: int = 128

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
        write: bool = True,
    ) -> tuple[jax.Array, Any]:
        """q [B,T,H,D], k [B,T,K,D], v [B,T,K,Dv], positions int32[B,T] (used for rotation only) -> out [B,T,H,Dv]."""
        assert v is not None, "without a cache every head has values of its own"
        group = q.shape[2] // k.shape[2]
        q = jnp.swapaxes(rotate(q * q.shape[3] ** -0.5, positions), 1, 2)
        k = jnp.repeat(jnp.swapaxes(rotate(k, positions), 1, 2), group, axis=1)
        v = jnp.repeat(jnp.swapaxes(v, 1, 2), group, axis=1)
        out = []
        for start in range(0, q.shape[2], self.block):
            end = min(start + self.block, q.shape[2])
            scores = jnp.matmul(q[:, :, start:end], jnp.swapaxes(k[:, :, :end], 2, 3))
            seen = jnp.tril(jnp.ones((end - start, end), bool), start)
            if isinstance(cache, Segments):
                seen = seen & (cache.ids[:, None, start:end, None] == cache.ids[:, None, None, :end])
            weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
            out.append(jnp.matmul(weights, v[:, :, :end]))
        return jnp.swapaxes(jnp.concatenate(out, axis=2), 1, 2), cache

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
        """The same attention as a layer's own: what is held is the row itself."""
        return self(None, 0, q, k, v, positions, rotate)[0]

    def cross(
        self, cache: Any, q: jax.Array, to_k: jax.Array, to_v: jax.Array, positions: jax.Array
    ) -> jax.Array | None:
        """Makes keys and values of the context, if one is given."""
        return cross_dense(cache, q, to_k, to_v, positions) if isinstance(cache, Context) else None

    def state(self, cache: Any, layer: int) -> None:
        """Whole texts begin with nothing."""
        return None

    def keep(self, cache: Any, layer: int, state: tuple[jax.Array, ...]) -> Any:
        """Nothing follows."""
        return cache

    def end(self, cache: Any) -> Any:
        """Nothing to finish."""
        return cache
