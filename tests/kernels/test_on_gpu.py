"""What only a GPU can show: every case's numbers there, and that kernels keep their properties in machine code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, paged_attention
from pallas_kernels.attention.api import BACKENDS as DENSE_BACKENDS
from pallas_kernels.checks import collect, on_gpu
from pallas_kernels.checks.case import Case
from pallas_kernels.checks.numerics import LSE_TOLERANCE, TOLERANCES, absolute_error, relative_error
from pallas_kernels.device import compute_capability
from pallas_kernels.paged_attention.api import BACKENDS
from pallas_kernels.paged_attention.shapes import Shape, attend, inputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(on_gpu.missing() is not None, reason=str(on_gpu.missing()))]

KERNELS = ("mosaic_gpu", "triton")
SHAPE = Shape(batch=4, heads=8, kv_heads=2, width=128, page=64, entries=9, ragged=True)


def available(name: str, backends: Any = BACKENDS) -> None:
    """Skips where the device has no such backend."""
    if (reason := backends[name]["unavailable"]()) is not None:
        pytest.skip(reason)


def arrays(result: Any) -> list[np.ndarray]:
    return [np.asarray(x, np.float32) for x in jax.block_until_ready(result)]


def same(found: Any, expected: Any) -> None:
    for one, other in zip(arrays(found), arrays(expected), strict=True):
        assert not np.isnan(one).any()
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("case", [case for case in collect.every_case() if case.size == "full"], ids=lambda x: x.name)
def test_every_case_equals_float32(case: Case) -> None:
    """Pools of more than 2^31 elements and of 4 GB among them."""
    if (reason := on_gpu.applies(case)) is not None:
        pytest.skip(reason)
    (prepared,) = on_gpu.prepare([case], threads=1)
    result = on_gpu.measure(prepared, None)
    assert result.passed, result.reason


def call_of(backend: str, shape: Shape = SHAPE) -> Callable[..., Any]:
    return jax.jit(attend(shape, backend))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("tokens", [1, 96])
def test_renumbering_pages_and_clearing_unused_slots_change_no_bit(backend: str, tokens: int) -> None:
    available(backend)
    q, k, v, table, *rest = inputs(Shape(**{**vars(SHAPE), "tokens": tokens}))(0)
    order = np.random.default_rng(0).permutation(k.shape[0])
    moved = jnp.asarray(np.argsort(order)[np.asarray(table)], jnp.int32)
    call = call_of(backend)
    same(call(q, jnp.nan_to_num(k[order]), jnp.nan_to_num(v[order]), moved, *rest), call(q, k, v, table, *rest))


@pytest.mark.parametrize("backend", KERNELS)
def test_lengths_around_a_page_a_long_window_and_repeated_heads(backend: str) -> None:
    available(backend)
    lengths = jnp.array([[0], [1], [63], [64], [65], [576]], jnp.int32)
    shape = Shape(**{**vars(SHAPE), "batch": 6, "lengths": tuple(map(int, lengths[:, 0]))})
    given = inputs(shape)(0)
    found, windowed = call_of(backend, shape)(*given), call_of(backend, Shape(**{**vars(shape), "window": 576}))(*given)
    expected = call_of("xla", shape)(given[0].astype(jnp.float32), *given[1:])
    assert relative_error(found[0], expected[0]) < TOLERANCES["bfloat16"]
    assert absolute_error(found[1], expected[1]) < LSE_TOLERANCE
    assert not arrays(found)[0][0].any()
    same(windowed, found)
    repeated = call_of(backend, Shape(**{**vars(shape), "kv_heads": 8}))
    pools = (jnp.repeat(pool, 4, axis=2) for pool in given[1:3])
    # Fewer rows a product, and other shares of a sequence: rounding alone.
    assert relative_error(repeated(given[0], *pools, *given[3:])[0], found[0]) < TOLERANCES["bfloat16"]


@pytest.mark.parametrize("backend", ["cudnn", *KERNELS])
def test_dense_padding_and_later_tokens_change_nothing_and_gradients_repeat(backend: str) -> None:
    available(backend, DENSE_BACKENDS)
    keys = jax.random.split(jax.random.key(0), 4)
    q, dout = (jax.random.normal(key, (2, 300, 8, 128), jnp.bfloat16) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, 300, 2, 128), jnp.bfloat16) for key in keys[2:])
    lengths = jnp.array([300, 70], jnp.int32)

    @jax.jit
    def both(k: Any, v: Any) -> Any:
        out, pull_back = jax.vjp(lambda *x: attention(*x, lengths=lengths, backend=backend)[0], q, k, v)
        return out, *pull_back(dout)

    expected = both(k, v)
    poisoned = both(*(x.at[1, 70:].set(jnp.nan) for x in (k, v)))
    later = both(k.at[0, 299].set(3.0), v.at[0, 299].set(3.0))[0]
    same([poisoned[0]], [expected[0]])
    same([later[:, :299]], [expected[0][:, :299]])
    assert all(np.isfinite(x).all() for x in arrays(poisoned))
    # cuDNN adds in whatever order: it says that it does not promise this.
    if backend != "cudnn":
        same(poisoned, expected)
        same(both(k, v), expected)


def test_without_a_name_the_device_gets_its_fastest_kernel() -> None:
    given = inputs(SHAPE)(0)
    best = "mosaic_gpu" if compute_capability() == "9.0" else "triton"
    if BACKENDS[best]["unsupported"](q=given[0], k_pool=given[1], v_pool=given[2], block_table=given[3]) is not None:
        pytest.skip(f"{best} is not installed")
    q, k, v, table, lengths, layer = given[:6]

    def found(backend: str | None) -> Any:
        call = jax.jit(lambda *x: paged_attention(*x, layer=layer, backend=backend))
        return call(q, k, v, table, lengths)

    same(found(None), found(best))
