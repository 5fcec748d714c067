"""PyramidKV: SnapKV with more of the budget in lower layers (Cai et al. 2024, 2406.02069)."""

from __future__ import annotations

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache.numbers import check_integer
from kvjax.cache.policies.protocol import RowState
from kvjax.cache.policies.snapkv import SnapKV
from kvjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class PyramidKV(SnapKV):
    """Keeps of a prompt what SnapKV would, on a budget that falls from layer to layer in equal steps.

    Beside the window, of b = budget - window tokens on average, the last layer has b // beta and the first as much more
    than b as the last has less; no layer more than there are. Layer i of l has first - i * ((first - last) // (l - 1)):
    rounding makes the sum somewhat larger than l budgets. Layers are those of the model that have keys and values,
    whichever of them this policy rules. Prompts of fewer than 2 b tokens are shared out evenly, as by SnapKV.
    """

    window: int = 8
    kernel: int = 5
    beta: int = 20
    layers: tuple[int, ...] = dataclasses.field(default=(), init=False, repr=False)
    total: int = dataclasses.field(default=1, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "beta", 1)
        if self.budget == self.window:
            raise ConfigError(
                f"PyramidKV.budget must be more than window, to have tokens to share out, got {self.budget} for both; "
                "SnapKV keeps a window alone"
            )

    def placed(self, layers: tuple[int, ...], total: int) -> PyramidKV:
        """The policy as it rules these of a model's `total` layers."""
        known = copy.copy(self)
        object.__setattr__(known, "layers", layers)
        object.__setattr__(known, "total", total)
        return known

    def held_of(self, tokens: jax.Array, rows: int) -> jax.Array:
        """int32[rows, B]: how many of a prompt of `tokens` int32[B] stay in each row."""
        depth = np.repeat(np.asarray(self.layers, np.int32), rows // len(self.layers))[:, None]
        held = self._others(depth, tokens) + self.window
        return jnp.where(tokens <= self.budget, tokens, jnp.minimum(tokens, held))

    def settle(self, state: RowState, position: jax.Array, index: int | jax.Array) -> RowState:
        """others int32[r, B]: how many stay beside the window in the layer at `index` of its group."""
        tokens = jnp.max(position, axis=-1) + 1
        return {"others": self._others(jnp.asarray(self.layers, jnp.int32)[index], tokens)}

    def keep(self, state: RowState, position: jax.Array) -> jax.Array:
        """The window, and as many of the best before it as this layer may."""
        return self._kept(state["score"], position, state["others"][..., None])

    def _others(self, depth: jax.Array | np.ndarray, tokens: jax.Array) -> jax.Array:
        """How many tokens beside the window layer `depth` keeps of a prompt of `tokens`."""
        mean = self.budget - self.window
        least, room = mean // self.beta, tokens - self.window
        capped = 2 * mean - least >= room
        last = jnp.where(capped, 2 * mean - room, least)
        first = jnp.where(capped, room, 2 * mean - least)
        step = (first - last) // max(self.total - 1, 1)
        even = (tokens < 2 * mean) | (self.total == 1)
        return jnp.where(even, mean, first - depth * step)
