"""Proves and measures every kernel: in interpret mode, lowered, compiled ahead of time, and on a GPU if there is one.

    python scripts/check_kernels.py
    python scripts/check_kernels.py --gates lower compile --only "paged_attention mosaic_gpu"

Writes kernels_DEVICE.json and .md after every case, targets first, so that a run cut off leaves what it has found.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

# Several processes share the GPU's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import tyro
from rich.console import Console

from pallas_kernels.checks import on_gpu, peers
from pallas_kernels.checks.collect import collect, select
from pallas_kernels.checks.gates import GATES, OUT_OF_TIME, SECONDS, run
from pallas_kernels.checks.report import Report
from pallas_kernels.checks.targets import Target, targets

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass
class Arguments:
    """What is checked."""

    gates: tuple[Literal["interpret", "lower", "compile", "numbers", "times", "peers"], ...] = (
        "numbers",
        "times",
        "peers",
        "lower",
        "compile",
        "interpret",
    )
    """Which checks; the last three of these need no GPU."""
    only: str = ""
    """Words that a case's operation, backend and name must hold."""
    limit_seconds: float = 450.0
    """Everything ends at this time; what was left out, or had not ended, says "not run"."""
    case_seconds: float = SECONDS
    """What one case may take in a gate without a GPU."""
    workers: int = max((os.cpu_count() or 2) - 2, 1)
    """Processes, and threads that compile."""
    complete: bool = False
    """Time running out is a failure too."""
    out: Path = ROOT / "docs" / "results"
    """The folder that is written to."""


def on_the_gpu(arguments: Arguments, report: Report, left: Callable[[], float], console: Console) -> None:
    """Numbers, times and peers: compiled many at a time, measured one at a time."""
    cases = []
    for case in report.cases:
        if (reason := on_gpu.applies(case)) is None:
            cases.append(case)
        else:
            report.add_result(case, on_gpu.Result(None, reason))
    wanted = {target.case.name: target for target in report.targets}
    with on_gpu.Gpu(cases, arguments.workers, times="times" in arguments.gates) as gpu, peers.Peers() as others:
        for case in cases:
            if left() <= 0:
                break
            result = gpu.run(case, left=left)
            report.ceilings = gpu.ceilings or report.ceilings
            report.add_result(case, result)
            took = "" if result.seconds is None else f" {1e3 * result.seconds:.3f} ms"
            outcome = "not run: " if result.passed is None else "FAIL "
            console.print(f"gpu {case.name}: {'ok' if result.passed else outcome + result.reason}{took}")
            report.write(arguments.out)
            if case.name in wanted and "peers" in arguments.gates:
                against_peers(wanted[case.name], report, others, left)
                report.write(arguments.out)


def against_peers(target: Target, report: Report, others: peers.Peers, left: Callable[[], float]) -> None:
    """What others take for a target's call."""
    for name in peers.NAMES if target.peer_call is not None else ():
        if (seconds := min(left(), peers.SECONDS)) > 0:
            assert target.peer_call is not None
            report.add_peer(target.case, others.ask(name, target.peer_call, seconds))


def main(arguments: Arguments) -> int:
    """Checks, prints and writes; 1 if anything failed."""
    console = Console(highlight=False, soft_wrap=True)
    deadline = time.monotonic() + arguments.limit_seconds

    def left() -> float:
        return deadline - time.monotonic()

    cases, absent = collect()
    report = Report(select(cases, arguments.only), targets(), absent, on_gpu.missing())
    for module, reason in absent.items():
        console.print(f"{module}: {reason}")
    # Whoever cuts the run off before its first result finds no older run's in its place.
    report.write(arguments.out)
    if report.no_gpu is None and {"numbers", "times"} & set(arguments.gates):
        on_the_gpu(arguments, report, left, console)
    for gate in (gate for gate in arguments.gates if gate in GATES):
        for verdict in run(gate, report.cases, workers=arguments.workers, seconds=arguments.case_seconds, left=left):
            report.add_verdict(verdict)
            if verdict.passed is not None:
                outcome = "ok" if verdict.passed else f"FAIL {verdict.reason}"
                took = f"{verdict.seconds:.1f} s, {verdict.processor_seconds:.1f} s of processor time"
                console.print(f"{gate} {verdict.case}: {outcome} ({took})")
                report.write(arguments.out)
        console.print(report.summary(gate))
    path = report.write(arguments.out)
    console.print(f"{len(report.cases)} cases, {len(report.failures)} failures: {path.with_suffix('.md')}")
    late = arguments.complete and any(
        verdict.reason == OUT_OF_TIME for row in report.rows.values() for verdict in row.gates.values()
    )
    return 1 if report.failures or late or not report.cases else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
