"""SnapKV: of a prompt, what its last tokens look at (Li et al. 2024, 2404.14469)."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from kvjax.cache.numbers import check_integer
from kvjax.cache.policies.bases import PromptOnly
from kvjax.cache.policies.protocol import RowState, highest_newest
from kvjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class SnapKV(PromptOnly):
    """Keeps of a prompt, per KV head, its last `window` tokens and the budget - window best of the others.

    A token's score is the attention weight it receives from those last tokens, over the query heads of its group,
    averaged over the `kernel` positions around it (section 4; zeros beyond either end, always divided by kernel).
    Prompts of up to `budget` tokens stay whole. What is generated, or given in a further turn, all stays, beside the
    budget, at the positions it would have had.
    """

    budget: int
    window: int = 32
    kernel: int = 5
    rows: Literal["head"] = dataclasses.field(default="head", init=False, repr=False)

    def __post_init__(self) -> None:
        check_integer(self, "window", 1)
        check_integer(self, "kernel", 1)
        check_integer(self, "budget", 1)
        name = type(self).__name__
        if self.budget < self.window:
            raise ConfigError(
                f"{name}.budget must be at least window, whose tokens always stay, got budget={self.budget} and "
                f"window={self.window}"
            )
        if self.kernel % 2 == 0:
            raise ConfigError(f"{name}.kernel must be odd, to reach as far ahead as back, got {self.kernel}")

    def prompt_rows(self, positions: jax.Array, lengths: jax.Array) -> jax.Array:
        """The last `window` rows."""
        return ((positions >= 0) & (positions >= lengths[:, None] - self.window)).astype(jnp.float32)

    def held_of(self, tokens: jax.Array, rows: int) -> jax.Array:
        """How many of a prompt of `tokens` int32[B] stay in each row: int32[B] or [rows, B]."""
        return jnp.minimum(tokens, self.budget)

    def keep(self, state: RowState, position: jax.Array) -> jax.Array:
        """The window, and the best of what is before it."""
        return self._kept(state["score"], position, self.budget - self.window)

    def _kept(self, score: jax.Array, position: jax.Array, others: jax.Array | int) -> jax.Array:
        """bool[r, B, T]: the window and the `others` best before it; all of a prompt within the budget."""
        tokens = jnp.max(position, axis=-1, keepdims=True) + 1
        recent = position >= jnp.maximum(tokens - self.window, 0)
        before = (position >= 0) & ~recent
        pooled = jax.lax.reduce_window(
            jnp.where(before, score, 0.0),
            0.0,
            jax.lax.add,
            window_dimensions=(1, 1, self.kernel),
            window_strides=(1, 1, 1),
            padding=((0, 0), (0, 0), (self.kernel // 2, self.kernel // 2)),
        )
        best = highest_newest(jnp.where(before, pooled / self.kernel, -jnp.inf), position, others)
        return jnp.where(tokens <= self.budget, position >= 0, recent | best)
