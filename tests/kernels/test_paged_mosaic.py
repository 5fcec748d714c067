"""The Hopper kernels of paged attention, interpreted on the CPU with every access checked for races.

Every call stores NaN wherever nothing may be read: in pages that no table names and behind the last token of a row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import paged_attention
from pallas_kernels.checks import interpret
from pallas_kernels.checks.numerics import LSE_TOLERANCE, TOLERANCES, absolute_error, relative_error
from pallas_kernels.paged_attention import cases, mosaic_gpu
from pallas_kernels.paged_attention.mosaic_plan import MARGIN, SHARED_MEMORY, attention_plan, splits_for
from pallas_kernels.paged_attention.shapes import Shape, attend, inputs, weigh

LAYERS, LAYER, PAGE, PAGES = 2, 1, 16, 9
LENGTHS = (PAGE * PAGES - 5, PAGE + 1, PAGE, PAGE - 1, 1, 0)
SCALE = 0.125
# Two results of the same sum in another order: probabilities and sums are rounded to bfloat16 in other places.
REORDERED = TOLERANCES["bfloat16"]

can_interpret = pytest.mark.skipif(interpret.missing() is not None, reason=str(interpret.missing()))


@dataclasses.dataclass(frozen=True)
class Batch:
    """q [B,T,H,D]; k, v [B,S,K,D] in slot order; pools, table and lengths as `paged_attention` takes them."""

    q: jax.Array
    k: np.ndarray
    v: np.ndarray
    k_pool: jax.Array
    v_pool: jax.Array
    table: jax.Array
    lengths: jax.Array

    def run(self, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
        """out and lse of the kernel; some arguments replaced."""
        given = dict(
            q=self.q,
            k_pool=self.k_pool,
            v_pool=self.v_pool,
            block_table=self.table,
            lengths=self.lengths,
            layer=jnp.array([LAYER], jnp.int32),
        )
        given |= changes
        static = {name: given.pop(name, None) for name in ("window", "value_dim")}
        config = tuple((given.pop("config", None) or {}).items())
        with interpret.interpreted() as watch:
            out, lse = jax.block_until_ready(_attend(given, *static.values(), config))
            out, lse = np.asarray(out, np.float32), np.asarray(lse)
        assert not watch.races
        return out, lse

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """The same by plain jnp in float32."""
        out, lse = paged_attention(
            self.q.astype(jnp.float32),
            self.k_pool,
            self.v_pool,
            self.table,
            self.lengths,
            layer=jnp.array([LAYER], jnp.int32),
            scale=SCALE,
            backend="xla",
        )
        return np.asarray(out), np.asarray(lse)


TRACED: list[object] = []
"""Grows whenever `_attend` is traced."""


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _attend(
    given: dict[str, Any], window: int | None, value_dim: int | None, config: tuple[tuple[str, int], ...]
) -> Any:
    TRACED.append(None)
    options = dict(
        positions=None, soft_cap=None, value_dim=value_dim, k_scale=None, k_min=None, v_scale=None, v_min=None
    )
    lengths, tokens = given["lengths"], given["q"].shape[1]
    options["q_positions"] = jnp.max(lengths, axis=1, keepdims=True) - tokens + jnp.arange(tokens)
    return mosaic_gpu.paged_attention(
        **{**options, **given}, window=window, scale=SCALE, config=dict(config) if config else None
    )


@functools.cache
def make(row_per_head: bool = False, heads: int = 4, kv_heads: int = 2, seed: int = 0) -> Batch:
    """Pages scattered over the pool in random order; NaN wherever nothing may be read."""
    rng = np.random.default_rng(seed)
    batch, width, slots, rows = len(LENGTHS), 64, PAGE * PAGES, kv_heads if row_per_head else 1
    q = jnp.asarray(rng.normal(size=(batch, 1, heads, width)), jnp.bfloat16)
    k, v = rng.normal(size=(2, batch, slots, kv_heads, width))
    count = batch * rows * PAGES + 3
    pools = np.full((2, count, LAYERS, kv_heads // rows, PAGE, width), np.nan)
    table = np.full((batch, rows, PAGES), -1, np.int32)
    numbers = iter(rng.permutation(count))
    for b, length in enumerate(LENGTHS):
        for row, slot in np.ndindex(rows, length):
            if slot % PAGE == 0:
                table[b, row, slot // PAGE] = next(numbers)
            which = slice(row, row + 1) if row_per_head else slice(None)
            for pool, values in zip(pools, (k, v), strict=True):
                pool[table[b, row, slot // PAGE], LAYER, :, slot % PAGE] = values[b, slot, which]
    k_pool, v_pool = (jnp.asarray(pool, jnp.bfloat16) for pool in pools)
    lengths = np.broadcast_to(np.array(LENGTHS, np.int32)[:, None], (batch, rows))
    return Batch(q, k, v, k_pool, v_pool, jnp.asarray(table), jnp.asarray(lengths))


@functools.cache
def plain() -> tuple[np.ndarray, np.ndarray]:
    """What the kernel gives for `make()` in one share per sequence."""
    return make().run(config={"splits": 1})


@can_interpret
@pytest.mark.parametrize("case", [case for case in cases.cases() if case.size == "small"], ids=lambda case: case.name)
def test_interpreted_the_kernel_is_right_and_has_no_races(case: Any) -> None:
    watch, differences = interpret.run(case)
    assert not watch.races
    for difference in differences:
        assert difference.passed, difference


@can_interpret
def test_lengths_around_a_page_and_none_are_right_with_nan_in_every_unused_slot() -> None:
    batch = make()
    assert bool(jnp.isnan(batch.k_pool).any())
    (out, lse), (expected, expected_lse) = plain(), batch.expected()
    assert relative_error(out, expected) < TOLERANCES["bfloat16"]
    assert absolute_error(lse, expected_lse) < LSE_TOLERANCE
    assert not out[-1].any()
    assert np.isneginf(lse[-1]).all()
    assert np.isfinite(lse[:-1]).all()


@can_interpret
def test_renumbering_pages_and_clearing_unused_slots_change_no_bit() -> None:
    batch = make()
    order = np.random.default_rng(2).permutation(batch.k_pool.shape[0])
    table = np.asarray(batch.table)
    moved = jnp.asarray(np.where(table >= 0, np.argsort(order)[table], -1), jnp.int32)
    pools = {name: jnp.nan_to_num(getattr(batch, name)[order]) for name in ("k_pool", "v_pool")}
    for one, other in zip(batch.run(block_table=moved, config={"splits": 1}, **pools), plain(), strict=True):
        np.testing.assert_array_equal(one, other)


@can_interpret
def test_a_chunk_longer_than_its_rows_is_right_in_one_share() -> None:
    q = jnp.asarray(np.random.default_rng(3).normal(size=(len(LENGTHS), 40, 4, 64)), jnp.bfloat16)
    batch = dataclasses.replace(make(), q=q)
    (out, lse), (expected, expected_lse) = batch.run(config={"splits": 1}), batch.expected()
    assert relative_error(out, expected) < TOLERANCES["bfloat16"]
    assert absolute_error(lse, expected_lse) < LSE_TOLERANCE


@can_interpret
def test_a_page_that_a_table_lacks_is_skipped() -> None:
    batch = make()
    whole = dataclasses.replace(batch, table=batch.table.at[0, 0, 3].set(-1).at[1, 0, 0].set(-1))
    out, lse = whole.run(config={"splits": 1})
    expected, expected_lse = whole.expected()
    assert relative_error(out, expected) < TOLERANCES["bfloat16"]
    assert absolute_error(lse, expected_lse) < LSE_TOLERANCE


@can_interpret
def test_shares_of_a_sequence_merge_to_the_whole() -> None:
    out, lse = make().run(config={"splits": 3})
    assert relative_error(out, plain()[0]) < REORDERED
    assert absolute_error(lse, plain()[1]) < LSE_TOLERANCE


@can_interpret
def test_a_window_as_long_as_the_row_and_positions_in_order_equal_none() -> None:
    batch = make()
    order = np.broadcast_to(np.arange(PAGE * PAGES, dtype=np.int32), (len(LENGTHS), 1, PAGE * PAGES))
    out, lse = batch.run(window=PAGE * PAGES, positions=jnp.asarray(order), config={"splits": 1})
    np.testing.assert_array_equal(out, plain()[0])
    np.testing.assert_array_equal(lse, plain()[1])


@can_interpret
def test_a_row_per_head_and_repeated_heads_equal_shared_rows() -> None:
    # The same seed draws the same q, k and v; only where they lie differs.
    out, _ = make(row_per_head=True).run(config={"splits": 1})
    np.testing.assert_array_equal(out, plain()[0])
    batch = make()
    repeated = (jnp.repeat(pool, 2, axis=2) for pool in (batch.k_pool, batch.v_pool))
    out, _ = batch.run(**dict(zip(("k_pool", "v_pool"), repeated, strict=True)), config={"splits": 1})
    np.testing.assert_array_equal(out, plain()[0])


@can_interpret
def test_latent_attention_equals_its_expanded_form() -> None:
    batch = make(heads=4, kv_heads=1)
    # A pool whose keys end in columns that are no values, and the same with the values apart.
    keys = jnp.concatenate([batch.v_pool, batch.v_pool, batch.k_pool], axis=-1)
    q = jnp.concatenate([batch.q, batch.q[::-1], batch.q], axis=-1)
    inside = batch.run(q=q, k_pool=keys, v_pool=None, value_dim=128, config={"splits": 1})
    apart = batch.run(q=q, k_pool=keys, v_pool=keys[..., :128], config={"splits": 1})
    assert relative_error(inside[0], apart[0]) < REORDERED
    assert absolute_error(inside[1], apart[1]) < LSE_TOLERANCE


@can_interpret
def test_weights_sum_to_the_queries_of_each_group() -> None:
    batch, lse = make(), plain()[1]
    with interpret.interpreted() as watch:
        weights = np.asarray(
            jax.jit(
                lambda q, k, table, lengths, lse: mosaic_gpu.paged_weights(
                    q,
                    k,
                    table,
                    lengths,
                    lse=lse,
                    row_weights=jnp.ones(q.shape[:2]),
                    layer=jnp.array([LAYER], jnp.int32),
                    positions=None,
                    q_positions=jnp.max(lengths, axis=1, keepdims=True) - 1,
                    window=None,
                    soft_cap=None,
                    scale=SCALE,
                    k_scale=None,
                    k_min=None,
                    splits=1,
                )
            )(batch.q, batch.k_pool, batch.table, batch.lengths, lse)
        )
    assert not watch.races
    # Each sum is off by what its log-sum-exp is.
    np.testing.assert_allclose(weights.sum(axis=-1)[:-1], 2.0, rtol=LSE_TOLERANCE)
    assert not weights[-1].any()
    for weight, length in zip(weights, LENGTHS, strict=True):
        assert not weight[:, length:].any()


@can_interpret
def test_another_layer_is_read_without_compiling_again() -> None:
    batch = make()
    given = dict(q=batch.q, block_table=batch.table, lengths=batch.lengths)
    results, traced = [], []
    # The first interpreted call of a process is traced once more when it is repeated, whatever it reads.
    with interpret.interpreted():
        for layer, step in ((LAYER, 1), (LAYER, 1), (LAYERS - 1 - LAYER, -1)):
            pools = {name: getattr(batch, name)[:, ::step] for name in ("k_pool", "v_pool")}
            call = {**given, **pools, "layer": jnp.array([layer], jnp.int32)}
            results.append(jax.block_until_ready(_attend(call, None, None, (("splits", 1),)))[0])
            traced.append(len(TRACED))
    np.testing.assert_array_equal(*(np.asarray(out, np.float32) for out in results[1:]))
    assert traced[1] == traced[2]


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(width=80), "multiple of 64"),
        (dict(page=24, entries=4), "a page must hold"),
        (dict(dtype="float32"), "queries must be"),
        (dict(kv_heads=1, width=640, value=576), "columns|registers|multiple of 64"),
        (dict(kv_heads=1, width=192, value=128, codes="int8"), "values within keys that are codes"),
        (dict(codes="int8", page=16), "no multiple of 128 bytes"),
        (dict(width=512), "fit"),
    ],
)
def test_a_call_it_cannot_serve_says_why(changes: dict[str, Any], reason: str) -> None:
    shape = dataclasses.replace(Shape(batch=2, entries=4), **changes)
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(attend(shape, "mosaic_gpu"), *jax.eval_shape(lambda: inputs(shape)(0)))


def test_without_a_hopper_gpu_another_backend_serves() -> None:
    if mosaic_gpu.unavailable() is None:
        pytest.skip("there is a Hopper GPU here")
    batch = make()
    out, _ = paged_attention(
        batch.q, batch.k_pool, batch.v_pool, batch.table, batch.lengths, layer=jnp.array([LAYER]), scale=SCALE
    )
    assert relative_error(np.asarray(out, np.float32), batch.expected()[0]) < TOLERANCES["bfloat16"]


def uses(jaxpr: Any, shapes: set[tuple[int, ...]]) -> Iterator[str]:
    """The names of the primitives that touch an array of such a shape, in the order of the program."""
    for equation in jaxpr.eqns:
        parts = [
            x for value in equation.params.values() for x in (value if isinstance(value, tuple | list) else [value])
        ]
        inner = [getattr(part, "jaxpr", part) for part in parts if hasattr(getattr(part, "jaxpr", part), "eqns")]
        if not inner and any(getattr(x.aval, "shape", None) in shapes for x in equation.invars):
            yield equation.primitive.name
        for part in inner:
            yield from uses(part, shapes)


@pytest.mark.parametrize(
    "changes", [{}, {"tokens": 40}, {"kv_heads": 1, "width": 192, "value": 128}, {"codes": "int8"}]
)
@pytest.mark.parametrize("call", [attend, weigh])
def test_a_pool_however_large_is_read_by_copies_that_take_a_coordinate_for_each_axis(
    call: Any, changes: dict[str, Any]
) -> None:
    """The copy engine's descriptor holds strides of 64 bits: no kernel computes an address within a pool."""
    shape = Shape(**{**dict(batch=2, heads=4, kv_heads=2, width=64, page=32, entries=3, pages=2**20), **changes})
    if call is weigh and shape.value:
        shape = dataclasses.replace(shape, value=0)
    arguments = jax.eval_shape(lambda: inputs(shape)(0))
    pools = {x.shape for x in (arguments[1], *arguments[8:10]) if x is not None}
    found = set(uses(jax.make_jaxpr(call(shape, "mosaic_gpu"))(*arguments).jaxpr, pools))
    assert found == {"copy_gmem_to_smem"}


def test_every_plan_fits_in_shared_memory_with_stages_for_both_consumers() -> None:
    for name, shape in cases.FULL.items():
        q, k, v, table = jax.eval_shape(lambda shape=shape: inputs(shape)(0)[:4])
        plan = attention_plan(q, k, v, table, shape.value or None)
        assert plan.stages >= 2, name
        if plan.share == "blocks":
            assert plan.stages % plan.consumers == 0, name
        stage = 64 * k.dtype.itemsize * (plan.width + (0 if v is None else plan.value_width))
        assert plan.stages * stage + plan.held_rows * plan.width * q.dtype.itemsize < SHARED_MEMORY - MARGIN, name


def test_splits_fill_whole_rounds_of_the_processors() -> None:
    assert splits_for(1, 1) == 1
    # 8 sequences of 512 blocks: 16 shares each are 128 of 132 processors; 17 would need a second round.
    assert splits_for(8, 512) == 16
    assert splits_for(64 * 8, 512) in range(1, 9)
