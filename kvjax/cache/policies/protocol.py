"""What a policy must provide. Everything is a pure function of small integer arrays; none touches keys or values.

(Policies that merge do: `optional.py`.)

Eviction is where the next token lands: a window, a ring with sinks, TOVA and H2O differ only in the slot they name.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

RowState = dict[str, jax.Array]
"""What a policy remembers per slot, name -> [R, B, S, ...]; it follows slots through fork, release and snapshot."""

EMPTY = -1
"""The position of a slot that holds nothing, and the slot of a token that is not stored."""


@dataclasses.dataclass(frozen=True)
class Read:
    """One partial result of a step: which tokens it covers and where the query is turned to. A step merges all of them.

    Attributes:
      first, last: token positions covered, [first, last); last None: no end.
      turn: the query is rotated to min(its position, turn); None: to its position.
      window: only positions less than this far behind the query; None: all.
      slots: the tokens covered lie in the first `slots` slots, so that only their pages need be read; None: anywhere.
      lag: each token covered is read by a query turned to at most this far ahead of it; None: by one query for all.
        Needs `last`.
    """

    first: int = 0
    last: int | None = None
    turn: int | None = None
    window: int | None = None
    slots: int | None = None
    lag: int | None = None


@runtime_checkable
class Policy(Protocol):
    """Which slot a new token takes, and what is kept of a prompt. Implementations are frozen dataclasses.

    Shapes: R rows, B sequences, S slots, T tokens, N pages, K KV heads. `length` int32[R, B]: slots in use; `victim`
    int32[R, B]: the slot the next token overwrites, -1 to append; `seen` int32[B]: tokens a sequence has had.
    """

    @property
    def rows(self) -> Literal["shared", "layer", "head"]:
        """Who keeps the same tokens: all layers and heads, the heads of a layer, or each (layer, head) its own."""
        ...

    @property
    def observes(self) -> bool:
        """Needs attention weights: then a prompt is prefilled layer by layer and further tokens come one at a time."""
        ...

    @property
    def in_order(self) -> bool:
        """Slot index equals token position, so that reads need no positions."""
        ...

    @property
    def append_only(self) -> bool:
        """No slot is ever overwritten."""
        ...

    def capacity(self, tokens: int) -> int:
        """Slots a row needs at most while a sequence grows to `tokens` tokens."""
        ...

    def slots(self, length: jax.Array, victim: jax.Array, seen: jax.Array, positions: jax.Array) -> jax.Array:
        """Where the tokens at positions int32[B, T] land (padding: position -1): int32[R, B, T], -1: not stored.

        No two tokens of one call may land in the same slot.
        """
        ...

    def touches(self, length: jax.Array, seen: jax.Array, n: jax.Array, starts: jax.Array, page_size: int) -> jax.Array:
        """Which pages the next n int32[B] tokens may write: bool[R, B, N]; page j begins at slot starts[j]."""
        ...

    def reads(self, window: int | None) -> tuple[Read, ...]:
        """The partial results of a step, in a layer whose model sees `window` positions (None: all)."""
        ...

    def row_state(self, rows: int, batch: int, slots: int) -> RowState:
        """What is remembered per slot, empty."""
        ...

    def prompt_rows(self, positions: jax.Array, lengths: jax.Array) -> jax.Array:
        """How much each prompt row counts in a slot's score: float32[B, T]. Only if `observes`."""
        ...

    def observe(self, state: RowState, weights: jax.Array, active: jax.Array) -> RowState:
        """Takes in one step's weights float32[K, B, S], summed over each group, for one layer's rows [K or 1, B, S].

        active bool[B]: sequences that had a token this step. Also called once with the prompt's summed weights.
        """
        ...

    def victims(self, state: RowState, position: jax.Array, length: jax.Array) -> jax.Array:
        """After a step: the slot the next token overwrites, int32[R, B], -1 while there is room."""
        ...

    def keep(self, state: RowState, position: jax.Array) -> jax.Array:
        """After a prompt: which of its tokens stay, bool[R, B, T]; position -1 is padding. Only if `observes`."""
        ...


def appended(length: jax.Array, seen: jax.Array, positions: jax.Array) -> jax.Array:
    """Slots of tokens that go behind what is held: int32[R, B, T]."""
    rank = positions - seen[:, None]
    return jnp.where(positions >= 0, length[..., None] + rank, EMPTY)


def overlaps(first: jax.Array, last: jax.Array, starts: jax.Array, page_size: int) -> jax.Array:
    """Whether slots [first, last), each [...], touch the page from starts[j]: bool[..., N]."""
    first, last = first[..., None], last[..., None]
    return (first < starts + page_size) & (last > starts) & (first < last)


def smallest_of(*windows: int | None) -> int | None:
    """The narrowest of several windows; None is no window."""
    return min((w for w in windows if w is not None), default=None)


def oldest_lowest(score: jax.Array, position: jax.Array) -> jax.Array:
    """The slot with the lowest score, among equals the oldest token: [..., S] -> int32[...].

    Slots that may not be taken have score +inf.
    """
    lowest = jnp.min(score, axis=-1, keepdims=True)
    age = jnp.where(score == lowest, position, jnp.iinfo(jnp.int32).max)
    return jnp.argmin(age, axis=-1).astype(jnp.int32)


def highest_newest(score: jax.Array, position: jax.Array, count: jax.Array | int) -> jax.Array:
    """Marks the `count` highest scores, among equals the newest: score, position [..., T] -> bool[..., T].

    Tokens that may not be chosen have score -inf, and are never marked.
    """
    order = jnp.lexsort((-position, -score), axis=-1)
    rank = jnp.argsort(order, axis=-1)
    return (rank < count) & (score > -jnp.inf)
