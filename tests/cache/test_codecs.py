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

import kvjax
from kvjax import CacheConfig, KVSpec
from kvjax.cache.codecs import FP8, KIVI, Codec, Dense, Encoded, Int4, Int8
from kvjax.cache.codecs.packed import affine, pack, unpack
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


# FP8

fp8 = jax.jit(lambda x: FP8().decode(FP8().encode(x), jnp.float32))


@given(vectors)
def test_fp8_errs_by_at_most_a_sixteenth_and_is_never_nan(x):
    read = np.asarray(fp8(x))
    scale = np.abs(x).max(axis=-1, keepdims=True) / 448
    # Half a step of three bits of fraction, or of the smallest steps; beside it the rounding of float32.
    assert np.all(np.abs(read - x) <= np.maximum(np.abs(x) / 16, scale * 2.0**-10) * (1 + 1e-6))
    assert np.all(read[~x.any(axis=-1)] == 0)


def test_fp8_codes_are_the_oracles():
    x = np.random.default_rng(1).standard_normal((500, 8)).astype(np.float32)
    codes, scale = oracles.FP8().codes(x)
    stored = jax.jit(FP8().encode)(x)
    assert stored.values.dtype == jnp.float8_e4m3fn
    # XLA multiplies by the reciprocal of 448: the scale may be off by its last bit, and a code where it is near a half.
    np.testing.assert_allclose(np.asarray(stored.scale), scale[:, 0], rtol=2e-7)
    assert np.mean(np.asarray(stored.values, np.float32) != codes.astype(np.float32)) < 1e-3
    np.testing.assert_allclose(np.asarray(fp8(x)), oracles.FP8().roundtrip(x), rtol=2.0**-3, atol=2.0**-9)


# Int4

FP16 = 2.0**-11
"""Relative rounding of float16; of a scale near its smallest numbers, 2^-25 absolutely."""


def read_back(codec, x):
    """What is read of x, in float32."""
    return np.asarray(jax.jit(lambda x: codec.decode(codec.encode(x), jnp.float32))(x))


@given(arrays(np.float32, (3, 8), elements=st.floats(-1e4, 1e4, width=32)))
def test_int4_errs_by_at_most_half_a_scale_and_float16_rounding(x):
    groups = x.reshape(3, 2, 4)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    error = np.abs(read_back(Int4(4), x).reshape(groups.shape) - groups)
    # What rounding moves the minimum and fifteen scales by may add to half a scale.
    moved = FP16 * (np.abs(low) + (high - low)) + 16 * 2.0**-25
    assert np.all(error <= (high - low) / 15 / 2 * (1 + FP16) + moved * (1 + 1e-3))


def test_int4_keeps_zero_and_constant_groups():
    x = np.array([[0.0] * 4 + [3.0] * 4, [0.0] * 8], np.float32)
    np.testing.assert_array_equal(read_back(Int4(4), x), x)  # 3 is a float16


@pytest.mark.parametrize("group", [2, 4, 8])
def test_int4_reads_back_what_the_oracle_does(group):
    x = np.random.default_rng(2).standard_normal((500, 8)).astype(np.float32)
    error = np.abs(read_back(Int4(group), x) - oracles.Int4(group).roundtrip(x))
    # XLA multiplies by the reciprocal of 15: of a few groups the scale rounds to the next float16, or a code elsewhere.
    assert np.mean(error > 1e-6) < 0.01
    assert error.max() < x.max() - x.min()


@pytest.mark.parametrize("bits", [2, 4])
def test_packed_codes_take_their_bits_and_come_back(bits):
    codes = np.random.default_rng(3).integers(0, 2**bits, (5, 16)).astype(np.uint8)
    packed = pack(jnp.asarray(codes), bits)
    assert packed.dtype == jnp.uint8
    assert packed.shape == (5, 16 * bits // 8)
    np.testing.assert_array_equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("group", [0, 3, -2, 4.0, True])
def test_int4_refuses_a_group_that_is_no_even_number(group):
    with pytest.raises(ConfigError, match=r"Int4\(group\) must be a positive even integer"):
        Int4(group)


def test_int4_refuses_a_model_whose_width_its_group_does_not_divide():
    spec = KVSpec(layers=2, kv_heads=2, key_dim=48, value_dim=48)
    with pytest.raises(ConfigError, match=r"Int4\(group=32\) must divide .* 48 channels; choose an even divisor"):
        kvjax.plan(spec, CacheConfig(codec=Int4()))
    kvjax.plan(spec, CacheConfig(codec=Int4(16)))


# KIVI


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_errs_by_at_most_half_a_scale_along_tokens_and_along_channels(bits, size):
    x = (size * np.random.default_rng(4).standard_normal((4, 8))).astype(np.float32)
    codec = KIVI(bits, 4, 4)
    levels = 2**bits - 1
    keys, values = kivi_keys(codec, x), kivi_values(codec, x)
    for error, span, low in (
        (np.abs(keys - x), np.ptp(x, axis=0), x.min(axis=0)),
        (
            np.abs(values - x).reshape(4, 2, 4),
            np.ptp(x.reshape(4, 2, 4), -1)[..., None],
            x.reshape(4, 2, 4).min(-1)[..., None],
        ),
    ):
        moved = FP16 * (np.abs(low) + span) + 16 * 2.0**-25
        assert np.all(error <= span / levels / 2 * (1 + FP16) + moved * (1 + 1e-3))


def kivi_keys(codec, x):
    """What is read of a page of keys, each by itself."""
    stored = codec.code_keys(jnp.asarray(x))
    spread = (jnp.broadcast_to(part, x.shape) for part in (stored.scale, stored.minimum))
    return np.asarray(codec.read_keys(Encoded(stored.values, *spread), jnp.float32))


def kivi_values(codec, x):
    """What is read of values."""
    stored = codec.code_values(jnp.asarray(x))
    codes = unpack(stored.values, codec.bits)
    return np.asarray(affine(codes.reshape(*codes.shape[:-1], -1, codec.group), stored.scale, stored.minimum)).reshape(
        x.shape
    )


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_reads_back_what_the_oracle_does(bits):
    x = np.random.default_rng(5).standard_normal((4, 8)).astype(np.float32)
    codec = KIVI(bits, 4, 4)
    # A scale may round to the next float16.
    np.testing.assert_allclose(kivi_keys(codec, x), oracles.affine(x.T, bits).T, rtol=0, atol=4e-3)
    groups = oracles.affine(x.reshape(4, 2, 4), bits).reshape(4, 8)
    np.testing.assert_allclose(kivi_values(codec, x), groups, rtol=0, atol=4e-3)
    constant = np.full((4, 8), 1.5, np.float32)  # a float16
    np.testing.assert_array_equal(kivi_keys(codec, constant), constant)
    np.testing.assert_array_equal(kivi_values(codec, constant), constant)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 3}, "bits\\) must be 2 or 4, got 3"),
        ({"group": 24}, "group\\) must be a power of two"),
        ({"group": 2}, "at least 4, the codes of a byte"),
        ({"residual": 100}, "residual\\) must be a positive multiple of group=32, got 100"),
        ({"residual": 0}, "positive multiple"),
        ({"residual": 64.0}, "must be an integer"),
    ],
)
def test_kivi_refuses_what_makes_no_pages(arguments, message):
    with pytest.raises(ConfigError, match=message):
        KIVI(**arguments)


@pytest.mark.parametrize(
    ("codec", "share"),
    [(Int8(), 0.55), (FP8(), 0.55), (Int4(), 0.32), (KIVI(2), 0.24), (KIVI(4), 0.37)],
    ids=str,
)
def test_bytes_are_the_promised_share_of_bfloat16(codec, share):
    spec = KVSpec(layers=4, kv_heads=2, key_dim=128, value_dim=128)
    coded, plain = (kvjax.plan(spec, CacheConfig(codec=c), context=4096).total_bytes for c in (codec, Dense()))
    assert coded <= share * plain


# Dense


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
@pytest.mark.parametrize("codec", [Dense(), Dense("bfloat16"), Dense("float16"), Int8(), FP8(), Int4(4)], ids=str)
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
    assert FP8() == FP8()
    assert Int4(32) == Int4()
    assert Int4(16) != Int4()
    assert isinstance(FP8(), Codec)
    assert isinstance(Int4(), Codec)


@pytest.mark.parametrize("dtype", ["int8", "float64", jnp.int32])
def test_dense_refuses_what_is_no_floating_dtype_of_models(dtype):
    with pytest.raises(ConfigError, match="float32, bfloat16 or float16"):
        Dense(dtype)
