"""StreamingLLM: the first tokens and the last ones (Xiao et al. 2023, 2309.17453)."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from kvjax.cache.numbers import check_integer
from kvjax.cache.policies.bases import Positional
from kvjax.cache.policies.protocol import EMPTY, Read, RowState, overlaps
from kvjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class StreamingLLM(Positional):
    """Keeps the first `sinks` and the last `window` tokens, the current one included: sinks + window slots.

    Positions are those within the cache (0 .. held-1 in token order, the query at the last). RoPE is relative, so keys
    stay rotated to their original positions and a step is two partial results: the sinks read by the query turned to
    min(i, sinks + window - 1), the window by the query at i. Sinks lie in slots 0 .. sinks-1, the rest in a ring
    behind them. The oldest token leaves before the step. One row for all layers and heads.
    """

    sinks: int = 4
    window: int = 1020
    rows: Literal["shared"] = dataclasses.field(default="shared", init=False, repr=False)
    in_order: bool = dataclasses.field(default=False, init=False, repr=False)
    append_only: bool = dataclasses.field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        check_integer(self, "sinks", 0)
        check_integer(self, "window", 1)

    def capacity(self, tokens: int) -> int:
        """Never more than sinks + window."""
        return min(tokens, self.sinks + self.window)

    def slots(self, length: jax.Array, victim: jax.Array, seen: jax.Array, positions: jax.Array) -> jax.Array:
        """Sinks at their position, the others round the ring; of one call only the last `window` land there."""
        last = jnp.max(positions, axis=1, keepdims=True)
        ring = self.sinks + (positions - self.sinks) % self.window
        ring = jnp.where(positions > last - self.window, ring, EMPTY)
        slot = jnp.where(positions < self.sinks, positions, ring)
        slot = jnp.where(positions >= 0, slot, EMPTY)
        return jnp.broadcast_to(slot, (length.shape[0], *slot.shape))

    def touches(self, length: jax.Array, seen: jax.Array, n: jax.Array, starts: jax.Array, page_size: int) -> jax.Array:
        """The pages of the next sinks and of the next places round the ring."""
        end = seen + n
        sinks = overlaps(seen, jnp.minimum(end, self.sinks), starts, page_size)
        first = jnp.maximum(jnp.maximum(seen, self.sinks), end - self.window)
        low = (first - self.sinks) % self.window + self.sinks
        high = low + jnp.maximum(end - first, 0)
        wrap = self.sinks + self.window
        ring = overlaps(low, jnp.minimum(high, wrap), starts, page_size)
        again = overlaps(jnp.full_like(low, self.sinks), high - self.window, starts, page_size)
        touched = sinks | ring | again
        return jnp.broadcast_to(touched, (length.shape[0], *touched.shape))

    def reads(self, window: int | None) -> tuple[Read, ...]:
        """The sinks from near by, and the window from where it is."""
        if window is not None and self.sinks + self.window > window:
            raise ConfigError(
                f"{self!r} keeps {self.sinks + self.window} tokens in view, but this model's layer sees only {window}; "
                f"choose sinks + window <= {window}"
            )
        recent = Read(first=self.sinks, window=self.window)
        if not self.sinks:
            return (recent,)
        return (Read(last=self.sinks, turn=self.sinks + self.window - 1, slots=self.sinks), recent)

    def keep(self, state: RowState, position: jax.Array) -> jax.Array:
        """The sinks and the last `window` tokens."""
        last = jnp.max(position, axis=-1, keepdims=True)
        return (position >= 0) & ((position < self.sinks) | (position > last - self.window))
