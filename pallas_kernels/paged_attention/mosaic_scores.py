"""How products become scores."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Scoring:
    """`scale` times the product, then `soft_cap` if any. `windowed`: queries look only so far back."""

    scale: float
    soft_cap: float | None
    windowed: bool

    def __call__(self, products: jax.Array) -> jax.Array:
        """Scores in units of log2, whose exp2 is the exponential that the hardware has."""
        if self.soft_cap is None:
            return products * (self.scale * LOG2_E)
        # tanh by exp2: the hardware's own is off by 5e-4 of the cap, too much for a score.
        turned = jnp.exp2(products * (2.0 * self.scale / self.soft_cap * LOG2_E))
        return (self.soft_cap * LOG2_E) * (1.0 - 2.0 / (1.0 + turned))
