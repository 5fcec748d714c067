"""Dense attention on Hopper without one: interpreted with race detection, and its rules checked on the CPU."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import use_abstract_mesh

from pallas_kernels import attention, device, hopper, sums, tuning
from pallas_kernels.attention import cudnn, mosaic_gpu, mosaic_gpu_call, reference
from pallas_kernels.attention.cases import cases
from pallas_kernels.attention.spans import key_blocks, query_tiles, spans
from pallas_kernels.attention.walk import place, sections
from pallas_kernels.checks import interpret, lowering
from pallas_kernels.checks.case import Case
from pallas_kernels.checks.numerics import GRADIENT_TOLERANCE, compare

SMALL = [case for case in cases() if case.size == "small"]
interpreting = pytest.mark.skipif(interpret.missing() is not None, reason=str(interpret.missing()))


def random(seed: int, *shapes: tuple[int, ...], dtype: str = "bfloat16") -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def mosaic(*arrays: jax.Array, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """out and lse of the interpreted kernel, as float32, without a race."""
    with interpret.interpreted() as watch:
        out, lse = jax.block_until_ready(jax.jit(lambda *a: attention(*a, backend="mosaic_gpu", **options))(*arrays))
        result = np.asarray(out, np.float32), np.asarray(lse)
    assert not watch.races
    return result


@interpreting
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_small_cases_equal_float32_without_races(case: Case) -> None:
    watch, differences = interpret.run(case)
    assert not watch.races
    assert all(difference.passed for difference in differences), differences


@interpreting
def test_a_window_that_hides_nothing_and_repeated_heads_change_no_bit() -> None:
    """The same blocks are multiplied in the same order, so not even rounding may differ."""
    q, k, v = random(0, (1, 65, 2, 64), (1, 65, 1, 64), (1, 65, 1, 64))
    out, lse = mosaic(q, k, v, window=jnp.int32(65))
    repeated = mosaic(q, jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2))
    np.testing.assert_array_equal(out, repeated[0])
    np.testing.assert_array_equal(lse, repeated[1])


@interpreting
def test_padding_and_later_tokens_change_nothing() -> None:
    """NaN beyond the length, a query at position -1, and another last token: earlier rows keep every bit."""
    q, k, v = random(1, (2, 64, 1, 64), (2, 130, 1, 64), (2, 130, 1, 64))
    positions = jnp.where(jnp.arange(130) < jnp.array([[64], [0]]), jnp.arange(130), -1)
    asking = jnp.where(jnp.arange(64) == 5, -1, jnp.arange(64)) + jnp.zeros((2, 1), jnp.int32)
    options = dict(positions=positions, q_positions=asking)
    out, lse = mosaic(q, k.at[:, 64:].set(jnp.nan), v.at[:, 64:].set(jnp.nan), **options)
    assert not np.isnan(out).any()
    for nothing in ((1,), (0, 5)):  # a sequence without keys, and a query that is padding
        assert (out[nothing] == 0).all()
        assert (lse[nothing] == -np.inf).all()
    later = mosaic(q, k.at[:, 63].set(7.0), v.at[:, 63].set(7.0), **options)
    np.testing.assert_array_equal(out[:, :63], later[0][:, :63])
    assert (out[0, 63] != later[0][0, 63]).any()


@interpreting
def test_gradients_know_nothing_of_padding() -> None:
    """NaN beyond the length: gradients equal those of float32 without it, and the padding's own are 0."""
    q, k, v, dout = random(4, (1, 64, 1, 64), (1, 130, 1, 64), (1, 130, 1, 64), (1, 64, 1, 64))

    def gradients(backend: str, *qkv: jax.Array) -> Any:
        lengths = jnp.array([100], jnp.int32)
        out, pull_back = jax.vjp(lambda *x: attention(*x, lengths=lengths, backend=backend)[0], *qkv)
        return pull_back(dout.astype(out.dtype))

    poisoned = (x.at[:, 100:].set(jnp.nan) for x in (k, v))
    with interpret.interpreted() as watch:
        found = jax.block_until_ready(jax.jit(lambda *x: gradients("mosaic_gpu", *x))(q, *poisoned))
    assert not watch.races
    for gradient in found[1:]:
        assert not np.asarray(gradient[:, 100:], np.float32).any()
    expected = gradients("xla", *(x.astype(jnp.float32) for x in (q, k, v)))
    differences = compare(found, expected, GRADIENT_TOLERANCE)
    assert all(difference.passed for difference in differences), differences


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_gradients_never_take_the_fused_kernel(fused: bool, deterministic: bool) -> None:
    q, k, v = random(5, (1, 64, 2, 64), (1, 64, 1, 64), (1, 64, 1, 64))

    def gradients(*qkv: jax.Array) -> Any:
        options = dict(deterministic=deterministic, backend="mosaic_gpu")
        return jax.grad(lambda *x: attention(*x, **options)[0].sum().astype(jnp.float32), argnums=(0, 1, 2))(*qkv)

    with tuning.forced("attention", "fused", {"fused": fused}):
        program = str(jax.make_jaxpr(gradients)(q, k, v))
    kernels = {name for name in ("attention_dqkv", "attention_dkv", "attention_dq") if f"name={name}\n" in program}
    taken = fused and not deterministic and mosaic_gpu_call.SERVES_FUSED
    assert kernels == ({"attention_dqkv"} if taken else {"attention_dkv", "attention_dq"})
    assert ("reduction_op=add" in program) == taken


def test_an_untuned_device_takes_the_two_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has measured the fused one, and only a GPU can tell whether its sum is right."""
    monkeypatch.setattr(tuning, "device_kind", lambda: "NVIDIA Z999 one of a kind")
    for key, value in mosaic_gpu.WIDTHS:
        q, v = (jax.ShapeDtypeStruct((1, 2048, 8, width), jnp.bfloat16) for width in (key, value))
        assert not mosaic_gpu_call._configs(q, q, v, False)[1].fused


def summed(blocks: int = 4) -> Any:
    """[64 * blocks, 32] -> (itself, the sum of its `blocks` parts), by a kernel whose blocks add to the sum."""

    def body(x_ref: Any, sum_ref: Any, out_ref: Any, staged: Any, full: Any) -> None:
        number = jax.lax.axis_index("block")
        rows = pl.ds(number * 64, 64)

        @pl.when(jax.lax.axis_index("warpgroup") == 0)
        def _() -> None:
            plgpu.copy_gmem_to_smem(x_ref.at[rows], staged, full)
            plgpu.barrier_wait(full)
            sums.add(staged, sum_ref, number, (pl.ds(0, 64),))
            plgpu.copy_smem_to_gmem(staged, out_ref.at[rows])
            plgpu.wait_smem_to_gmem(0)

    run = hopper.kernel(
        body,
        name="summed",
        out_type=jax.ShapeDtypeStruct((64 * blocks, 32), jnp.float32),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=2,
        scratch_types=(hopper.tiles((64, 32), jnp.float32), plgpu.Barrier()),
    )
    return sums.with_sum(run, (64, 32), blocks)


@interpreting
def test_a_sum_across_blocks_begins_at_zero_in_every_call() -> None:
    (x,) = random(6, (256, 32), dtype="float32")
    with interpret.interpreted() as watch:
        call = jax.jit(lambda x: (summed()(x), summed()(x)))
        found = [np.asarray(total) for (_, total) in (*call(x), *call(x))]
    assert not watch.races
    # float32 sums of four terms near 1.
    np.testing.assert_allclose(found[0], np.asarray(x).reshape(4, 64, 32).sum(0), atol=2e-6)
    for again in found[1:]:
        np.testing.assert_array_equal(again, found[0])


@pytest.mark.skipif(
    not mosaic_gpu_call.SERVES_FUSED, reason=f"sums across blocks need jax 0.11, here is {jax.__version__}"
)
def test_what_blocks_add_to_are_zeros_of_the_same_program() -> None:
    """Lowered for an H100: the sum shares memory with an operand, and that operand is a broadcast of 0."""
    with use_abstract_mesh(lowering.abstract_h100()):
        traced = jax.jit(lambda x: summed()(x)).trace(jax.ShapeDtypeStruct((256, 32), jnp.float32))
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    operands, attributes = re.findall(r"custom_call @mosaic_gpu_v2\(([^)]*)\)(.*)", program)[0]
    alias = re.search(r"output_tuple_indices = \[1\], operand_index = (\d)", attributes)
    assert alias is not None
    shared = operands.split(", ")[int(alias[1])]
    # Its sharding may be stated in between.
    if (stated := re.search(rf"{shared} = sdy.sharding_constraint (%\w+) ", program)) is not None:
        shared = stated[1]
    zeros = re.search(rf"{shared} = stablehlo.broadcast_in_dim (%\w+),", program)
    assert zeros is not None
    assert f"{zeros[1]} = stablehlo.constant dense<0.000000e+00>" in program


def random_spans(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    positions = rng.permutation(24)[None] * rng.integers(0, 2, (2, 24)) - 1
    asking = rng.integers(-1, 24, (2, 16))
    if seed % 2:
        positions, asking = np.sort(positions), np.sort(asking)
    return spans(
        16,
        24,
        causal=seed % 3 > 0,
        window=None if seed % 3 < 2 else jnp.int32(7),
        lengths=jnp.array([24, 11]),
        segment_ids=None,
        positions=jnp.asarray(positions, jnp.int32),
        q_positions=jnp.asarray(asking, jnp.int32),
    )


@pytest.mark.parametrize("seed", range(12))
def test_blocks_left_out_hold_nothing_visible_and_blocks_without_a_mask_hide_nothing(seed: int) -> None:
    of = random_spans(seed)
    at, low, high = (np.asarray(x) for x in of)
    sees = (at[:, None] >= low[..., None]) & (at[:, None] <= high[..., None])
    asks = (low <= high)[..., None] & np.ones_like(sees)
    for ranges, axes in ((key_blocks(of, 4, 3), (4, 3)), (query_tiles(of, 4, 3), (3, 4))):
        grid, asked = (x if axes == (4, 3) else x.swapaxes(1, 2) for x in (sees, asks))
        for b, i in np.ndindex(*ranges.shape[:2]):
            first, last, plain, masked = np.asarray(ranges[b, i]) * axes[1]
            tile = slice(i * axes[0], (i + 1) * axes[0])
            rows, ask = grid[b, tile], asked[b, tile]
            assert not rows[:, :first].any()
            assert not rows[:, last:].any()
            assert first <= plain <= masked <= max(last, plain)
            assert (rows | ~ask)[:, plain:masked].all()


def test_segments_see_themselves_only_and_causally() -> None:
    ids = jnp.array([[3, 3, 9, 9, 3, 1]])
    none = dict.fromkeys(("window", "lengths", "positions", "q_positions"))
    at, low, high = spans(6, 6, causal=True, segment_ids=ids, **none)
    sees = (at[0] >= low[0][:, None]) & (at[0] <= high[0][:, None])
    np.testing.assert_array_equal(sees, (ids[0] == ids[0][:, None]) & np.tri(6, dtype=bool))


def test_every_thread_block_has_a_place_of_its_own() -> None:
    assert sections(12, 4, 9 * 2**20) == 12
    assert sections(12, 4, 20 * 2**20) == 4
    assert sections(12, 1, 2**40) == 1
    heads, tiles = jax.vmap(lambda i: place(i, 4, 5))(jnp.arange(60))
    assert len(set(zip(heads.tolist(), tiles.tolist(), strict=True))) == 60


CALL = dict(
    causal=True,
    window=None,
    soft_cap=None,
    lengths=None,
    segment_ids=None,
    positions=None,
    q_positions=None,
    scale=0.1,
    deterministic=False,
)


@pytest.mark.parametrize(
    ("backend", "changes", "reason"),
    [
        (mosaic_gpu, dict(scale=-1.0), "positive"),
        (mosaic_gpu, dict(segment_ids=1, positions=1), "not both"),
        (mosaic_gpu, dict(soft_cap=jnp.ones(())), "soft_cap"),
        (cudnn, dict(soft_cap=3.0), "no soft_cap"),
        (cudnn, dict(positions=1), "no positions"),
        (cudnn, dict(window=jnp.int32(3)), "window"),
        (cudnn, dict(deterministic=True), "run to run"),
    ],
)
def test_what_a_backend_cannot_do_it_says(backend: Any, changes: dict[str, Any], reason: str) -> None:
    q = k = v = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.bfloat16)
    assert backend.unsupported(q, k, v, **CALL) is None
    assert reason in backend.unsupported(q, k, v, **{**CALL, **changes})
    narrow = jax.ShapeDtypeStruct((1, 8, 2, 20), jnp.bfloat16)
    assert "width" in backend.unsupported(narrow, narrow, narrow, **CALL)
    assert "bfloat16" in backend.unsupported(*[jax.ShapeDtypeStruct(q.shape, jnp.float32)] * 3, **CALL)


@pytest.mark.parametrize("capability, served", [("8.9", False), ("9.0", True), ("10.0", True), ("12.0", True)])
def test_cudnn_takes_wide_heads_from_hopper_on(capability: str, served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cudnn, device):
        monkeypatch.setattr(module, "compute_capability", lambda: capability)
    q = jax.ShapeDtypeStruct((1, 8, 2, 256), jnp.bfloat16)
    assert (cudnn.unsupported(q, q, q, **CALL) is None) == served


def test_cudnn_is_differentiated_through_its_log_sum_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN itself needs a GPU: the reference, blind to the cotangent of lse as cuDNN is, stands in for it."""

    def blind(options: Any, q: Any, k: Any, v: Any, lengths: Any) -> Any:
        call = {**CALL, "causal": options.causal, "scale": options.scale, "lengths": lengths}
        out, lse = reference.attention(q, k, v, **call)
        return out, jax.lax.stop_gradient(lse)

    monkeypatch.setattr(cudnn, "_cudnn", blind)
    q, k, v, dout = random(2, (2, 6, 4, 8), (2, 6, 2, 8), (2, 6, 2, 8), (2, 6, 4, 8), dtype="float32")
    (dlse,) = random(3, (2, 6, 4), dtype="float32")
    for lengths in (None, jnp.array([6, 3])):
        call = {**CALL, "lengths": lengths}
        for cotangent in ((dout, dlse), (dout, None)):
            found, expected = (
                jax.grad(lambda qkv, f=f, call=call, to=cotangent: inner(f(*qkv, **call), to))((q, k, v))
                for f in (cudnn.attention, reference.attention)
            )
            for a, b in zip(found, expected, strict=True):
                # float32 sums of some ten terms near 1.
                np.testing.assert_allclose(a, b, atol=2e-6)


def inner(outputs: Any, cotangents: Any) -> jax.Array:
    """A number whose gradient with respect to `outputs` is `cotangents`; None: that output has no part in it."""
    return sum(jnp.vdot(a, b) for a, b in zip(outputs, cotangents, strict=True) if b is not None)
