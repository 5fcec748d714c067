"""What the gates and the GPU found, as JSON and as pages: rewritten after every case, so that a run cut off counts."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from pallas_kernels.checks.case import Case
from pallas_kernels.checks.files import replace, write_results
from pallas_kernels.checks.gates import GATES, Verdict
from pallas_kernels.checks.on_gpu import Result
from pallas_kernels.checks.peers import Peer
from pallas_kernels.checks.targets import Goal, Target
from pallas_kernels.checks.timing import Ceilings
from pallas_kernels.device import device_kind
from pallas_kernels.tuning import device_name

NOT_RUN = "not run"
PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "jax-triton",
    "triton",
    "torch",
    "flashinfer-python",
    "nvidia-cuda-nvcc",
)


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Of Python and those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@dataclasses.dataclass
class Row:
    """All that is known of one case.

    Attributes:
      gates: gate -> verdict.
      gpu: None: not run.
      peers: what others took for the same call.
      rate: FLOP/s to hold against a goal: of a backward pass alone where that is the goal.
      goal, met: of a target; `met` None: not run.
    """

    case: Case
    gates: dict[str, Verdict] = dataclasses.field(default_factory=dict)
    gpu: Result | None = None
    peers: list[Peer] = dataclasses.field(default_factory=list)
    rate: float | None = None
    goal: Goal | None = None
    met: bool | None = None


@dataclasses.dataclass
class Report:
    """A run's findings.

    Attributes:
      rows: case name -> row, in order.
      absent: modules whose cases could not be had -> why.
      no_gpu: why nothing was measured, or None.
    """

    cases: list[Case]
    targets: list[Target]
    absent: dict[str, str]
    no_gpu: str | None
    ceilings: Ceilings | None = None

    def __post_init__(self) -> None:
        self.rows = {case.name: Row(case) for case in self.cases}
        self.date = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
        for target in self.targets:
            if target.case.name in self.rows:
                self.rows[target.case.name].goal = target.goal

    def add_verdict(self, verdict: Verdict) -> None:
        """Takes in what a gate said."""
        self.rows[verdict.case].gates[verdict.gate] = verdict

    def add_result(self, case: Case, result: Result) -> None:
        """Takes in what the GPU said."""
        self.rows[case.name].gpu = result
        self._judge()

    def add_peer(self, case: Case, peer: Peer) -> None:
        """Takes in what another library took."""
        self.rows[case.name].peers.append(peer)
        self._judge()

    def _judge(self) -> None:
        """Holds every target's figures against its goal."""
        for target in self.targets:
            row = self.rows.get(target.case.name)
            if row is None or row.gpu is None or row.gpu.passed is None:
                continue
            row.rate = row.gpu.flops
            if target.forward is not None and row.gpu.seconds is not None:
                forward = self.rows.get(target.forward)
                before = forward.gpu.seconds if forward is not None and forward.gpu is not None else None
                alone = row.gpu.seconds - (before or 0.0)
                row.rate = target.case.flops / alone if before and target.case.flops and alone > 0 else None
            row.met = self._met(row, target.goal)

    def _met(self, row: Row, goal: Goal) -> bool | None:
        assert row.gpu is not None
        if not row.gpu.passed:
            return False
        if goal.measure == "numbers":
            return True
        if goal.measure == "copy":
            return None if row.gpu.of_copy is None else row.gpu.of_copy >= goal.least
        if goal.measure == "rate":
            return None if row.rate is None else row.rate >= goal.least
        theirs = next((peer.seconds for peer in row.peers if peer.name == goal.peer), None)
        return None if theirs is None or row.gpu.seconds is None else row.gpu.seconds <= theirs * goal.least

    @property
    def failures(self) -> list[str]:
        """A line for everything that did not pass."""
        found = [f"{module}: {reason}" for module, reason in self.absent.items() if reason.startswith("broken")]
        for row in self.rows.values():
            verdicts = [(v.gate, v.passed, v.reason) for v in row.gates.values()]
            verdicts += [] if row.gpu is None else [("gpu", row.gpu.passed, row.gpu.reason)]
            found += [f"{row.case.name}: {gate}: {reason}" for gate, passed, reason in verdicts if passed is False]
        return found

    def summary(self, gate: str) -> str:
        """How many cases passed a gate, failed it, and were not run for which reasons; and what it took."""
        verdicts = [row.gates[gate] for row in self.rows.values() if gate in row.gates]
        ran = [verdict.passed for verdict in verdicts if verdict.passed is not None]
        reasons = collections.Counter(verdict.reason for verdict in verdicts if verdict.passed is None)
        spent = sum(verdict.processor_seconds for verdict in verdicts)
        parts = [f"{ran.count(True)} ok", f"{ran.count(False)} failed"]
        parts += [f"{count} {NOT_RUN} ({reason})" for reason, count in reasons.most_common()]
        return f"{gate}: {', '.join(parts)}; {spent:.0f} s of processor time"

    def as_json(self) -> dict[str, Any]:
        """Everything, as it is written."""
        return {
            "device": device_kind(),
            "date": self.date,
            "versions": versions(),
            "ceilings": NOT_RUN if self.ceilings is None else dataclasses.asdict(self.ceilings),
            "no_gpu": self.no_gpu,
            "absent": self.absent,
            "cases": [self._row_json(row) for row in self.rows.values()],
        }

    def _row_json(self, row: Row) -> dict[str, Any]:
        plain = {key: getattr(row.case, key) for key in ("name", "operation", "backend", "size")}
        gates = {gate: dataclasses.asdict(row.gates[gate]) if gate in row.gates else NOT_RUN for gate in GATES}
        target = {} if row.goal is None else {"goal": str(row.goal), "met": NOT_RUN if row.met is None else row.met}
        return {
            **plain,
            "gates": gates,
            "gpu": NOT_RUN if row.gpu is None else dataclasses.asdict(row.gpu),
            **({"peers": [dataclasses.asdict(peer) for peer in row.peers]} if row.peers else {}),
            **target,
        }

    def write(self, folder: Path) -> Path:
        """Writes kernels_DEVICE.json and .md, and, where kernels were compiled ahead of time, kernels_aot.md."""
        from pallas_kernels.checks.pages import compiled_page, page

        path = folder / f"kernels_{device_name(device_kind())}.json"
        write_results(path, self.as_json(), page(self))
        if any(row.gates["compile"].found for row in self.rows.values() if "compile" in row.gates):
            replace(folder / "kernels_aot.md", compiled_page(self))
        return path
