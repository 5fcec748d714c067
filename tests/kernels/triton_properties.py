"""What must not change a result of the Triton kernels, run by Triton's interpreter.

`test_triton_interpreted` runs this file in a process of its own, where TRITON_INTERPRET=1 was set before triton came.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, paged_attention, triton_call
from pallas_kernels.checks import triton_interpreter
from pallas_kernels.checks.numerics import LSE_TOLERANCE, TOLERANCES, absolute_error, relative_error
from pallas_kernels.paged_attention import triton
from pallas_kernels.paged_attention.shapes import Shape, inputs

SHAPE = Shape(batch=2, heads=4, kv_heads=2, width=16, page=8, entries=5, dtype="float16", lengths=(37, 9), ragged=True)
# Sums of the same numbers in another order, each weight rounded to float16.
REORDERED = TOLERANCES["float16"]


def launch(
    kernel: Any,
    arguments: Sequence[Any],
    out_shape: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, int, int],
    *,
    warps: int,
    stages: int,
    **constants: Any,
) -> list[jax.Array]:
    """On the arrays themselves: one of 2^31 elements must not be copied."""
    outs = triton_interpreter._run(kernel, tuple(out_shape), grid, constants, *map(np.asarray, arguments))
    return [jnp.asarray(out) for out in outs]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with triton_interpreter.interpreted():
        monkeypatch.setattr(triton_call, "launch", launch)
        yield


@functools.cache
def given() -> dict[str, Any]:
    """A call of `paged_attention`: pages in random order, NaN in every unused slot."""
    q, k, v, table, lengths, layer, _, at, *_ = inputs(SHAPE)(0)
    return dict(q=q, k_pool=k, v_pool=v, block_table=table, lengths=lengths, layer=layer, q_positions=at)


def run(**changes: Any) -> tuple[np.ndarray, np.ndarray]:
    out, lse = paged_attention(**{**given(), "backend": "triton", **changes})
    return np.asarray(out, np.float32), np.asarray(lse)


@functools.cache
def plain() -> tuple[np.ndarray, np.ndarray]:
    return run()


def same(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_renumbering_pages_and_clearing_unused_slots_change_no_bit() -> None:
    call = given()
    assert bool(jnp.isnan(call["k_pool"]).any())
    order = np.random.default_rng(0).permutation(call["k_pool"].shape[0])
    table = jnp.asarray(np.argsort(order)[np.asarray(call["block_table"])], jnp.int32)
    pools = {name: jnp.nan_to_num(call[name][order]) for name in ("k_pool", "v_pool")}
    same(run(block_table=table, **pools), plain())


def test_a_window_as_long_as_the_row_and_positions_in_order_change_no_bit() -> None:
    order = jnp.broadcast_to(jnp.arange(SHAPE.slots, dtype=jnp.int32), (SHAPE.batch, 1, SHAPE.slots))
    same(run(window=SHAPE.slots, positions=order), plain())
    assert (run(window=SHAPE.slots // 4)[0] != plain()[0]).any()


def test_repeated_heads_and_a_row_per_head_change_no_bit() -> None:
    call = given()
    same(run(**{name: jnp.repeat(call[name], 2, axis=2) for name in ("k_pool", "v_pool")}), plain())
    # Each head's pages by themselves: page p of head h becomes page 2 p + h.
    pools = {
        name: call[name].swapaxes(1, 2).reshape(-1, *call[name].shape[1:2], 1, *call[name].shape[3:])
        for name in ("k_pool", "v_pool")
    }
    table = 2 * call["block_table"] + jnp.arange(2)[:, None]
    same(run(block_table=table, lengths=jnp.repeat(call["lengths"], 2, axis=1), **pools), plain())


@pytest.mark.parametrize("splits", [2, 3])
def test_the_number_of_splits_changes_rounding_alone(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = plain()
    # A tile is 16 slots: 3 for the longer sequence, one for the other, so some splits have nothing to do.
    cut = triton.Tiles(rows=16, slots=16, splits=splits, warps=4, stages=2)
    monkeypatch.setattr(triton, "tiles", lambda *_, **__: cut)
    out, lse = run()
    assert relative_error(out, whole[0]) < REORDERED
    assert absolute_error(lse, whole[1]) < LSE_TOLERANCE


def test_nothing_to_read_and_padding_give_zero_and_minus_infinity() -> None:
    out, lse = run(lengths=jnp.array([[0], [9]], jnp.int32), q_positions=jnp.array([[5], [-1]], jnp.int32))
    assert not out.any()
    assert np.isneginf(lse).all()


def test_a_page_that_a_table_lacks_is_skipped() -> None:
    table = given()["block_table"].at[0, 0, 2].set(-1)
    found, expected = run(block_table=table), run(block_table=table, backend="xla")
    assert relative_error(found[0], expected[0]) < REORDERED
    assert absolute_error(found[1], expected[1]) < LSE_TOLERANCE


def test_a_pool_of_more_than_two_to_the_31_elements_is_addressed() -> None:
    """Memory that is never touched is never there: 2 GiB of codes of which five pages are read."""
    layers, heads, page, width = 2, 2, 8, 64
    pages = 2**31 // (layers * heads * page * width) + 8
    codes, steps = (
        np.zeros((pages, layers, heads, page, width), np.int8),
        np.zeros((pages, layers, heads, page), np.float32),
    )
    assert codes.size > 2**31
    used, rng = np.array([pages - 1, 0, pages - 8, 1, pages - 9]), np.random.default_rng(0)
    codes[used] = rng.integers(-127, 128, (5, *codes.shape[1:]))
    steps[used] = rng.uniform(0.01, 0.02, (5, *steps.shape[1:]))
    call = dict(
        q=jnp.asarray(rng.normal(size=(1, 1, 4, width)), jnp.float16),
        lengths=jnp.array([[38]], jnp.int32),
        layer=jnp.array([1], jnp.int32),
    )

    def attend(backend: str, codes: np.ndarray, steps: np.ndarray, table: np.ndarray) -> Any:
        pools = dict(k_pool=codes, v_pool=codes, k_scale=steps, v_scale=steps)
        return paged_attention(**call, **pools, block_table=table.reshape(1, 1, 5), backend=backend)

    found = attend("triton", codes, steps, used)
    expected = attend("xla", codes[used], steps[used], np.arange(5))
    assert relative_error(found[0], expected[0]) < TOLERANCES["float16"]
    # xla rounds keys to float16 once they are numbers, the kernel the codes themselves, which are exact.
    assert absolute_error(found[1], expected[1]) < 2 * LSE_TOLERANCE


def test_of_dense_attention_padding_a_long_window_and_later_tokens_change_nothing() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    q, dout = (jax.random.normal(key, (1, 20, 2, 16), jnp.float16) for key in keys[:2])
    k, v = (jax.random.normal(key, (1, 20, 1, 16), jnp.float16) for key in keys[2:])

    def both(k: Any, v: Any, **options: Any) -> Any:
        def outputs(q: Any, k: Any, v: Any) -> Any:
            return attention(q, k, v, lengths=jnp.array([17]), backend="triton", **options)[0]

        out, pull_back = jax.vjp(outputs, q, k, v)
        return [np.asarray(x, np.float32) for x in (out, *pull_back(dout))]

    expected = both(k, v)
    same(both(*(x.at[:, 17:].set(jnp.nan) for x in (k, v)), window=20), expected)
    assert not any(gradient[:, 17:].any() for gradient in expected[2:])
    later = both(k.at[:, 16].set(3.0), v.at[:, 16].set(3.0))
    np.testing.assert_array_equal(later[0][:, :16], expected[0][:, :16])
    assert (later[0][:, 16] != expected[0][:, 16]).any()


def test_of_dense_attention_repeated_heads_change_no_bit() -> None:
    q, k = (jax.random.normal(jax.random.key(n), (1, 20, 4 - 2 * n, 16), jnp.float16) for n in (0, 1))
    found = attention(q, jnp.repeat(k, 2, 2), jnp.repeat(k, 2, 2), backend="triton")
    same(found, attention(q, k, k, backend="triton"))
