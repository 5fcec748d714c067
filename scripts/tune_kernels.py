"""Finds the fastest configuration of every kernel: prunes candidates without a GPU, and times the rest on one.

    python scripts/tune_kernels.py            # on a machine without a GPU: only prunes
    python scripts/tune_kernels.py --only "attention forward"

Prunes by compiling ahead of time for an H100: what spills or needs too much shared memory is never timed. On a GPU
writes pallas_kernels/<operation>/tuning/<device>.json after every workload.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import tyro
from rich.console import Console

import pallas_kernels
from pallas_kernels.checks import ahead_of_time, gates, on_gpu, tune
from pallas_kernels.device import device_kind
from pallas_kernels.tuning import device_name

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass
class Arguments:
    """What is tuned."""

    only: str = ""
    """Words that a candidate's operation, backend and name must hold."""
    limit_seconds: float = 480.0
    """Everything ends at this time; what was not pruned by then is timed, or pruned by the next run."""
    workers: int = max((os.cpu_count() or 2) - 2, 1)
    """Processes that compile."""
    pruned: Path = ROOT / "docs" / "results" / "tuning_pruned.json"
    """Which candidates compile without a fault."""


def prune(
    candidates: list[tune.Candidate], pruned: tune.Pruned, arguments: Arguments, deadline: float, console: Console
) -> None:
    """Compiles the candidates whose verdict is not known, one of those that are the same to the compiler."""
    unknown = {
        candidate.compiled: candidate
        for candidate in reversed(candidates)
        if candidate.compiled is not None and pruned.get(candidate) is None
    }
    by_case = {candidate.case.name: candidate for candidate in unknown.values()}
    verdicts = gates.run(
        "compile",
        [candidate.case for candidate in by_case.values()],
        workers=arguments.workers,
        left=lambda: deadline - time.monotonic(),
        source="pallas_kernels.checks.tune:candidate_cases",
    )
    for verdict in verdicts:
        pruned.put(by_case[verdict.case], verdict)
        if verdict.passed is not None:
            outcome = "ok" if verdict.passed else f"pruned: {verdict.reason}"
            console.print(f"{by_case[verdict.case].compiled}: {outcome}")


def fastest(
    workload: tune.Workload, candidates: list[tune.Candidate], gpu: on_gpu.Gpu, deadline: float, console: Console
) -> dict[str, Any] | None:
    """The table's entry for a workload; None where nothing beat the heuristic, or nothing ran."""
    times: list[tuple[float, tune.Candidate]] = []
    for candidate in candidates:
        if time.monotonic() > deadline:
            return None
        result = gpu.run(candidate.case, left=lambda: deadline - time.monotonic())
        if result.passed and result.seconds is not None:
            times.append((result.seconds, candidate))
        took = "" if result.seconds is None else f" {1e3 * result.seconds:.3f} ms"
        console.print(f"{candidate.case.name}: {'ok' if result.passed else 'FAIL ' + result.reason}{took}")
    if not times:
        return None
    seconds, best = min(times, key=lambda pair: pair[0])
    if best.config is None:
        return None
    heuristic = next((taken for taken, candidate in times if candidate.config is None), None)
    return tune.entry(workload, best.config, seconds, heuristic)


def main(arguments: Arguments) -> int:
    """Prunes, and times what is left if there is a GPU."""
    console = Console(highlight=False, soft_wrap=True)
    deadline = time.monotonic() + arguments.limit_seconds
    words = arguments.only.lower().split()
    candidates = [
        candidate
        for candidate in tune.all_candidates()
        if all(word in f"{candidate.workload.operation} {candidate.case.name}".lower() for word in words)
    ]
    pruned = tune.Pruned(arguments.pruned)
    if (reason := ahead_of_time.missing()) is None:
        # On a GPU at least half of the time is for timing.
        timing = 0.0 if on_gpu.missing() is not None else arguments.limit_seconds / 2
        prune(candidates, pruned, arguments, deadline - timing, console)
    else:
        console.print(f"not pruned: {reason}")
    left = [candidate for candidate in candidates if pruned.get(candidate) is not False]
    if on_gpu.missing() is None:
        left = [candidate for candidate in left if candidate.workload.serves_here()]
    console.print(f"{len(left)} of {len(candidates)} candidates are left to time")
    if (reason := on_gpu.missing()) is not None:
        console.print(f"not timed: {reason}")
        return 0
    folder, device = Path(pallas_kernels.__file__).parent, device_kind()
    source = "pallas_kernels.checks.tune:candidate_cases"
    with on_gpu.Gpu([candidate.case for candidate in left], arguments.workers, source=source) as gpu:
        for workload in dict.fromkeys(candidate.workload for candidate in left):
            mine = [candidate for candidate in left if candidate.workload == workload]
            found = fastest(workload, mine, gpu, deadline, console)
            if found is not None:
                path = folder / workload.operation / "tuning" / f"{device_name(device)}.json"
                tune.write_table(path, device, [found])
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
