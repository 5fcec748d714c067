"""Pools of codes that share bytes: who serves them, and what must not change a result. NaN is in every unused scale."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import triton_call
from pallas_kernels.checks import interpret
from pallas_kernels.paged_attention import cases, mosaic_gpu, triton
from pallas_kernels.paged_attention.shapes import Shape, attend, exact, inputs, weigh

SMALL = Shape(batch=2, heads=4, kv_heads=2, width=64, page=32, entries=3, lengths=(70, 31), ragged=True)
# Float32 sums of the same numbers in another order.
ROUNDING = 1e-5


def described(shape: Shape) -> dict[str, Any]:
    """What a backend is asked about a call."""
    q, k, v, table, _, _, _, _, k_scale, v_scale, k_min, v_min = jax.eval_shape(lambda: inputs(shape)(0))
    scales = dict(k_scale=k_scale, v_scale=v_scale, k_min=k_min, v_min=v_min)
    return dict(q=q, k_pool=k, v_pool=v, block_table=table, value_dim=shape.value or None, **scales)


def renumbered(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same call with pages elsewhere, and 0 where NaN was."""
    q, k, v, table, lengths, layer, positions, at, *scales = arguments
    order = np.random.default_rng(0).permutation(k.shape[0])
    table = jnp.asarray(np.argsort(order)[np.asarray(table)], jnp.int32)
    moved = [jnp.nan_to_num(pool[order]) for pool in scales]
    return q, k[order], v[order], table, lengths, layer, positions, at, *moved


@pytest.mark.skipif(interpret.missing() is not None, reason=str(interpret.missing()))
@pytest.mark.parametrize("codes", ["int4", "kivi2"])
def test_on_hopper_renumbering_pages_and_clearing_unused_slots_change_no_bit(codes: str) -> None:
    shape = dataclasses.replace(SMALL, codes=codes, width=128 if codes == "kivi2" else 64)
    arguments = inputs(shape)(0)
    assert all(bool(jnp.isnan(scale).any()) for scale in arguments[8:])
    call = jax.jit(attend(shape, "mosaic_gpu"))
    with interpret.interpreted() as watch:
        plain, moved = (jax.tree.map(np.asarray, call(*given)) for given in (arguments, renumbered(arguments)))
    assert not watch.races
    for one, other in zip(plain, moved, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("width", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("codes", ["int4", "kivi4", "kivi2"])
@pytest.mark.parametrize("latent", [False, True], ids=["values apart", "values within keys"])
def test_triton_serves_every_width_whatever_hopper_does(
    codes: str, width: int, latent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_call, "absent", lambda: None)
    shape = dataclasses.replace(SMALL, codes=codes, width=width)
    if latent:
        shape = dataclasses.replace(shape, kv_heads=1, value=width // 2)
    assert triton.unsupported(**described(shape)) is None


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(codes="int4"), None),
        (dict(codes="kivi2", width=128), None),
        (dict(codes="kivi2"), "fill a multiple of 32"),
        (dict(codes="int4", width=256), "of 64 or 128 channels"),
        (dict(codes="int4", group=16), "multiples of 32"),
        (dict(codes="int4", page=8, entries=9), "no multiple of 128 bytes"),
        (dict(codes="kivi4", page=16, entries=5), "hold 32 slots or more"),
        (dict(codes="int4", kv_heads=1, value=32), "values within keys that are codes"),
    ],
)
def test_what_hopper_cannot_serve_it_says(changes: dict[str, Any], reason: str | None) -> None:
    found = mosaic_gpu.unsupported(**described(dataclasses.replace(SMALL, **changes)))
    assert found is None if reason is None else found is not None and reason in found


def test_hopper_leaves_their_attention_weights_to_others() -> None:
    call = described(dataclasses.replace(SMALL, codes="int4"))
    found = mosaic_gpu.unsupported(**call, lse=jax.ShapeDtypeStruct((2, 1, 4), jnp.float32))
    assert found == "attention weights from codes that share bytes"


@pytest.mark.parametrize("change", ["k_min", "v_scale"])
def test_codes_without_their_scales_are_refused(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_call, "absent", lambda: None)
    call = described(dataclasses.replace(SMALL, codes="int4")) | {change: None}
    for backend in (mosaic_gpu, triton):
        assert "scale" in (backend.unsupported(**call) or "")


@pytest.mark.parametrize("codes", ["int4", "kivi2"])
@pytest.mark.parametrize("operation", [attend, weigh], ids=["attention", "weights"])
def test_the_reference_of_cases_equals_plain_attention_over_codes(codes: str, operation: Any) -> None:
    # In float32 nothing is rounded on the way from code to key.
    shape = dataclasses.replace(SMALL, codes=codes, dtype="float32", row_per_head=codes == "int4")
    arguments = inputs(shape)(0)
    found, expected = exact(shape, operation)(*arguments), operation(shape, "xla")(*arguments)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=ROUNDING, atol=ROUNDING)


def test_bytes_of_a_vector_are_those_of_its_codes_and_scales() -> None:
    # 128 channels: 4 groups of 32, each with two numbers of two bytes.
    assert Shape(codes="int4").vector_bytes == 64 + 16
    assert Shape(codes="kivi2", page=32).vector_bytes == 32 + 16
    moved = {case.name: case.bytes_moved for case in cases.cases()}
    assert moved["paged decode d128 int4 full"] == 2 * 8 * 8 * 32768 * 80
