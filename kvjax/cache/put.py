"""Writing entries into a pool, in place where the device can.

XLA for CPUs has no scatter of bfloat16 or of 8-bit floats (see `kvjax.cache.bits`): what is not held as integers there,
such as KIVI's exact tokens of a bfloat16 model, is moved as integers of the same width, which costs one copy
instead of two or three. All other dtypes, and all on GPUs and TPUs, are written where they are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.cache.bits import NUMBERS, bits

Index = tuple[jax.Array | slice, ...]


def put(pool: jax.Array, at: Index, values: jax.Array) -> jax.Array:
    """`pool.at[at].set(values, mode="drop")`, in the pool's dtype; into integers that hold short floats, their bits.

    Args:
      at: for each of the leading axes an array of indices of at least 0 (all of shapes that broadcast; what is out of
        range is dropped), or `slice(None)`.
      values: [*shape of the indices, *axes of the pool that no array indexes], or what broadcasts to that.
    """
    if pool.dtype in NUMBERS and jnp.issubdtype(values.dtype, jnp.floating):
        values = bits(values.astype(NUMBERS[pool.dtype]))
    values = values.astype(pool.dtype)
    if not copied_on_cpu(pool.dtype):
        return _scattered(pool, at, values)
    return jax.lax.platform_dependent(
        pool,
        values,
        cpu=lambda pool, values: _scattered(_bits(pool), at, _bits(values)).view(pool.dtype),
        default=lambda pool, values: _scattered(pool, at, values),
    )


def copied_on_cpu(dtype: jnp.dtype) -> bool:
    """Whether XLA for CPUs copies a pool of this dtype to write to it."""
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4 and dtype != jnp.float16


def _scattered(pool: jax.Array, at: Index, values: jax.Array) -> jax.Array:
    return pool.at[at].set(values, mode="drop")


def _bits(x: jax.Array) -> jax.Array:
    return x.view(jnp.uint8 if x.dtype.itemsize == 1 else jnp.uint16)
