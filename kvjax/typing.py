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
from typing import Any, TypeAlias

import jax

Array: TypeAlias = jax.Array
Params: TypeAlias = dict[str, Any]
"""Model weights: a plain nested dict of arrays, the same tree Linen's `apply` takes under "params"."""

Rotate: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""rotate(x[B, T, heads, D], positions int32[B, T]) -> x rotated to those positions (RoPE)."""
