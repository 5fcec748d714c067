"""What a thread block works on, and in which order."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

L2_BYTES = 32 * 2**20
"""How much of the 50 MB L2 cache what is streamed may take."""


def sections(heads: int, group: int, bytes_per_kv_head: int) -> int:
    """How many of `heads` (of all sequences) are worked on at a time, so that what they stream stays in the L2 cache.

    `group` heads stream the same `bytes_per_kv_head`.
    """
    most = max(L2_BYTES // bytes_per_kv_head, 1) * group
    return max(size for size in range(1, heads + 1) if heads % size == 0 and size <= most)


def place(index: jax.Array, section: int, tiles: int) -> tuple[jax.Array, jax.Array]:
    """Which (head of all sequences, tile) the thread block `index` works on: heads of a section first, then tiles."""
    rest = lax.rem(index, section * tiles)
    return lax.div(index, section * tiles) * section + lax.rem(rest, section), lax.div(rest, section)


@dataclasses.dataclass(frozen=True)
class Walk:
    """The blocks to visit, as `spans.key_blocks` gives them, `times` over: first all that need no mask, then the rest.

    Attributes:
      first, last, plain, masked: int32[] each. times: the rounds, such as the query heads of one KV head.
    """

    first: jax.Array
    last: jax.Array
    plain: jax.Array
    masked: jax.Array
    times: int = 1

    @classmethod
    def read(cls, ranges: Any, b: jax.Array, number: jax.Array, times: int = 1) -> Walk:
        """From ranges [B or 1, tiles, 4] in global memory."""
        at = 0 if ranges.shape[0] == 1 else b
        first, last, plain, masked = (ranges[at, number, i] for i in range(4))
        return cls(first, last, plain, masked, times)

    @property
    def plain_steps(self) -> jax.Array:
        """Steps without a mask; they come first."""
        return (self.masked - self.plain) * self.times

    @property
    def steps(self) -> jax.Array:
        """All steps."""
        return (self.last - self.first) * self.times

    def at(self, step: jax.Array) -> tuple[Any, jax.Array]:
        """(round, block) of a step."""
        run = self.masked - self.plain
        others = self.last - self.first - run
        later = step - self.plain_steps
        is_plain = later < 0
        size = jnp.where(is_plain, run, jnp.maximum(others, 1))
        inner = jnp.where(is_plain, step, later)
        round_ = 0 if self.times == 1 else lax.div(inner, size)
        within = inner if self.times == 1 else lax.rem(inner, size)
        other = self.first + within
        other = jnp.where(other < self.plain, other, other + run)
        return round_, jnp.where(is_plain, self.plain + within, other)
