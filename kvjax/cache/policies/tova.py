"""TOVA: drop what the current token looks at least (Oren et al. 2024, 2401.06104)."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from kvjax.cache.policies.protocol import (
    EMPTY,
    Read,
    RowState,
    appended,
    highest_newest,
    oldest_lowest,
    overlaps,
)
from kvjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class TOVA:
    """Keeps `budget` tokens, one set per layer: after each step the lowest of budget + 1 leaves.

    A slot's score is the current row of attention weights, averaged over all query heads. The current token is attended
    beyond the budget and may itself be the one to leave. Of a prompt, the `budget` highest of its last row stay.
    Ties: the newer token stays.
    """

    budget: int
    rows: Literal["layer"] = dataclasses.field(default="layer", init=False, repr=False)
    observes: bool = dataclasses.field(default=True, init=False, repr=False)
    in_order: bool = dataclasses.field(default=False, init=False, repr=False)
    append_only: bool = dataclasses.field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.budget, int) or self.budget < 1:
            raise ConfigError(f"TOVA.budget must be an integer of at least 1, got {self.budget!r}")

    def capacity(self, tokens: int) -> int:
        """The budget and the current token."""
        return min(tokens, self.budget + 1)

    def slots(self, length: jax.Array, victim: jax.Array, seen: jax.Array, positions: jax.Array) -> jax.Array:
        """The victim's slot, or behind what is held."""
        behind = appended(length, seen, positions)
        return jnp.where((victim[..., None] >= 0) & (behind >= 0), victim[..., None], behind)

    def touches(self, length: jax.Array, seen: jax.Array, n: jax.Array, starts: jax.Array, page_size: int) -> jax.Array:
        """Any page once slots are reused, before that the open one and new ones."""
        return touches_any(length, n, self.budget + 1, starts, page_size)

    def reads(self, window: int | None) -> tuple[Read, ...]:
        """Everything held, within the model's own window."""
        return (Read(window=window),)

    def row_state(self, rows: int, batch: int, slots: int) -> RowState:
        """score: the last row of weights."""
        return {"score": jnp.zeros((rows, batch, slots), jnp.float32)}

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


def touches_any(length: jax.Array, n: jax.Array, capacity: int, starts: jax.Array, page_size: int) -> jax.Array:
    """Pages that n tokens may write when a full row reuses any slot: bool[R, B, N]."""
    end = length + n
    first = jnp.where(end > capacity, 0, length)
    return overlaps(first, jnp.where(n > 0, jnp.minimum(end, capacity), first), starts, page_size)
