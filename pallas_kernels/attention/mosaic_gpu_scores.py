"""Scores, probabilities and their slopes, as the forward and the backward kernels compute them from q k^T."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper

ROWS = 64
"""Rows of one consumer warpgroup: what one wgmma takes."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """How q k^T becomes a score.

    Attributes:
      scale: what it is multiplied by. soft_cap: scores become cap * tanh(scores / cap).
    """

    scale: float
    soft_cap: float | None

    @property
    def unit(self) -> float:
        """What turns the result of `capped` into scores in units of log2, for exp2."""
        return (self.scale if self.soft_cap is None else self.soft_cap) * hopper.LOG2_E

    def capped(self, raw: jax.Array) -> jax.Array:
        """q k^T as it is, or the tanh if there is a cap: through exp2, as the hardware's own keeps 11 bits only."""
        if self.soft_cap is None:
            return raw
        # A division takes more registers and instructions than the square of a reciprocal square root.
        root = lax.rsqrt(jnp.exp2(raw * (2.0 * hopper.LOG2_E * self.scale / self.soft_cap)) + 1.0)
        return 1.0 - 2.0 * root * root

    def probabilities(self, raw: jax.Array, lse: jax.Array, seen: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """From q k^T and the log-sum-exp in log2 (+inf where nothing is seen), both of one shape.

        Returns the probabilities p and the slope p * d score / d (scale * q k^T), which is p if there is no cap.
        """
        values = self.capped(raw)
        exponent = values * self.unit - lse
        p = jnp.exp2(exponent if seen is None else jnp.where(seen, exponent, -jnp.inf))
        return p, p if self.soft_cap is None else p * (1.0 - values * values)
