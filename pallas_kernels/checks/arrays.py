"""Large random arrays, made on the device a slice at a time: the generator's own words never take their size again."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

SLICE = 2**26
"""Elements made at a time."""


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def random_array(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal numbers of any floating dtype; for integers, whole numbers of -100 to 100."""
    rows = shape[0]
    each = min(max(SLICE // max(math.prod(shape[1:]), 1), 1), rows)
    integer = jnp.issubdtype(dtype, jnp.integer)

    def fill(i: jax.Array, held: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), i)
        size = (each, *shape[1:])
        drawn = jax.random.randint(key, size, -100, 101) if integer else jax.random.normal(key, size, jnp.bfloat16)
        # The last slice reaches back over rows made before: slices are of one size.
        return jax.lax.dynamic_update_slice_in_dim(held, drawn.astype(dtype), jnp.minimum(i * each, rows - each), 0)

    return jax.lax.fori_loop(0, -(-rows // each), fill, jnp.zeros(shape, dtype))
