"""Short floats held as integers, where the device cannot write them in place.

XLA for CPUs has no scatter of bfloat16 or of 8-bit floats: it widens the whole operand to float32, scatters into that
and narrows it again, at every write. A scatter of integers is in place, so that pools on CPUs hold the bits of such
numbers, for codecs and selects that say so (`bits_for_floats = True`): what reads their pools, like the kernels that
serve CPUs, takes either.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

INTEGERS = {jnp.dtype(jnp.bfloat16): jnp.dtype(jnp.uint16), jnp.dtype(jnp.float8_e4m3fn): jnp.dtype(jnp.uint8)}
NUMBERS = {integer: number for number, integer in INTEGERS.items()}

AnyArray = TypeVar("AnyArray", jax.Array, np.ndarray)


def takes_bits(owner: object) -> bool:
    """Whether the pools of a codec or select may hold the bits of its numbers."""
    return bool(getattr(owner, "bits_for_floats", False))


def pool_dtype(owner: object, dtype: Any) -> Any:
    """The dtype in which pools on the default device hold what a codec or select stores as `dtype`."""
    if takes_bits(owner) and jax.default_backend() == "cpu":
        return INTEGERS.get(jnp.dtype(dtype), dtype)
    return dtype


def bits(x: AnyArray) -> AnyArray:
    """Short floats as integers; all else as it is."""
    return x.view(INTEGERS[x.dtype]) if x.dtype in INTEGERS else x


def numbers(x: AnyArray) -> AnyArray:
    """`bits` undone: only for pools whose owner takes bits: elsewhere such integers are codes."""
    return x.view(NUMBERS[x.dtype]) if x.dtype in NUMBERS else x
