"""Tuning tables and pruned candidates that are kept in the repository: they name what exists, and it can be built."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import tuning
from pallas_kernels.attention import mosaic_gpu_call
from pallas_kernels.checks import tune

ROOT = Path(pallas_kernels.__file__).parents[1]
TABLES = sorted(Path(pallas_kernels.__file__).parent.glob("*/tuning/*.json"))
PRUNED = ROOT / "docs" / "results" / "tuning_pruned.json"
FORWARD = tuning.Key("forward", "bfloat16", 128, 0, 0, 2048, 0)
DECODE = tuning.Key("decode", "bfloat16", 128, 4, 64, 4096, 8)


def entries() -> list[tuple[str, dict[str, Any]]]:
    """(operation, entry) of every table that is kept."""
    return [(path.parent.parent.name, entry) for path in TABLES for entry in json.loads(path.read_text())["entries"]]


@pytest.mark.parametrize(("operation", "entry"), entries())
def test_every_entry_of_a_kept_table_builds_its_kernel(operation: str, entry: dict[str, Any]) -> None:
    assert tune.invalid(operation, entry) is None
    assert entry["seconds"] > 0


@pytest.mark.parametrize(
    ("key", "config", "reason"),
    [
        (FORWARD, {"block": 64, "stages": 2, "consumers": 2}, None),
        (FORWARD, {"blocks": 64}, "unexpected keyword argument"),
        # 16 stages of keys and values are 512 KiB.
        (FORWARD, {"block": 64, "stages": 16, "consumers": 2}, "memory"),
        (DECODE, {"stages": 4, "splits": 2}, None),
        # Two consumers take turns with the stages.
        (DECODE, {"stages": 3, "splits": 2}, "stages"),
        (dataclasses.replace(DECODE, width=72), {"stages": 4}, "no workload"),
    ],
)
def test_an_entry_that_cannot_be_built_is_found(key: tuning.Key, config: dict[str, Any], reason: str | None) -> None:
    operation = "attention" if key.kernel == "forward" else "paged_attention"
    found = tune.invalid(operation, {"key": dataclasses.asdict(key), "config": config})
    assert found is None if reason is None else found is not None and reason in found


def test_an_entry_for_one_kernel_of_the_backward_pass_leaves_the_rest_to_the_heuristic() -> None:
    q = jax.ShapeDtypeStruct((1, 2048, 16, 128), jnp.bfloat16)
    forward, backward = mosaic_gpu_call._configs(q, q, q, False)
    with tuning.forced("attention", "dq", {"key_block": 2 * backward.key_block}):
        changed = dataclasses.replace(backward, key_block=2 * backward.key_block)
        assert mosaic_gpu_call._configs(q, q, q, False) == (forward, changed)


def test_a_device_without_a_table_takes_the_heuristic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "device_kind", lambda: "NVIDIA Z999 one of a kind")
    for workload in tune.all_workloads():
        assert tuning.tuned(workload.operation, workload.key) is None


def test_what_is_pruned_are_candidates_and_each_workload_keeps_some() -> None:
    verdicts = tune.Pruned(PRUNED).verdicts
    assert verdicts
    candidates = [candidate for candidate in tune.all_candidates() if candidate.compiled is not None]
    assert set(verdicts) <= {candidate.compiled for candidate in candidates}
    for workload in {candidate.workload for candidate in candidates}:
        mine = [verdicts.get(c.compiled or "") for c in candidates if c.workload == workload]
        assert any(verdict is None or verdict["passed"] for verdict in mine), workload


def test_one_verdict_serves_all_lengths_and_the_heuristic_needs_none() -> None:
    forward = [c for c in tune.all_candidates() if c.workload.key.kernel == "forward" and c.workload.key.width == 128]
    chosen = {
        c.compiled: {other.workload.key.length for other in forward if other.compiled == c.compiled} for c in forward
    }
    assert None in chosen
    assert all(lengths == {2048, 16384} for lengths in chosen.values())
