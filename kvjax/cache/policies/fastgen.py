"""FastGen: each head keeps the least that recovers its attention (Ge et al. 2023, 2310.01801)."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from kvjax.cache.numbers import ceil_share, check_number
from kvjax.cache.policies.bases import Growing
from kvjax.cache.policies.optional import Attended, Rows
from kvjax.cache.policies.protocol import RowState, highest_newest
from kvjax.errors import ConfigError

SPECIAL, PUNCTUATION, FREQUENT, LOCAL, EVERYTHING = range(5)
"""What a head keeps: each also what those before it do."""


@dataclasses.dataclass(frozen=True)
class FastGen(Growing):
    """Each KV head keeps the first of five growing sets that recovers enough of its attention to the prompt.

    Special tokens; and punctuation; and the `frequent` share of the prompt's tokens that have received most attention;
    and the `local` share that is newest; or everything (section 3). A set recovers, of a prompt row, the attention to
    what of it the row sees (the newest being those up to the row) and to the row's own token; this is averaged over
    rows and over the query heads of the group and compared with `recovery`, which above 1 nothing but everything meets.

    A head stays with its choice: special tokens and punctuation that come later stay where they would have, the
    frequent and the local part keep the sizes that the prompt settled, and most frequent is what has received most
    attention so far. The current token is attended beside them; what is in no part any more leaves after the step.

    Attributes:
      frequent, local: shares of the prompt, rounded up.
      special, punctuation: token ids; one in both is special.
    """

    recovery: float = 0.95
    frequent: float = 0.3
    local: float = 0.3
    special: tuple[int, ...] = ()
    punctuation: tuple[int, ...] = ()
    rows: Literal["head"] = dataclasses.field(default="head", init=False, repr=False)

    def __post_init__(self) -> None:
        check_number(self, "recovery", 0)
        check_number(self, "frequent", 0, 1)
        check_number(self, "local", 0, 1)
        for name in ("special", "punctuation"):
            given = getattr(self, name)
            try:
                ids = tuple(sorted({int(token) for token in given}))
            except (TypeError, ValueError) as error:
                raise ConfigError(f"FastGen.{name} must be a collection of token ids, got {given!r}") from error
            if any(token < 0 for token in ids):
                raise ConfigError(f"FastGen.{name} must be token ids of at least 0, got {ids[0]}")
            object.__setattr__(self, name, ids)

    def row_state(self, rows: int, batch: int, slots: int) -> RowState:
        """score float32[R, B, S], attention received so far; kind int8[R, B, S], 2 special, 1 punctuation, 0 other."""
        shape = (rows, batch, slots)
        return {"score": jnp.zeros(shape, jnp.float32), "kind": jnp.zeros(shape, jnp.int8)}

    def settled_state(self, rows: int, batch: int) -> RowState:
        """choice, frequent, local int32[R, B]: which set, and how many tokens its parts have."""
        return {name: jnp.zeros((rows, batch), jnp.int32) for name in ("choice", "frequent", "local")}

    def arrivals(self, tokens: jax.Array) -> RowState:
        """kind int8[B, T]."""

        def among(ids: tuple[int, ...]) -> jax.Array:
            return jnp.any(tokens[..., None] == jnp.asarray(ids, jnp.int32), axis=-1)

        kind = jnp.where(among(self.special), 2, jnp.where(among(self.punctuation), 1, 0))
        return {"kind": kind.astype(jnp.int8)}

    def observe(self, state: RowState, weights: jax.Array, active: jax.Array) -> RowState:
        """Weights alone do not say over how many heads they are summed: `observe_row` does."""
        raise NotImplementedError

    def observe_row(self, state: RowState, weights: jax.Array, active: jax.Array, attended: Attended) -> RowState:
        """The new row, averaged over the group, adds to the sum."""
        return {**state, "score": state["score"] + jnp.where(active[:, None], weights / attended.heads, 0.0)}

    def prompt_rows(self, positions: jax.Array, lengths: jax.Array) -> jax.Array:
        """Every prompt row counts."""
        return (positions >= 0).astype(jnp.float32)

    def blank_tally(self, heads: int, batch: int, tokens: int) -> RowState:
        """float32[K, B, T] of attention received: score, in all; own, from itself; far, by rows it is not local to."""
        return {name: jnp.zeros((heads, batch, tokens), jnp.float32) for name in ("score", "own", "far")}

    def add_rows(self, tally: RowState, rows: Rows) -> RowState:
        """Each row adds its weights, averaged over the group, to three sums."""
        distance = rows.queries[:, :, None] - rows.keys[:, None, :]
        # A row's own token counts in any case.
        local = jnp.maximum(ceil_share(self.local, rows.lengths), 1)[:, None, None]

        def received(which: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(which & rows.seen, rows.weights, 0.0), axis=2)

        sums = {"score": received(distance >= 0), "own": received(distance == 0), "far": received(distance >= local)}
        return {name: tally[name] + value / rows.heads for name, value in sums.items()}

    def settle(self, state: RowState, position: jax.Array, index: int | jax.Array) -> RowState:
        """The first set that recovers enough, of each row."""
        tokens = jnp.max(position, axis=-1) + 1
        sizes = {"frequent": ceil_share(self.frequent, tokens), "local": ceil_share(self.local, tokens)}
        held = position >= 0
        found = []
        for choice in (SPECIAL, PUNCTUATION, FREQUENT):
            kept = self._parts(state, sizes, jnp.full_like(tokens, choice), position)
            found.append(jnp.sum(jnp.where(held, jnp.where(kept, state["score"], state["own"]), 0.0), axis=-1))
        # What is local to a row is recovered with it; beyond, what is in another part.
        far = jnp.where(kept, 0.0, state["far"])
        found.append(jnp.sum(jnp.where(held, state["score"] - far, 0.0), axis=-1))
        enough = jnp.stack(found) >= self.recovery * jnp.maximum(tokens, 1)
        first = jnp.where(jnp.any(enough, axis=0), jnp.argmax(enough, axis=0), EVERYTHING)
        return {"choice": first.astype(jnp.int32), **sizes}

    def keep(self, state: RowState, position: jax.Array) -> jax.Array:
        """The chosen parts of a prompt."""
        return self._parts(state, state, state["choice"], position)

    def evicted(self, state: RowState, position: jax.Array, length: jax.Array) -> jax.Array:
        """What is in no chosen part any more."""
        return (position >= 0) & ~self._parts(state, state, state["choice"], position)

    def _parts(self, state: RowState, sizes: RowState, choice: jax.Array, position: jax.Array) -> jax.Array:
        """bool[..., S]: what a choice int32[...] keeps."""
        held, choice = position >= 0, choice[..., None]
        newest = jnp.max(position, axis=-1, keepdims=True)
        frequent = highest_newest(jnp.where(held, state["score"], -jnp.inf), position, sizes["frequent"][..., None])
        local = position > newest - sizes["local"][..., None]
        kept = (state["kind"] == 2) | ((choice >= PUNCTUATION) & (state["kind"] == 1))
        kept = kept | ((choice >= FREQUENT) & frequent) | ((choice >= LOCAL) & local) | (choice == EVERYTHING)
        return kept & held
