"""Scissorhands: drop, many at once, what has mattered least often of late (Liu et al. 2023, 2305.17118)."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from kvjax.cache.numbers import check_integer
from kvjax.cache.policies.bases import Emptying
from kvjax.cache.policies.optional import Attended, Rows
from kvjax.cache.policies.protocol import RowState, highest_newest
from kvjax.errors import ConfigError

WORD = 32


@dataclasses.dataclass(frozen=True)
class Scissorhands(Emptying):
    """Keeps up to `budget` tokens per KV head; once there are more, `drop` of them leave together.

    A row of attention finds a token unimportant if its weight, averaged over the group, is below 1 / tokens attended;
    what the model's own window hides from the row has none. Those leave that most of the last `history` rows found
    unimportant, the older one first among equals; the `recent` newest, the current one included, are spared (algorithm
    2). The current token is attended beyond the budget. Of a prompt, its last `history` rows decide what of it stays,
    `budget` tokens. What each row found is remembered in one bit per slot: history / 8 bytes.

    Attributes:
      drop: None: half the budget, or as many as are not spared if these are fewer.
    """

    budget: int
    recent: int
    history: int = 400
    drop: int | None = None
    rows: Literal["head"] = dataclasses.field(default="head", init=False, repr=False)

    def __post_init__(self) -> None:
        check_integer(self, "budget", 1)
        check_integer(self, "recent", 0)
        check_integer(self, "history", 1)
        if self.recent > self.budget:
            raise ConfigError(
                f"Scissorhands.recent must be at most budget, got recent={self.recent} and budget={self.budget}"
            )
        if self.drop is None:
            object.__setattr__(self, "drop", max(1, min(self.budget // 2, self._droppable)))
        check_integer(self, "drop", 1)
        if self._drop > self._droppable:
            raise ConfigError(
                f"Scissorhands.drop must be at most budget + 1 - recent = {self._droppable}, for the recent are "
                f"spared, got {self.drop}"
            )

    @property
    def held(self) -> int:
        """Most tokens held between steps."""
        return self.budget

    def row_state(self, rows: int, batch: int, slots: int) -> RowState:
        """low uint32[R, B, S, words]: a ring of bits, one per row of attention; set: it found the token unimportant."""
        return {"low": jnp.zeros((rows, batch, slots, -(-self.history // WORD)), jnp.uint32)}

    def observe_row(self, state: RowState, weights: jax.Array, active: jax.Array, attended: Attended) -> RowState:
        """The current row's bit of every slot."""
        seen, step = jnp.sum(attended.position >= 0, axis=-1), jnp.max(attended.position, axis=-1)
        # Slots that hold nothing get a bit as well: they are blank again before they hold something.
        found = _unimportant(weights, seen, attended.heads)
        return {"low": self._written(state["low"], found, step, active & (step >= 0))}

    def prompt_rows(self, positions: jax.Array, lengths: jax.Array) -> jax.Array:
        """The last `history` rows."""
        return self.counts_rows(positions, lengths).astype(jnp.float32)

    def observe(self, state: RowState, weights: jax.Array, active: jax.Array) -> RowState:
        """Weights alone do not say what they were over: `observe_row` does."""
        raise NotImplementedError

    def blank_tally(self, heads: int, batch: int, tokens: int) -> RowState:
        """No row has been seen."""
        return self.row_state(heads, batch, tokens)

    def counts_rows(self, queries: jax.Array, lengths: jax.Array) -> jax.Array:
        """The last `history`."""
        return (queries >= 0) & (queries >= lengths[:, None] - self.history)

    def add_rows(self, tally: RowState, rows: Rows) -> RowState:
        """Row by row, as if the tokens had come alone."""
        counts = self.counts_rows(rows.queries, rows.lengths)

        def one(low: jax.Array, row: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            weights, seen, step, counted = row
            before = (rows.keys >= 0) & (rows.keys <= step[:, None])
            found = _unimportant(weights, seen, rows.heads) & before
            return self._written(low, found, step, counted), None

        each = (jnp.moveaxis(rows.weights, 2, 0), jnp.sum(rows.seen, axis=2).T, rows.queries.T, counts.T)
        return {"low": jax.lax.scan(one, tally["low"], each)[0]}

    def evicted(self, state: RowState, position: jax.Array, length: jax.Array) -> jax.Array:
        """`drop` of a row with more than `budget`."""
        held = jnp.sum(position >= 0, axis=-1, keepdims=True)
        over = held > self.budget

        def chosen() -> jax.Array:
            spared = self._best(state, position, held - self._drop)
            return over & (position >= 0) & ~spared

        return jax.lax.cond(jnp.any(over), chosen, lambda: jnp.zeros(position.shape, bool))

    def keep(self, state: RowState, position: jax.Array) -> jax.Array:
        """All of a prompt within the budget; else the newest and the best of the others."""
        tokens = jnp.sum(position >= 0, axis=-1, keepdims=True)
        return self._best(state, position, jnp.minimum(tokens, self.budget))

    @property
    def _drop(self) -> int:
        assert self.drop is not None
        return self.drop

    @property
    def _droppable(self) -> int:
        return self.budget + 1 - self.recent

    def _best(self, state: RowState, position: jax.Array, count: jax.Array) -> jax.Array:
        """bool[..., S]: the `recent` newest, and what was least often unimportant, `count` together."""
        newest = jnp.max(position, axis=-1, keepdims=True)
        recent = (position >= 0) & (position > newest - self.recent)
        others = (position >= 0) & ~recent
        unimportant = jnp.sum(jax.lax.population_count(state["low"]), axis=-1).astype(jnp.float32)
        room = count - jnp.sum(recent, axis=-1, keepdims=True)
        return recent | highest_newest(jnp.where(others, -unimportant, -jnp.inf), position, room)

    def _written(self, low: jax.Array, found: jax.Array, step: jax.Array, active: jax.Array) -> jax.Array:
        """low uint32[K, B, S, words] with the bit of step int32[..., B] as found bool[K, B, S] says, where active."""
        place = step % self.history
        bit = (jnp.uint32(1) << (place % WORD).astype(jnp.uint32))[..., None, None]
        word = jnp.arange(low.shape[-1]) == (place // WORD)[..., None]
        here = (word & active[..., None])[..., None, :]
        return jnp.where(here, (low & ~bit) | jnp.where(found[..., None], bit, jnp.uint32(0)), low)


def _unimportant(weights: jax.Array, seen: jax.Array, heads: int) -> jax.Array:
    """Which weights float32[K, B, S], summed over a group, are below an even share of seen int32[..., B] tokens."""
    return weights / heads < 1 / jnp.maximum(seen, 1)[..., None]
