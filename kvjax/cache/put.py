"""Writing entries into a pool, in place where the device can.

XLA for CPUs has no scatter of bfloat16 or of 8-bit floats: it widens the whole operand to float32, scatters into that
and narrows it again. There these are moved as integers of the same width, which costs one copy of the pool instead of
two or three; all other dtypes, and all on GPUs and TPUs, are written where they are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Index = tuple[jax.Array | slice, ...]


def put(pool: jax.Array, at: Index, values: jax.Array) -> jax.Array:
    """`pool.at[at].set(values, mode="drop")`, in the pool's dtype.

    Args:
      at: for each of the leading axes an array of indices of at least 0 (all of shapes that broadcast; what is out of
        range is dropped), or `slice(None)`.
      values: [*shape of the indices, *axes of the pool that no array indexes], or what broadcasts to that.
    """
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
