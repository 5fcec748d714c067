"""From logits to numbers: device functions per token, and estimates with their standard errors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over independent questions.

    Attributes:
      value: the mean. count: of how many.
      error: its standard error; None for a single one.
    """

    value: float
    error: float | None
    count: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def mean_of(values: Any) -> Estimate:
    """The mean of one number per question [n], with the standard error of independent draws.

    Of zeros and ones that is the square root of p (1 - p) / (n - 1).
    """
    array = np.asarray(values, np.float64)
    error = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else None
    return Estimate(float(array.mean()), error, len(array))


def perplexity_of(nats: Estimate) -> Estimate:
    """exp of a mean loss; the error to first order."""
    value = math.exp(nats.value)
    return Estimate(value, None if nats.error is None else value * nats.error, nats.count)


@jax.jit
def likeliest(logits: jax.Array) -> jax.Array:
    """float32[..., V] -> int32[...]."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@jax.jit
def log_probabilities(logits: jax.Array) -> jax.Array:
    """float32[..., V] -> float32[..., V]."""
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)


@jax.jit
def compared(
    found: jax.Array, reference: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Log-probabilities of two caches, float32[..., V] each, on the tokens int32[...] that really follow.

    Returns:
      float32[...] nats of `found`, nats of `reference`, KL(reference || found), in nats; bool[...] whether their
      likeliest tokens are the same. The divergence of equal values is exactly 0.
    """
    losses = [-jnp.take_along_axis(x, targets[..., None], axis=-1)[..., 0] for x in (found, reference)]
    divergence = jnp.sum(jnp.exp(reference) * (reference - found), axis=-1)
    same = jnp.argmax(found, axis=-1) == jnp.argmax(reference, axis=-1)
    # Rounding may leave something just below 0, which no divergence is.
    return losses[0], losses[1], jnp.maximum(divergence, 0.0), same


def first_mistake(right: np.ndarray) -> int:
    """How many tokens greedy decoding gets right before its first mistake: bool[n] -> 0 .. n."""
    wrong = np.flatnonzero(~np.asarray(right, bool))
    return int(wrong[0]) if wrong.size else len(right)
