"""What families of policies share, so that a policy's own file holds only its idea."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.cache.policies.protocol import EMPTY, Read, RowState, appended, overlaps


class Positional:
    """Policies that go by position alone and never look at attention weights."""

    @property
    def observes(self) -> bool:
        """No."""
        return False

    def row_state(self, rows: int, batch: int, slots: int) -> RowState:
        """Nothing is remembered."""
        return {}

    def prompt_rows(self, positions: jax.Array, lengths: jax.Array) -> jax.Array:
        """No row is scored: zeros float32[B, T]."""
        return jnp.zeros(positions.shape, jnp.float32)

    def observe(self, state: RowState, weights: jax.Array, active: jax.Array) -> RowState:
        """Weights do not matter."""
        return state

    def victims(self, state: RowState, position: jax.Array, length: jax.Array) -> jax.Array:
        """The position itself names the slot; nothing is marked: -1 int32[R, B]."""
        return jnp.full(length.shape, EMPTY, jnp.int32)


class Scored:
    """Policies that hold a budget of tokens between steps and give each slot a score.

    The current token is attended beyond the budget; after the step one slot is marked, and the next token lands there.
    A subclass says whose score counts (`rows`, `prompt_rows`, `observe`), who leaves (`victims`), who stays (`keep`).
    """

    @property
    def held(self) -> int:
        """Tokens held between steps: the budget."""
        raise NotImplementedError

    @property
    def observes(self) -> bool:
        """Yes: scores come from attention weights."""
        return True

    @property
    def in_order(self) -> bool:
        """No: slots are reused in any order."""
        return False

    @property
    def append_only(self) -> bool:
        """No."""
        return False

    def capacity(self, tokens: int) -> int:
        """The budget and the current token."""
        return min(tokens, self.held + 1)

    def slots(self, length: jax.Array, victim: jax.Array, seen: jax.Array, positions: jax.Array) -> jax.Array:
        """The victim's slot, or behind what is held."""
        behind = appended(length, seen, positions)
        return jnp.where((victim[..., None] >= 0) & (behind >= 0), victim[..., None], behind)

    def touches(self, length: jax.Array, seen: jax.Array, n: jax.Array, starts: jax.Array, page_size: int) -> jax.Array:
        """Any page once slots are reused, before that the open one and new ones."""
        end, capacity = length + n, self.held + 1
        first = jnp.where(end > capacity, 0, length)
        return overlaps(first, jnp.where(n > 0, jnp.minimum(end, capacity), first), starts, page_size)

    def reads(self, window: int | None) -> tuple[Read, ...]:
        """Everything held, within the model's own window."""
        return (Read(window=window),)

    def row_state(self, rows: int, batch: int, slots: int) -> RowState:
        """score float32[R, B, S], 0."""
        return {"score": jnp.zeros((rows, batch, slots), jnp.float32)}
