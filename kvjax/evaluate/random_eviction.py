"""RandomEviction: what any policy must beat. For evaluation only; also the example of docs/adding_a_method.md."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from kvjax.cache.numbers import check_integer
from kvjax.cache.policies.bases import Scored
from kvjax.cache.policies.protocol import EMPTY, RowState, highest_newest, oldest_lowest


@dataclasses.dataclass(frozen=True)
class RandomEviction(Scored):
    """Keeps per KV head `budget` tokens, drawn uniformly from all it has seen (reservoir sampling).

    A token draws a lot once, when it is first attended to, and the lowest of budget + 1 leaves after each step. The
    current token is attended beyond the budget. The lot is a hash of the attention weight the token then receives: a
    policy has no other source that differs between sequences, layers and heads, and is the same in every run.
    """

    budget: int
    seed: int = 0
    rows: Literal["head"] = dataclasses.field(default="head", init=False, repr=False)

    def __post_init__(self) -> None:
        check_integer(self, "budget", 1)
        check_integer(self, "seed", 0)

    @property
    def held(self) -> int:
        """Tokens held between steps."""
        return self.budget

    def prompt_rows(self, positions: jax.Array, lengths: jax.Array) -> jax.Array:
        """All: with the last row alone, weights that underflow to 0 would draw equal lots."""
        return (positions >= 0).astype(jnp.float32)

    def observe(self, state: RowState, weights: jax.Array, active: jax.Array) -> RowState:
        """Gives a lot to whatever has none: a slot's score is 0 until then, and again once it is overwritten."""
        new = (state["score"] == 0) & (weights > 0) & active[:, None]
        return {"score": jnp.where(new, self._lot(weights), state["score"])}

    def victims(self, state: RowState, position: jax.Array, length: jax.Array) -> jax.Array:
        """The lowest lot once budget + 1 are held."""
        score = jnp.where(position >= 0, state["score"], jnp.inf)
        return jnp.where(length > self.budget, oldest_lowest(score, position), EMPTY)

    def keep(self, state: RowState, position: jax.Array) -> jax.Array:
        """The `budget` highest lots."""
        return highest_newest(jnp.where(position >= 0, state["score"], -jnp.inf), position, self.budget)

    def _lot(self, weights: jax.Array) -> jax.Array:
        """float32 in (0, 1], from the bits of a float32 (the finaliser of MurmurHash3)."""
        bits = jax.lax.bitcast_convert_type(weights.astype(jnp.float32), jnp.uint32) ^ jnp.uint32(self.seed)
        bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
        bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
        bits = bits ^ (bits >> 16)
        return (bits >> 8).astype(jnp.float32) / 2**24 + 2**-24
