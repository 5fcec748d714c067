"""The axis glossary and the types that signatures share.

Axis letters, used in every shape comment and docstring:

| letter | axis |
|---|---|
| B | batch: sequences computed together |
| T | tokens of one call (1 while decoding, a chunk while prefilling) |
| H | query heads |
| K | key-value heads |
| G | query heads per key-value head, H / K |
| D | head dimension |
| V | vocabulary |
| L | layers |
| P | pages of the pool |
| N | pages per row (width of the block table) |
| R | rows of the block table per sequence |
| S | slots of a row, N * page_size |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax

Array: TypeAlias = jax.Array
Params: TypeAlias = dict[str, Any]
"""Model weights: a plain nested dict of arrays, the same tree Linen's `apply` takes under "params"."""

Rotate: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""rotate(x[B, T, heads, D], positions int32[B, T]) -> x rotated to those positions (RoPE)."""

KeyValue: TypeAlias = tuple[jax.Array, jax.Array]
"""k [B, T, K, D] and v [B, T, K, Dv] of one layer's new tokens, unrotated."""


class Scoring(NamedTuple):
    """What some models do to attention scores beside scaling them.

    Attributes:
      soft_cap: scores x become soft_cap * tanh(x / soft_cap), before masking; None: they stay.
      sinks: a learned logit per query head [H] that takes its part of the attention and gives nothing; None: none.
    """

    soft_cap: float | None = None
    sinks: jax.Array | None = None


class Held(NamedTuple):
    """What is held of the tokens so far, for layers that rebuild keys and values from it.

    Attributes:
      k: [B, S, K, D]; v: [B, S, K, Dv].
      positions: int32[B, S], -1 where nothing is held; others ascend, with the token before in the slot before.
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array
