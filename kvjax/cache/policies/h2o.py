"""H2O: keep the heavy hitters and the newest (Zhang et al. 2023, 2306.14048)."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from kvjax.cache.numbers import check_integer
from kvjax.cache.policies.bases import Scored
from kvjax.cache.policies.protocol import EMPTY, RowState, highest_newest, oldest_lowest
from kvjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class H2O(Scored):
    """Keeps per KV head the `recent` newest tokens and the `heavy` highest of the others.

    A slot's score is all the attention weight it has received so far, over the query heads of its group, its own first
    row included; never divided by a count, and forgotten when it is dropped. Once heavy + recent + 1 are held, the
    lowest outside the `recent` newest (the current token is the newest) leaves after the step. Ties: the newer stays.
    """

    heavy: int
    recent: int
    rows: Literal["head"] = dataclasses.field(default="head", init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("heavy", "recent"):
            check_integer(self, name, 0)
        if self.heavy + self.recent < 1:
            raise ConfigError("H2O must keep something: heavy + recent is 0")

    @property
    def held(self) -> int:
        """Tokens held between steps."""
        return self.heavy + self.recent

    def prompt_rows(self, positions: jax.Array, lengths: jax.Array) -> jax.Array:
        """Every prompt row counts."""
        return (positions >= 0).astype(jnp.float32)

    def observe(self, state: RowState, weights: jax.Array, active: jax.Array) -> RowState:
        """The new row adds to the sum; a sequence without a token this step adds nothing."""
        return {"score": state["score"] + jnp.where(active[:, None], weights, 0.0)}

    def victims(self, state: RowState, position: jax.Array, length: jax.Array) -> jax.Array:
        """The lowest score outside the newest, once heavy + recent + 1 are held."""
        score = jnp.where(self._outside_recent(position), state["score"], jnp.inf)
        return jnp.where(length > self.held, oldest_lowest(score, position), EMPTY)

    def keep(self, state: RowState, position: jax.Array) -> jax.Array:
        """The newest, and the highest of the others."""
        outside = self._outside_recent(position)
        heavy = highest_newest(jnp.where(outside, state["score"], -jnp.inf), position, self.heavy)
        return heavy | ((position >= 0) & ~outside)

    def _outside_recent(self, position: jax.Array) -> jax.Array:
        """bool[..., S]: held, and not among the `recent` newest. The newest are always held, so they are the last."""
        newest = jnp.max(position, axis=-1, keepdims=True)
        return (position >= 0) & (position <= newest - self.recent)
