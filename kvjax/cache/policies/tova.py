"""TOVA: drop what the current token looks at least (Oren et al. 2024, 2401.06104)."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from kvjax.cache.numbers import check_integer
from kvjax.cache.policies.bases import Scored
from kvjax.cache.policies.protocol import EMPTY, RowState, highest_newest, oldest_lowest


@dataclasses.dataclass(frozen=True)
class TOVA(Scored):
    """Keeps `budget` tokens, one set per layer: after each step the lowest of budget + 1 leaves.

    A slot's score is the current row of attention weights, averaged over all query heads. The current token is attended
    beyond the budget and may itself be the one to leave. Of a prompt, the `budget` highest of its last row stay.
    Ties: the newer token stays.
    """

    budget: int
    rows: Literal["layer"] = dataclasses.field(default="layer", init=False, repr=False)

    def __post_init__(self) -> None:
        check_integer(self, "budget", 1)

    @property
    def held(self) -> int:
        """Tokens held between steps."""
        return self.budget

    def prompt_rows(self, positions: jax.Array, lengths: jax.Array) -> jax.Array:
        """Only a prompt's last row counts."""
        return (positions == lengths[:, None] - 1).astype(jnp.float32)

    def observe(self, state: RowState, weights: jax.Array, active: jax.Array) -> RowState:
        """The current row replaces the one before. The mean over heads has the same order as their sum."""
        row = jnp.sum(weights, axis=0, keepdims=True)
        return {"score": jnp.where(active[:, None], row, state["score"])}

    def victims(self, state: RowState, position: jax.Array, length: jax.Array) -> jax.Array:
        """The lowest score once budget + 1 are held."""
        score = jnp.where(position >= 0, state["score"], jnp.inf)
        return jnp.where(length > self.budget, oldest_lowest(score, position), EMPTY)

    def keep(self, state: RowState, position: jax.Array) -> jax.Array:
        """The `budget` highest."""
        return highest_newest(jnp.where(position >= 0, state["score"], -jnp.inf), position, self.budget)
