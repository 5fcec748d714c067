"""Writing new keys and values: the measured function is the one that the cache runs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.append import cases
from pallas_kernels.append.api import Pools, append

# A code may differ by one where two compilations of a cosine differ in their last bit; keys are bfloat16 before that.
TOLERANCE = 5e-3


@pytest.mark.parametrize(
    "change",
    [{}, {"int8": True}, {"row_per_head": True}, {"kv_heads": 1, "width": 80, "latent": True}, {"tokens": 2}],
    ids=["plain", "int8", "rows per head", "value in key", "two tokens"],
)
def test_what_a_loop_of_writes_leaves_is_what_the_formula_says(change: dict) -> None:
    shape = dataclasses.replace(cases.SMALL, **change)
    arguments = shape_inputs = cases.inputs(shape)(0)
    actual = jax.jit(cases.write(shape, append))(*arguments)
    expected = cases.one_by_one(shape)(*shape_inputs)
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other)
        assert np.linalg.norm(other) > 0
        assert np.linalg.norm(one - other) <= TOLERANCE * np.linalg.norm(other)


@pytest.mark.parametrize("rows", ["shared", "head"])
@pytest.mark.parametrize("quantised", [False, True])
def test_it_writes_what_the_cache_writes(rows: str, quantised: bool) -> None:
    pytest.importorskip("flax")
    from kvjax.cache.codecs import Dense, Encoded, Int8
    from kvjax.cache.layout import GroupLayout, KVSpec
    from kvjax.cache.policies import H2O, Full
    from kvjax.cache.state import empty_group
    from kvjax.cache.write import write
    from kvjax.models.rotary import apply_rotary

    rng, layers, heads, width, page = np.random.default_rng(0), 2, 2, 8, 4
    policy = Full() if rows == "shared" else H2O(heavy=4, recent=4)
    codec = Int8() if quantised else Dense()
    spec = KVSpec(layers=layers, kv_heads=heads, key_dim=width, value_dim=width)
    layout = GroupLayout((0, 1), spec, policy, codec, page, None, None, "float32")
    group = empty_group(layout, batch=2, pages_per_row=3, num_pages=30)
    table = rng.permutation(30)[: group.table.size].reshape(group.table.shape).astype(np.int32)
    table[:, 1, 2] = -1
    group = dataclasses.replace(group, table=jnp.asarray(table))
    k, v = jnp.asarray(rng.normal(size=(2, 2, 3, heads, width)), jnp.float32)
    frequencies = (1.0 / 100.0 ** (np.arange(0, width, 2) / width)).astype(np.float32)
    positions = jnp.array([[4, 5, 6], [9, 10, -1]])
    # One token is not stored, one has no page.
    slots = jnp.array([[4, 5, 6], [3, 8, -1]])
    index = 1
    count = layout.rows_per_layer
    held = jnp.broadcast_to(slots, (count, *slots.shape))
    key = codec.encode(apply_rotary(k, positions, frequencies, 1.0))
    expected = write(group, index, held, key, codec.encode(v))

    shared = rows == "shared"
    own = table if shared else table[index * count : (index + 1) * count]
    assert isinstance(group.v, Encoded)
    pools = append(
        Pools(group.k.values, group.v.values, group.k.scale, group.v.scale),
        k,
        v,
        jnp.moveaxis(jnp.asarray(own), 0, 1),
        jnp.moveaxis(held, 0, 1),
        positions,
        layer=jnp.array([index if shared else 0]),
        frequencies=jnp.asarray(frequencies),
    )
    assert expected.v is not None
    theirs = (expected.k.values, expected.v.values, expected.k.scale, expected.v.scale)
    assert np.any(np.asarray(theirs[0]))
    for one, other in zip(pools, theirs, strict=True):
        np.testing.assert_array_equal(one, other) if other is not None else None
        assert (one is None) == (other is None)


def test_pools_given_away_are_written_in_place() -> None:
    pool = jax.ShapeDtypeStruct((64, 4, 2, 16, 32), jnp.float32)
    new = jax.ShapeDtypeStruct((2, 1, 2, 32), jnp.float32)
    ints = [jax.ShapeDtypeStruct(axes, jnp.int32) for axes in ((2, 1, 32), (2, 1, 1), (2, 1), (1,))]

    def step(pools: Pools, k: jax.Array, v: jax.Array, table: jax.Array, *rest: jax.Array) -> Pools:
        slots, positions, layer = rest
        return append(pools, k, v, table, slots, positions, layer=layer, frequencies=jnp.ones(16))

    made = jax.jit(step, donate_argnums=0).lower(Pools(pool, pool), new, new, *ints).compile()
    memory = made.memory_analysis()
    size = 4 * int(np.prod(pool.shape))
    assert memory.alias_size_in_bytes >= 2 * size
    assert memory.temp_size_in_bytes < size / 4


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"slots": np.zeros((1, 1, 2), np.int32)}, "slots must be"),
        ({"v": None}, "if and only if there is a pool"),
        ({"k": np.zeros((1, 1, 3, 8), np.float32)}, "3 KV heads do not fit"),
    ],
)
def test_misshapen_calls_are_refused_with_their_shapes(change: dict, reason: str) -> None:
    pool = jnp.zeros((3, 1, 2, 4, 8))
    call = dict(
        pools=Pools(pool, pool),
        k=np.zeros((1, 1, 2, 8), np.float32),
        v=np.zeros((1, 1, 2, 8), np.float32),
        block_table=np.zeros((1, 1, 2), np.int32),
        slots=np.zeros((1, 1, 1), np.int32),
        positions=np.zeros((1, 1), np.int32),
        layer=np.zeros(1, np.int32),
        frequencies=np.ones(4, np.float32),
    )
    with pytest.raises(ValueError, match=reason):
        append(**{**call, **change})
