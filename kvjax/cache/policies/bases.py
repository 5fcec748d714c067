"""What families of policies share, so that a policy's own file holds only its idea."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.cache.policies.optional import first_hole
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


class PromptOnly:
    """Policies that keep of a prompt what its attention picks, and everything that comes after it.

    One row per layer and KV head; a prompt's slots are full from 0 on, later tokens follow. A subclass says how much of
    a prompt stays (`held_of`), by which rows (`prompt_rows`) and what (`keep`).
    """

    @property
    def observes(self) -> bool:
        """Yes: a prompt is chosen from by its attention weights."""
        return True

    @property
    def observes_steps(self) -> bool:
        """No: what comes later stays whatever it weighs."""
        return False

    @property
    def in_order(self) -> bool:
        """No: what is left of a prompt moves together."""
        return False

    @property
    def append_only(self) -> bool:
        """Yes, once the prompt is in."""
        return True

    def capacity(self, tokens: int) -> int:
        """As many slots as tokens: a short prompt stays whole, and all that follows stays."""
        return tokens

    def slots(self, length: jax.Array, victim: jax.Array, seen: jax.Array, positions: jax.Array) -> jax.Array:
        """Behind what is held."""
        return appended(length, seen, positions)

    def held_of(self, tokens: jax.Array, rows: int) -> jax.Array:
        """How many of a prompt of `tokens` int32[B] stay in each row: int32[B] or [rows, B]."""
        raise NotImplementedError

    def touches(self, length: jax.Array, seen: jax.Array, n: jax.Array, starts: jax.Array, page_size: int) -> jax.Array:
        """Of a prompt, pages for what will be kept; then the open page and new ones."""
        added = jnp.where(seen == 0, self.held_of(n, length.shape[0]), n)
        return overlaps(length, length + added, starts, page_size)

    def reads(self, window: int | None) -> tuple[Read, ...]:
        """Everything held, within the model's own window."""
        return (Read(window=window),)

    def row_state(self, rows: int, batch: int, slots: int) -> RowState:
        """Nothing is remembered once the prompt is in."""
        return {}

    def observe(self, state: RowState, weights: jax.Array, active: jax.Array) -> RowState:
        """The prompt's summed weights float32[K, B, T] are its scores."""
        return {"score": weights}

    def victims(self, state: RowState, position: jax.Array, length: jax.Array) -> jax.Array:
        """Nothing is overwritten: -1 int32[R, B]."""
        return jnp.full(length.shape, EMPTY, jnp.int32)


class Emptying(Scored):
    """Scored policies from whose rows several tokens may leave at once (`evicted`), and leave holes.

    Later tokens land in the holes first, one a step.
    """

    def touches(self, length: jax.Array, seen: jax.Array, n: jax.Array, starts: jax.Array, page_size: int) -> jax.Array:
        """Any page from the step on after which tokens leave: what is remembered of theirs changes, too."""
        end, capacity = length + n, self.held + 1
        first = jnp.where((end >= capacity) & (n > 0), 0, length)
        return overlaps(first, jnp.where(n > 0, jnp.minimum(end, capacity), first), starts, page_size)

    def victims(self, state: RowState, position: jax.Array, length: jax.Array) -> jax.Array:
        """The first hole."""
        return first_hole(position, length)


class Growing(Emptying):
    """Policies whose rows have no size that could be told before: pages of a prompt are taken once it is read."""

    @property
    def takes_late(self) -> bool:
        """Yes."""
        return True

    def capacity(self, tokens: int) -> int:
        """As many slots as tokens, should everything stay."""
        return tokens

    def touches(self, length: jax.Array, seen: jax.Array, n: jax.Array, starts: jax.Array, page_size: int) -> jax.Array:
        """None for a prompt; then any page, for holes may be anywhere, and new ones."""
        end = jnp.where((seen > 0) & (n > 0), length + n, 0)
        return overlaps(jnp.zeros_like(length), end, starts, page_size)
