"""Triton kernels compiled to PTX for GPUs that are not here, and the calls their backends refuse."""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels import device, triton_call, tuning
from pallas_kernels.attention import triton as dense
from pallas_kernels.attention import triton_cases as dense_cases
from pallas_kernels.checks.case import Case
from pallas_kernels.checks.lowering import shapes
from pallas_kernels.paged_attention import triton as paged
from pallas_kernels.paged_attention import triton_cases as paged_cases

KINDS = {"9.0": "NVIDIA H100 80GB HBM3", "8.0": "NVIDIA A100-SXM4-80GB"}
CASES = {
    case.name: case
    for case in (*paged_cases.cases(), *dense_cases.cases())
    if case.name
    in (
        "triton decode d128",
        "triton decode d128 positions",
        "triton decode d128 int8",
        "triton decode d128 int4",
        "triton decode d128 kivi 2 bits",
        "triton decode mla 16 heads",
        "triton chunk d64",
        "triton weights d128",
        "triton forward d128 causal",
        "triton backward d64 causal",
    )
}
needs_triton = pytest.mark.skipif(triton_call.absent() is not None, reason=str(triton_call.absent()))


def described(capability: str) -> Any:
    """A mesh of one GPU of this compute capability."""
    gpu = AbstractDevice(KINDS[capability], num_cores=None, platform="gpu")
    return use_abstract_mesh(AbstractMesh((1,), ("gpu",), abstract_device=gpu))


def shape(*axes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """An array that is not there."""
    return jax.ShapeDtypeStruct(axes, dtype)


@needs_triton
@pytest.mark.parametrize("capability", KINDS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_lowers_without_a_gpu(case: Case, capability: str) -> None:
    with described(capability):
        lowered = jax.jit(case.call).trace(*shapes(case)).lower(lowering_platforms=("cuda",))
    assert "triton_kernel_call" in lowered.as_text()


def test_the_described_device_decides_what_is_compiled_for() -> None:
    for capability in KINDS:
        with described(capability):
            assert triton_call.target() == int(capability.replace(".", ""))


def paged_call(**change: Any) -> dict[str, Any]:
    """A call that is served."""
    call = dict(q=shape(1, 1, 8, 128), k_pool=shape(9, 1, 2, 16, 128), v_pool=shape(9, 1, 2, 16, 128), value_dim=None)
    scales = dict.fromkeys(("k_scale", "k_min", "v_scale", "v_min"))
    return {**call, **scales, **change}


def dense_call(**change: Any) -> dict[str, Any]:
    """A call that is served."""
    return {**dict(q=shape(1, 8, 4, 64), k=shape(1, 8, 2, 64), v=shape(1, 8, 2, 64), scale=0.125), **change}


GROUPED = {"k_pool": shape(9, 1, 2, 16, 128, dtype=jnp.uint8), "k_scale": shape(9, 1, 2, 16, 4, dtype=jnp.float16)}


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"q": shape(1, 1, 8, 128, dtype=jnp.float32)}, "queries must be one of bfloat16, float16, got float32"),
        ({"k_pool": shape(9, 1, 2, 16, 128, dtype=jnp.int8)}, "a k_pool of int8 needs a scale per vector"),
        (GROUPED, "a byte must hold 2 codes of 4 bits or 4 of 2 bits, got 1 of them"),
        ({"v_pool": shape(9, 1, 2, 16, 40)}, "widths must be multiples of 16 up to 640, got 40"),
        ({"v_pool": None, "value_dim": 576}, "values must be 512 wide at most"),
    ],
)
def test_paged_calls_it_cannot_serve_are_refused_with_the_reason(
    change: dict, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_call, "absent", lambda: None)
    found = paged.unsupported(**paged_call(**change))
    assert found is None if reason is None else found is not None and reason in found


def test_fp8_needs_a_device_that_converts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_call, "absent", lambda: None)
    pool = shape(9, 1, 2, 16, 128, dtype=jnp.float8_e4m3fn)
    call = paged_call(k_pool=pool, k_scale=shape(9, 1, 2, 16, dtype=jnp.float32))
    with described("8.0"):
        assert paged.unsupported(**call) == "float8_e4m3fn needs compute capability 8.9 or later"
    with described("9.0"):
        assert paged.unsupported(**call) is None


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"v": None}, "has no kernel for attention_weights"),
        ({"v": shape(1, 8, 2, 64, dtype=jnp.float32)}, "throughout"),
        ({"q": shape(1, 8, 4, 512), "k": shape(1, 8, 2, 512)}, "up to 256, got 512"),
        ({"k": shape(1, 0, 2, 64)}, "takes no empty arrays"),
    ],
)
def test_dense_calls_it_cannot_serve_are_refused_with_the_reason(
    change: dict, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_call, "absent", lambda: None)
    found = dense.unsupported(**dense_call(**change))
    assert found is None if reason is None else found is not None and reason in found


def test_without_its_packages_a_backend_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("jax_triton", "triton"):
        monkeypatch.setitem(sys.modules, package, None)
    for module in (triton_call, paged, dense, paged_cases, dense_cases):
        # Would raise if the module imported either package.
        importlib.reload(module)
    monkeypatch.setattr(triton_call, "_installed", lambda package: False)
    reason = "jax_triton and triton are not installed"
    assert paged.unsupported(**paged_call()) == reason
    assert dense.unsupported(**dense_call()) == reason


def test_a_cpu_is_not_chosen_for_them() -> None:
    if device.compute_capability() is not None:
        pytest.skip("this machine has an NVIDIA GPU")
    for backend in (paged, dense):
        reason = backend.unavailable()
        assert reason is not None
        assert "8.0 or later" in reason


def test_tiles_split_long_rows_only_as_far_as_programs_are_few() -> None:
    def tiles(programs: int, slots: int) -> paged.Tiles:
        return paged.tiles(4, programs, slots, width=128, slot_bytes=512, coded=False)

    assert tiles(1, 32768).splits > 1
    assert tiles(1024, 32768).splits == tiles(1, 64).splits == 1
    assert tiles(1, 32768).splits * paged.LEAST_BLOCKS * tiles(1, 32768).slots <= 32768


@pytest.mark.parametrize("memory", [101376, *set(triton_call.SHARED_MEMORY.values())])
@pytest.mark.parametrize("width, value", [(64, 64), (128, 128), (256, 256), (576, 0)])
@pytest.mark.parametrize("rows", [1, 32, 64, 512])
def test_tiles_fit_into_shared_memory(rows: int, width: int, value: int, memory: int) -> None:
    tiles = paged.tiles(rows, 8, 4096, width, 2 * (width + value), coded=False, memory=memory)
    assert tiles.stages * tiles.slots * 2 * (width + value) <= memory


@needs_triton
@pytest.mark.parametrize(
    ("operation", "kernel", "config", "constants"),
    [
        ("attention", "triton_forward", dict(rows=64, columns=32, warps=8, stages=3), dict(BLOCK_M=64, BLOCK_N=32)),
        ("paged_attention", "triton_decode", dict(slots=128, splits=3, stages=2), dict(BLOCK_N=128, SPLITS=3)),
    ],
)
def test_calls_are_cut_up_as_was_tuned(
    monkeypatch: pytest.MonkeyPatch, operation: str, kernel: str, config: dict[str, int], constants: dict[str, int]
) -> None:
    launched: list[dict[str, Any]] = []

    def launch(_: Any, __: Any, outputs: Any, *___: Any, **options: Any) -> list[jax.Array]:
        launched.append(options)
        return [jnp.zeros(out.shape, out.dtype) for out in outputs]

    monkeypatch.setattr(triton_call, "launch", launch)
    case = CASES["triton forward d128 causal" if operation == "attention" else "triton decode d128"]
    for given in ({}, config):
        with tuning.forced(operation, kernel, given) if given else contextlib.nullcontext():
            # Not the call itself, which is traced once for all.
            jax.eval_shape(lambda *arguments: case.call(*arguments), *shapes(case))
    untuned, tuned = launched
    assert {name: tuned[name] for name in constants} == constants
    assert tuned["stages"] == config["stages"]
    assert {name: untuned[name] for name in constants} != constants
