"""Full: nothing is ever dropped."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax

from kvjax.cache.policies.bases import Positional
from kvjax.cache.policies.protocol import Read, RowState, appended, overlaps


@dataclasses.dataclass(frozen=True)
class Full(Positional):
    """Every token stays; slot index equals position. One row for all layers and heads."""

    rows: Literal["shared"] = dataclasses.field(default="shared", init=False, repr=False)
    in_order: bool = dataclasses.field(default=True, init=False, repr=False)
    append_only: bool = dataclasses.field(default=True, init=False, repr=False)

    def capacity(self, tokens: int) -> int:
        """As many slots as tokens."""
        return tokens

    def slots(self, length: jax.Array, victim: jax.Array, seen: jax.Array, positions: jax.Array) -> jax.Array:
        """Behind what is held."""
        return appended(length, seen, positions)

    def touches(self, length: jax.Array, seen: jax.Array, n: jax.Array, starts: jax.Array, page_size: int) -> jax.Array:
        """The open page and new ones."""
        return overlaps(length, length + n, starts, page_size)

    def reads(self, window: int | None) -> tuple[Read, ...]:
        """Everything the model's own window lets through."""
        return (Read(window=window),)

    def keep(self, state: RowState, position: jax.Array) -> jax.Array:
        """Every token."""
        return position >= 0
