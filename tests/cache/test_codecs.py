"""Codecs: what a vector is after it was stored, and what it really weighs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kvjax.cache.codecs import Codec, Dense, Int8
from kvjax.errors import ConfigError
from tests.oracles import codecs as oracles

HALF = 0.5 + 5e-5
"""Half a scale, and the rounding of quotient and product in float32: each 2^-24 of at most 127 scales."""

encode = jax.jit(Int8().encode)
decode = jax.jit(lambda stored: Int8().decode(stored, jnp.float32))

# Below 1e-30 a scale gets near float32's smallest normal number, under which XLA flushes to zero.
numbers = st.floats(-1e4, 1e4, width=32).map(lambda x: x if abs(x) > 1e-30 else 0.0)
vectors = arrays(np.float32, (3, 8), elements=numbers)


@given(vectors)
def test_int8_errs_by_at_most_half_a_scale_and_recoding_changes_no_code(x):
    stored = encode(x)
    read = np.asarray(decode(stored))
    scale = np.asarray(stored.scale)[:, None]
    assert np.all(np.abs(read - x) <= HALF * scale)
    np.testing.assert_array_equal(encode(read).values, stored.values)


@given(vectors)
def test_int8_codes_are_the_oracles(x):
    codes, scale = oracles.Int8().codes(x)
    stored = encode(x)
    # XLA multiplies by the reciprocal of 127: the scale may be off by its last bit, and a code where it is near a half.
    np.testing.assert_allclose(np.asarray(stored.scale), scale[:, 0], rtol=2e-7)
    quotient = x / np.where(scale == 0, 1, scale)
    sure = np.abs(quotient - np.floor(quotient) - 0.5) > 1e-4
    np.testing.assert_array_equal(np.asarray(stored.values)[sure], codes[sure])
    assert np.all(np.abs(np.asarray(stored.values, np.int32) - codes) <= 1)


def test_int8_keeps_zero_and_codes_each_vector_on_its_own():
    x = np.array([[0.0] * 8, [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0, 0.0], [1e-6] * 8], np.float32)
    stored = encode(x)
    assert stored.values.dtype == jnp.int8
    assert stored.scale.dtype == jnp.float32
    # Rounding is half to even, and the extremes are +-127, never -128.
    assert np.asarray(stored.values)[:2].tolist() == [[0] * 8, [127, 0, 2, 2, 0, -2, -127, 0]]
    read = np.asarray(decode(stored))
    assert not read[0].any()
    np.testing.assert_allclose(read[2], 1e-6, rtol=1e-6)  # float32 rounding: the vector's own scale, not another's


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dense_rounds_to_its_dtype_and_none_keeps_the_models(dtype):
    x = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    stored = Dense(dtype).encode(jnp.asarray(x))
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    np.testing.assert_array_equal(np.asarray(stored.values), x.astype(kind))
    assert Dense(dtype).decode(stored, jnp.float32).dtype == jnp.float32
    assert Dense().encode(jnp.asarray(x, dtype)).values.dtype == jnp.dtype(dtype)


@pytest.mark.parametrize("width", [8, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("codec", [Dense(), Dense("bfloat16"), Dense("float16"), Int8()], ids=str)
def test_bytes_per_vector_are_the_bytes_of_what_is_stored(codec, dtype, width):
    stored = jax.eval_shape(codec.encode, jax.ShapeDtypeStruct((3, width), dtype))
    real = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stored))
    assert real == 3 * codec.bytes_per_vector(width, dtype)


def test_equal_codecs_are_one_static_argument():
    assert Int8() == Int8()
    assert hash(Dense("bfloat16")) == hash(Dense(jnp.bfloat16))
    assert Dense("bfloat16") != Dense()
    assert isinstance(Int8(), Codec)
    assert isinstance(Dense(), Codec)


@pytest.mark.parametrize("dtype", ["int8", "float64", jnp.int32])
def test_dense_refuses_what_is_no_floating_dtype_of_models(dtype):
    with pytest.raises(ConfigError, match="float32, bfloat16 or float16"):
        Dense(dtype)
