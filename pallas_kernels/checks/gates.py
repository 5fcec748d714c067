"""The gates that need no GPU, each case in a process apart, so that one that hangs or crashes costs only itself.

`python -m pallas_kernels.checks.gates GATE SOURCE` is such a process: asked for a case by name, it answers with its
verdict as JSON. SOURCE is the `module:function` that gives the cases.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pallas_kernels import triton_call
from pallas_kernels.checks.case import Case
from pallas_kernels.checks.process import Lost, Process, answering

GATES = ("interpret", "lower", "compile")
"""In the order in which they find most."""
SECONDS = 300.0
"""A case that gives no answer for so long is given up."""
OUT_OF_TIME = "out of time"
TOGETHER = {"compile": 12}
"""Cases that one process takes in a row: neighbours have kernels in common, and a process compiles each once."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a gate says of a case.

    Attributes:
      passed: None: not run, and `reason` says why.
      reason: why it failed or was not run; "" where there is nothing to say.
      seconds: how long it took. processor_seconds: of all cores, compilers' processes included; what a machine that
        does other work at the same time still tells.
      found: numbers: differences of "interpret", kernels of "compile".
      lost: its process hung or ended, which may be the machine's fault: nothing is known of the kernel.
    """

    case: str
    gate: str
    passed: bool | None
    reason: str = ""
    seconds: float = 0.0
    processor_seconds: float = 0.0
    found: tuple[dict[str, Any], ...] = ()
    lost: bool = False


def applies(gate: str, case: Case) -> str | None:
    """Why a gate is not for this case, or None."""
    if gate == "interpret":
        if case.backend not in ("mosaic_gpu", "tpu"):
            return f"{case.backend} has no interpret mode with race detection"
        return None if case.size == "small" else "too large to interpret"
    if case.size == "small":
        return "a case of interpret mode"
    if case.backend == "triton":
        return triton_call.absent()
    if case.backend == "tpu":
        return "there is no compiler for TPUs without one" if gate == "compile" else None
    if case.backend == "xla":
        return "XLA makes its kernels itself, when it compiles for a GPU" if gate == "compile" else None
    return "cuDNN cannot be lowered without a GPU" if case.backend == "cudnn" else None


def check(gate: str, case: Case) -> Verdict:
    """Runs one gate on one case, in this process. Whatever the kernel raises is the finding."""
    from pallas_kernels.checks import ahead_of_time, interpret, lowering

    missing: dict[str, Callable[[], str | None]] = {
        "interpret": lambda: interpret.missing(case.backend),
        "lower": lambda: None,
        "compile": ahead_of_time.missing,
    }
    if (reason := applies(gate, case) or missing[gate]()) is not None:
        return Verdict(case.name, gate, None, reason)
    begun, spent = time.perf_counter(), _processor_seconds()
    found: list[dict[str, Any]] = []
    faults: list[str] = []
    try:
        if gate == "interpret":
            watch, differences = interpret.run(case)
            found = [dataclasses.asdict(difference) for difference in differences]
            faults = ["data races"] * watch.races
            faults += [f"{d.output}: error {d.error:.2g}, allowed {d.allowed:g}" for d in differences if not d.passed]
        elif gate == "lower":
            lowering.lower(case)
        else:
            kernels = ahead_of_time.compile_case(case)
            found = [dataclasses.asdict(kernel) for kernel in kernels]
            faults = [f"{kernel.name}: {fault}" for kernel in kernels for fault in kernel.faults(case)]
            faults += [] if kernels else ["no kernel in it but XLA's own"]
    except Exception as error:
        faults.append(brief(error))
    seconds, spent = round(time.perf_counter() - begun, 2), round(_processor_seconds() - spent, 2)
    return Verdict(case.name, gate, not faults, "; ".join(faults), seconds, spent, tuple(found))


def _processor_seconds() -> float:
    """What this process and its ended children have used of all cores."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def brief(error: Exception) -> str:
    """An exception in a line. What comes out of a callback holds whole tracebacks: only their last line tells."""
    text = str(error).strip()
    if "Traceback (most recent call last)" in text:
        text = text.splitlines()[-1]
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {text}")[:600]


def serve(gate: str, source: str) -> None:
    """Answers each name of a case with its verdict."""
    module, function = source.split(":")
    cases = {case.name: case for case in getattr(importlib.import_module(module), function)()}
    with answering() as (questions, answers):
        for line in questions:
            print(json.dumps(dataclasses.asdict(check(gate, cases[line.strip()]))), file=answers, flush=True)


def _ask(worker: Process, gate: str, name: str, seconds: float, left: Callable[[], float]) -> Verdict:
    begun = time.perf_counter()
    try:
        answer = json.loads(worker.ask(name, min(seconds, left())))
    except Lost as lost:
        if left() <= 0:
            return Verdict(name, gate, None, OUT_OF_TIME)
        return Verdict(name, gate, False, str(lost), round(time.perf_counter() - begun, 2), lost=True)
    return Verdict(**{**answer, "found": tuple(answer["found"])})


def _rows(cases: Sequence[Case], longest: int, workers: int) -> Iterator[Sequence[Case]]:
    """The cases in rows for the processes to take, shorter ones towards the end, so that all end at about one time."""
    first = 0
    while first < len(cases):
        length = min(max((len(cases) - first) // (2 * workers), 1), longest)
        yield cases[first : first + length]
        first += length


def run(
    gate: str,
    cases: Sequence[Case],
    *,
    workers: int = 1,
    seconds: float = SECONDS,
    left: Callable[[], float] = lambda: math.inf,
    source: str = "pallas_kernels.checks.collect:every_case",
) -> Iterator[Verdict]:
    """The verdicts of one gate on many cases, as they come, from `workers` processes.

    Args:
      seconds: what one case may take.
      left: seconds until all must be over; then the rest is "not run", and so is what was begun and not ended.
      source: the `module:function` that gives these cases, by which a process finds them.
    """
    todo: queue.SimpleQueue[Sequence[Case]] = queue.SimpleQueue()
    done: queue.SimpleQueue[Verdict] = queue.SimpleQueue()
    for row in _rows(cases, TOGETHER.get(gate, 1), workers):
        todo.put(row)

    def verdict(worker: Process, case: Case) -> Verdict:
        if (reason := applies(gate, case)) is not None:
            return Verdict(case.name, gate, None, reason)
        return (
            _ask(worker, gate, case.name, seconds, left) if left() > 0 else Verdict(case.name, gate, None, OUT_OF_TIME)
        )

    def work() -> None:
        # Without a GPU in sight, so that one at work is left alone; nothing from an earlier run.
        # Interpreted warpgroups are threads that wait for one another, each on a thread of XLA's: one per core would be
        # too few.
        environment = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "NPROC": "16"}
        if gate == "interpret":
            # A quarter of the time is LLVM's, whose optimisations a program that runs once does not earn back.
            flags = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"
            environment["XLA_FLAGS"] = flags.strip()
        worker = Process("pallas_kernels.checks.gates", gate, source, environment=environment)
        try:
            while True:
                for case in todo.get_nowait():
                    done.put(verdict(worker, case))
        except queue.Empty:
            pass
        finally:
            worker.close()

    for _ in range(min(workers, len(cases))):
        threading.Thread(target=work, daemon=True).start()
    for _ in cases:
        yield done.get()


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2])
