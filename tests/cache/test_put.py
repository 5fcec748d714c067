"""Entries are written where a scatter writes them, whatever the dtype, and in place where XLA can."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache.bits import bits, numbers
from kvjax.cache.put import copied_on_cpu, put

DTYPES = (jnp.float32, jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn, jnp.int8)
SHAPE = (7, 3, 2, 4, 5)
ALL = slice(None)
GENERATOR = np.random.default_rng(0)


def drawn(*shape: int) -> jax.Array:
    """Small integers, which every dtype holds."""
    return jnp.asarray(GENERATOR.integers(-8, 8, shape), jnp.float32)


# Where and with what, each entry named once at most; page 7 does not exist.
PAGES = jnp.array([[0, 6], [7, 2], [3, 9]])
CASES = {
    "tokens of all heads": (
        (PAGES, jnp.zeros_like(PAGES), ALL, jnp.array([[1, 3], [0, 2], [2, 2]])),
        drawn(3, 2, 2, 5),
    ),
    "tokens of a head": ((PAGES, PAGES * 0 + 2, PAGES * 0 + 1, PAGES % 4), drawn(3, 2, 5)),
    "pages": ((jnp.array([5, 7, 1]),), drawn(3, 3, 2, 4, 5)),
    "one for all": ((jnp.array([5, 8, 1]), jnp.array([2])), drawn(5)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("case", CASES)
def test_an_entry_is_where_a_scatter_puts_it(case, dtype):
    at, values = CASES[case]
    pool = drawn(*SHAPE).astype(dtype)
    found = jax.jit(put)(pool, at, values) if ALL not in at else jax.jit(lambda pool, v: put(pool, at, v))(pool, values)
    assert found.dtype == dtype
    wanted = pool.astype(jnp.float32).at[at].set(values, mode="drop")
    np.testing.assert_array_equal(found.astype(jnp.float32), wanted)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("case", CASES)
def test_integers_are_given_the_bits_of_short_floats(case, dtype):
    at, values = CASES[case]
    pool = bits(drawn(*SHAPE).astype(dtype))
    found = jax.jit(lambda pool, v: put(pool, at, v))(pool, values.astype(dtype))
    assert found.dtype == pool.dtype
    wanted = numbers(pool).astype(jnp.float32).at[at].set(values, mode="drop")
    np.testing.assert_array_equal(numbers(found).astype(jnp.float32), wanted)
    np.testing.assert_array_equal(put(pool, at, bits(values.astype(dtype))), found)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_the_pool_is_written_in_place_or_copied_once(dtype):
    pool = jax.ShapeDtypeStruct((4096, *SHAPE[1:]), dtype)
    at, values = CASES["tokens of all heads"]
    lowered = jax.jit(lambda pool, values: put(pool, at, values), donate_argnums=0).lower(pool, values)
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes == 4096 * 120 * jnp.dtype(dtype).itemsize
    # One copy, of the dtypes that XLA for CPUs cannot scatter.
    assert memory.temp_size_in_bytes < (1.05 if copied_on_cpu(jnp.dtype(dtype)) else 0.05) * memory.alias_size_in_bytes
