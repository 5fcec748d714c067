"""The gates themselves: each passes a right kernel and stops one with a seeded fault.

The kernel: a producer copies blocks into a ring of buffers, a consumer doubles them in registers and writes them back.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tuning
from pallas_kernels.checks import ahead_of_time, collect, gates, interpret, numerics, on_gpu, timing, tune, workloads
from pallas_kernels.checks.case import Case
from pallas_kernels.checks.peers import NAMES, Call, Peer, Peers
from pallas_kernels.checks.report import Report
from pallas_kernels.checks.targets import Goal, Target
from pallas_kernels.device import device_kind

BLOCKS, ROWS, COLUMNS, STAGES = 4, 64, 64, 2

can_interpret = pytest.mark.skipif(interpret.missing() is not None, reason=str(interpret.missing()))
can_compile = pytest.mark.skipif(ahead_of_time.missing() is not None, reason=str(ahead_of_time.missing()))


def doubled(x: jax.Array, fault: str = "", stages: int = STAGES) -> jax.Array:
    """2 x for x float32[BLOCKS * ROWS, COLUMNS], with a fault if one is named."""

    def body(x_ref: Any, out_ref: Any, ring: Any, full: Any, free: Any) -> None:
        def rows(i: Any) -> Any:
            return pl.ds(i * ROWS, ROWS)

        @pl.when(lax.axis_index("warpgroup") == 1)
        def _produce() -> None:
            def load(i: Any, _: tuple[()]) -> tuple[()]:
                slot = lax.rem(i, stages)

                @pl.when(i >= stages)
                def _() -> None:
                    if fault != "no wait for a free buffer":
                        plgpu.barrier_wait(free.at[slot])

                plgpu.copy_gmem_to_smem(x_ref.at[rows(i)], ring.at[slot], full.at[slot])
                return ()

            lax.fori_loop(0, BLOCKS, load, ())
            # Every phase of a barrier must be seen, the last ones too.
            if fault != "no wait for a free buffer":
                for slot in range(stages):
                    plgpu.barrier_wait(free.at[slot])

        @pl.when(lax.axis_index("warpgroup") == 0)
        def _consume() -> None:
            def double(i: Any, _: tuple[()]) -> tuple[()]:
                slot = lax.rem(i, stages)
                plgpu.barrier_wait(full.at[slot])
                ring[slot] = ring[slot] * 2
                if fault != "no commit":
                    plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(ring.at[slot], out_ref.at[rows(i)])
                plgpu.wait_smem_to_gmem(0)
                if fault != "no arrival":
                    plgpu.barrier_arrive(free.at[slot])
                return ()

            lax.fori_loop(0, BLOCKS, double, ())

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(1,),
        grid_names=("block",),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=(
            plgpu.SMEM((stages, ROWS, COLUMNS), x.dtype),
            plgpu.Barrier(num_arrivals=1, num_barriers=stages),
            plgpu.Barrier(num_arrivals=1, num_barriers=stages),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    result: jax.Array = kernel(x)
    return result


def inputs(seed: int) -> tuple[jax.Array]:
    return (jax.random.normal(jax.random.key(seed), (BLOCKS * ROWS, COLUMNS)),)


CASE = Case("doubled", "toy", "mosaic_gpu", "small", inputs, doubled, lambda x: 2 * x, 1e-6)


FULL = dataclasses.replace(CASE, size="full")


def seeded(fault: str) -> Case:
    return dataclasses.replace(CASE, call=lambda x: doubled(x, fault))


@can_interpret
def test_a_right_kernel_is_interpreted_without_races() -> None:
    verdict = gates.check("interpret", CASE)
    assert verdict.passed, verdict.reason
    # Doubling is exact in float32.
    assert verdict.found[0]["error"] == 0


@can_interpret
@pytest.mark.parametrize("fault", ["no wait for a free buffer", "no commit"])
def test_interpreting_finds_a_seeded_race(fault: str) -> None:
    verdict = gates.check("interpret", seeded(fault))
    assert verdict.passed is False
    assert "race" in verdict.reason or "no threads observed" in verdict.reason


@can_interpret
def test_a_missing_arrival_ends_in_a_timeout_and_spoils_no_later_kernel() -> None:
    with pytest.raises(TimeoutError, match="an arrival is missing"):
        interpret.run(seeded("no arrival"), seconds=3)
    assert gates.check("interpret", CASE).passed


def test_lowering_passes_a_right_kernel_and_stops_one_that_needs_too_much_memory() -> None:
    assert gates.check("lower", FULL).passed
    # 16 KiB a stage: 15 stages are more than the 227 KiB of a block.
    verdict = gates.check("lower", dataclasses.replace(FULL, call=lambda x: doubled(x, stages=15)))
    assert verdict.passed is False
    assert "memory" in verdict.reason.lower()


@can_compile
def test_compiling_ahead_of_time_reads_what_the_kernel_uses() -> None:
    verdict = gates.check("compile", FULL)
    assert verdict.passed, verdict.reason
    (kernel,) = verdict.found
    assert 16 <= kernel["registers"] <= 255
    assert kernel["spill_bytes"] == 0
    # jax 0.10 does not say. Two buffers of 16 KiB, and barriers.
    if jax.__version_info__ >= (0, 11):
        assert 2 * ROWS * COLUMNS * 4 < kernel["shared_memory"] < 2 * ROWS * COLUMNS * 4 + 4096
    # It is compiled once in this process, and still listed for an equal case.
    assert gates.check("compile", FULL).found == verdict.found


def test_spills_and_missing_tensor_core_products_fail_attention() -> None:
    good = ahead_of_time.Kernel("k", 168, 0, 200_000, hgmma=64, hmma=0)
    attention = dataclasses.replace(FULL, operation="attention gradient")
    assert not good.faults(attention)
    for change in (
        {"spill_bytes": 8},
        {"hgmma": 0},
        {"shared_memory": ahead_of_time.SHARED_MEMORY + 1},
        {"warnings": ("(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized",)},
    ):
        assert len(dataclasses.replace(good, **change).faults(attention)) == 1
    assert not dataclasses.replace(good, hgmma=0).faults(FULL)


def test_what_cannot_be_checked_here_is_not_run_and_says_why() -> None:
    for gate, case in (("interpret", FULL), ("lower", CASE), ("compile", dataclasses.replace(FULL, backend="cudnn"))):
        verdict = gates.check(gate, case)
        assert verdict.passed is None
        assert verdict.reason


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_nan_and_infinity_never_pass(wrong: float) -> None:
    reference = np.ones((4, 3)), np.zeros(4, np.float32)
    spoilt = reference[0].copy()
    spoilt[1, 1] = wrong
    assert all(difference.passed for difference in numerics.compare(reference, reference, 1e-2))
    assert not numerics.compare((spoilt, reference[1]), reference, 1e-2)[0].passed
    lse = np.array([0, wrong, 0, 0], np.float32)
    assert not numerics.compare((reference[0], lse), reference, 1e-2)[1].passed


def test_a_log_sum_exp_is_compared_absolutely_and_empty_rows_must_agree() -> None:
    out, lse = np.ones((2, 3)), np.array([100.0, -np.inf], np.float32)
    near, far, full = lse + np.float32(5e-4), lse + np.float32(5e-3), np.array([100.0, -50.0], np.float32)
    passed = [numerics.compare((out, other), (out, lse), 1e-2)[1].passed for other in (near, far, full)]
    assert passed == [True, False, False]


def test_an_error_twice_that_of_xla_fails_within_the_tolerance_too() -> None:
    reference = np.ones(100)
    ours, theirs = reference + 8e-3, reference + 3e-3
    assert numerics.compare(ours, reference, 1e-2)[0].passed
    assert not numerics.compare(ours, reference, 1e-2, baseline=theirs)[0].passed
    assert numerics.compare(theirs, reference, 1e-2, baseline=theirs)[0].passed


def run_on(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets workloads ask for `backend` whatever they name."""
    for name in ("attention", "paged_attention"):
        operation = getattr(workloads, name)

        def served(*arrays: Any, operation: Any = operation, **options: Any) -> Any:
            return operation(*arrays, **{**options, "backend": backend})

        monkeypatch.setattr(workloads, name, served)


@pytest.mark.parametrize(
    "case",
    [
        workloads.forward(2, 16, True, 32),
        workloads.backward(2, 16, False, 32),
        workloads.decode(2, "bfloat16", 64, page=16, heads=4, kv_heads=2, width=16),
        workloads.decode(2, "int8", 64, page=16, heads=4, kv_heads=2, width=16),
        workloads.decode(2, "float8_e4m3fn", 64, page=16, heads=4, kv_heads=2, width=16),
        workloads.latent(2, 4, 64, page=16),
        workloads.large_pool(pages=13, layers=1, boundary=6),
    ],
    ids=lambda case: case.name,
)
def test_what_is_timed_is_also_compared_with_float32(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on("xla", monkeypatch)
    monkeypatch.setattr(timing, "WORKING_SET", 2**16)
    monkeypatch.setattr(timing, "SHORTEST", 0.0)
    (prepared,) = on_gpu.prepare([case], threads=1)
    result = on_gpu.measure(prepared, timing.Ceilings(copy=1e9, product=1e9))
    # The tolerances are those of the GPU: a product in bfloat16 here rounds as there. But xla rounds dequantised keys
    # to bfloat16 (2^-9 of each), which kernels do not, and a log-sum-exp of few slots shows it.
    errors = {d["kind"]: d["error"] for d in result.differences}
    assert errors["relative"] < case.tolerance
    assert errors.get("absolute", 0.0) < (5e-3 if "8" in case.name.split()[2] else numerics.LSE_TOLERANCE)
    assert result.low <= result.seconds <= result.high
    assert case.flops is None or result.of_product == pytest.approx(case.flops / result.seconds / 1e9)


def test_a_wrong_kernel_is_found_on_the_device_too() -> None:
    wrong = dataclasses.replace(FULL, call=lambda x: 2.001 * x)
    (prepared,) = on_gpu.prepare([wrong], threads=1)
    result = on_gpu.measure(prepared, None)
    assert result.passed is False
    assert "error 0.0005" in result.reason
    (broken,) = on_gpu.prepare([dataclasses.replace(FULL, call=lambda x: x @ x)], threads=1)
    assert "TypeError" in on_gpu.measure(broken, None).reason


def test_a_process_that_hangs_or_dies_costs_only_its_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    monkeypatch.syspath_prepend(str(tmp_path))
    cases = [dataclasses.replace(FULL, name=name) for name in ("hangs", "dies", "works")]
    verdicts = {v.case: v for v in gates.run("lower", cases, seconds=4, source="stubborn:cases")}
    assert "no answer" in verdicts["hangs"].reason
    assert "ended" in verdicts["dies"].reason
    assert [verdicts[name].passed for name in ("hangs", "dies", "works")] == [False, False, True]


def test_what_has_not_ended_in_time_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    monkeypatch.syspath_prepend(str(tmp_path))
    cases = [dataclasses.replace(FULL, name=name) for name in ("hangs", "works")]
    end = time.monotonic() + 4
    verdicts = list(gates.run("lower", cases, left=lambda: end - time.monotonic(), source="stubborn:cases"))
    assert [(verdict.passed, verdict.reason) for verdict in verdicts] == [(None, gates.OUT_OF_TIME)] * 2
    with on_gpu.Gpu(cases, 1, times=False, source="stubborn:cases") as gpu:
        result = gpu.run(cases[1], left=lambda: 0.0)
    assert (result.passed, result.reason) == (None, gates.OUT_OF_TIME)


def test_a_process_that_hangs_ends_with_the_one_that_asked(tmp_path: Path) -> None:
    """Killed without a chance to tidy up; a kernel that waits for ever would keep the GPU from the next run."""
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    (tmp_path / "asks.py").write_text(ASKS)
    paths = os.pathsep.join((str(tmp_path), str(Path(gates.__file__).parents[2])))
    environment = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "asks.py")], stdout=subprocess.PIPE, text=True, env=environment
    ) as asking:
        assert asking.stdout is not None
        pid = int(asking.stdout.readline())
        os.kill(pid, 0)
        asking.kill()
    for _ in range(600):
        if not alive(pid):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("it still hangs")


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked about does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_run_cut_off_before_its_first_result_leaves_no_older_one(tmp_path: Path) -> None:
    pytest.importorskip("tyro")
    from scripts.check_kernels import Arguments, main

    path = tmp_path / f"kernels_{tuning.device_name(device_kind())}.json"
    path.write_text("of an older run")
    only = "attention mosaic_gpu causal d64"
    assert main(Arguments(gates=("lower",), only=only, limit_seconds=0, out=tmp_path)) == 0
    found = json.loads(path.read_text())
    assert {case["gates"]["compile"] for case in found["cases"]} == {"not run"}
    assert gates.OUT_OF_TIME in {case["gates"]["lower"]["reason"] for case in found["cases"]}
    assert main(Arguments(gates=("lower",), only=only, limit_seconds=0, complete=True, out=tmp_path)) == 1


def test_a_kernel_that_hangs_on_the_device_costs_only_its_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    monkeypatch.syspath_prepend(str(tmp_path))
    cases = [dataclasses.replace(FULL, name=name) for name in ("waits", "works")]
    with on_gpu.Gpu(cases, 1, times=False, source="stubborn:cases") as gpu:
        results = [gpu.run(case, seconds=15 if case.name == "works" else 2) for case in cases]
    assert "no answer" in results[0].reason
    assert [result.passed for result in results] == [False, True]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there may be peers")
def test_peers_that_are_not_there_say_so() -> None:
    call = Call("forward", 1, 64, 64, 1, 1, 64, True)
    with Peers() as peers:
        answers = [peers.ask(name, call) for name in NAMES]
    assert all(peer.seconds is None for peer in answers)
    assert all(peer.reason for peer in answers)


def test_a_report_says_not_run_for_what_was_not_run_and_is_complete_after_each_case(tmp_path: Path) -> None:
    named = dataclasses.replace(FULL, name="target one")
    goal = Goal("copy", 0.9)
    report = Report([named, CASE], [Target(named, goal)], {}, "no NVIDIA GPU")
    path = report.write(tmp_path)
    first = json.loads(path.read_text())
    assert {case["gpu"] for case in first["cases"]} == {"not run"}
    assert first["cases"][0]["met"] == "not run"
    assert "not run (no NVIDIA GPU)" in path.with_suffix(".md").read_text()

    report.add_verdict(gates.Verdict(named.name, "lower", False, "wrong layout"))
    report.add_result(named, on_gpu.Result(True, seconds=1.0, low=1.0, high=1.0, of_copy=0.95))
    after = json.loads(report.write(tmp_path).read_text())
    assert after["cases"][0]["met"] is True
    assert report.failures == ["target one: lower: wrong layout"]
    report.add_result(named, on_gpu.Result(True, seconds=1.0, low=1.0, high=1.0, of_copy=0.85))
    assert report.rows[named.name].met is False
    report.add_result(named, on_gpu.Result(False, "NaN", seconds=1.0, of_copy=0.95))
    assert report.rows[named.name].met is False


def test_a_backward_pass_is_rated_without_the_forward_pass() -> None:
    forward, backward = (dataclasses.replace(FULL, name=name, flops=1e12) for name in ("forward", "backward"))
    targets = [Target(forward, Goal("peer", peer="cudnn")), Target(backward, Goal("rate", 4e11), forward="forward")]
    report = Report([forward, backward], targets, {}, None)
    report.add_result(backward, on_gpu.Result(True, seconds=3.0, flops=1e12 / 3))
    assert report.rows["backward"].met is None
    report.add_result(forward, on_gpu.Result(True, seconds=1.0, flops=1e12))
    assert report.rows["backward"].rate == pytest.approx(1e12 / 2)
    assert report.rows["backward"].met is True
    assert report.rows["forward"].met is None
    report.add_peer(forward, Peer("cudnn", 0.9))
    assert report.rows["forward"].met is False


def test_tables_answer_for_the_nearest_length_and_a_forced_configuration_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    key = tuning.Key("decode", "bfloat16", 128, 4, 64, tuning.bucket(5000), 8)
    assert key.length == 8192
    held = {dataclasses.replace(key, length=n): {"config": {"splits": n}} for n in (4096, 32768)}
    monkeypatch.setattr(tuning, "table", lambda operation, device: held)
    assert tuning.tuned("paged_attention", key) == {"splits": 4096}
    assert tuning.tuned("paged_attention", dataclasses.replace(key, length=65536)) == {"splits": 32768}
    assert tuning.tuned("paged_attention", dataclasses.replace(key, page=16)) is None
    with tuning.forced("paged_attention", "decode", {"splits": 3}):
        assert tuning.tuned("paged_attention", key) == {"splits": 3}
        assert tuning.tuned("attention", key) == {"splits": 4096}
    assert tuning.tuned("paged_attention", key) == {"splits": 4096}


def test_pruned_candidates_are_remembered_until_their_kernel_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = next(c for c in tune.all_candidates() if c.config is not None)
    pruned = tune.Pruned(tmp_path / "pruned.json")
    assert pruned.get(candidate) is None
    pruned.put(candidate, gates.Verdict(candidate.case.name, "compile", None, "no ptxas"))
    assert pruned.get(candidate) is None
    pruned.put(candidate, gates.Verdict(candidate.case.name, "compile", False, "no answer after 300 s", lost=True))
    assert pruned.get(candidate) is None
    pruned.put(candidate, gates.Verdict(candidate.case.name, "compile", False, "spills 8 bytes"))
    assert tune.Pruned(tmp_path / "pruned.json").get(candidate) is False
    monkeypatch.setattr(tune, "fingerprint", lambda kernel: "another")
    assert tune.Pruned(tmp_path / "pruned.json").get(candidate) is None


def test_names_of_candidates_and_of_cases_are_unique() -> None:
    names = [case.name for case in tune.candidate_cases()]
    assert len(names) == len(set(names))
    cases, absent = collect.collect()
    assert len(cases) == len({case.name for case in cases})
    assert not [reason for reason in absent.values() if reason.startswith("broken")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [case for case in collect.every_case() if gates.applies("lower", case) is None],
    ids=lambda case: f"{case.backend} {case.name}",
)
def test_every_case_lowers_for_its_device(case: Case) -> None:
    verdict = gates.check("lower", case)
    assert verdict.passed, verdict.reason


STUBBORN = """
import dataclasses, os, time
import jax
import jax.numpy as jnp
from pallas_kernels.checks.case import Case

def hangs(x):
    time.sleep(600)

def dies(x):
    os._exit(3)

def waits(x):
    return jax.pure_callback(lambda x: (time.sleep(600), x)[1], x, x)

def cases():
    for name, call in (("hangs", hangs), ("dies", dies), ("waits", waits), ("works", lambda x: x)):
        yield Case(name, "toy", "mosaic_gpu", "full", lambda seed: (jnp.ones(2),), call, call, 1e-6)
"""

ASKS = """
import threading, time
from pallas_kernels.checks.process import Process

with Process("pallas_kernels.checks.gates", "lower", "stubborn:cases") as process:
    process.ask("works", 300)
    threading.Thread(target=process.ask, args=("hangs", 600), daemon=True).start()
    time.sleep(1)
    print(process._process.pid, flush=True)
    time.sleep(600)
"""
