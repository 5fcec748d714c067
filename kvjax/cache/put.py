"""Writing single entries into a pool, in place on every device.

XLA for CPUs has no scatter of bfloat16 or of 8-bit floats: it widens the whole operand to float32, scatters into that
and narrows it again, three copies of a pool for a token. There, entries of these dtypes are written one after another.
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
    if not _without_scatter(pool.dtype):
        return _scattered(pool, at, values)
    return jax.lax.platform_dependent(
        pool,
        values,
        cpu=lambda pool, values: _one_by_one(pool, at, values),
        default=lambda pool, values: _scattered(pool, at, values),
    )


def _without_scatter(dtype: jnp.dtype) -> bool:
    """Whether XLA for CPUs would widen a pool of this dtype."""
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4 and dtype != jnp.float16


def _scattered(pool: jax.Array, at: Index, values: jax.Array) -> jax.Array:
    return pool.at[at].set(values, mode="drop")


def _one_by_one(pool: jax.Array, at: Index, values: jax.Array) -> jax.Array:
    axes = [axis for axis, index in enumerate(at) if not isinstance(index, slice)]
    arrays = jnp.broadcast_arrays(*(at[axis] for axis in axes))
    entry = tuple(1 if axis in axes else size for axis, size in enumerate(pool.shape))
    kept = [size for axis, size in enumerate(pool.shape) if axis not in axes]
    values = jnp.broadcast_to(values, (*arrays[0].shape, *kept)).reshape(-1, *entry)
    indices = jnp.stack([array.reshape(-1) for array in arrays]).astype(jnp.int32)
    sizes = jnp.array([pool.shape[axis] for axis in axes], jnp.int32)

    def one(number: jax.Array, pool: jax.Array) -> jax.Array:
        index = indices[:, number]
        start = [jnp.zeros((), jnp.int32)] * pool.ndim
        for axis, where in zip(axes, index, strict=True):
            start[axis] = where
        # Not a choice between the old entry and the new one: reading what is written to makes the compiler copy it.
        return jax.lax.cond(
            jnp.all((index >= 0) & (index < sizes)),
            lambda pool: jax.lax.dynamic_update_slice(pool, values[number], start),
            lambda pool: pool,
            pool,
        )

    return jax.lax.fori_loop(0, values.shape[0], one, pool)
