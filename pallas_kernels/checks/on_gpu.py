"""The last gate, on a GPU: numbers against the float32 reference, and times.

A kernel that waits for what never comes would wait for ever, so kernels run in a process of their own
(`python -m pallas_kernels.checks.on_gpu`), which is ended when it does not answer and started again for the rest.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from pallas_kernels import tuning
from pallas_kernels.checks import timing
from pallas_kernels.checks.case import Case
from pallas_kernels.checks.gates import OUT_OF_TIME, brief
from pallas_kernels.checks.lowering import shapes
from pallas_kernels.checks.numerics import compare
from pallas_kernels.checks.process import Lost, Process, answering
from pallas_kernels.device import compute_capability

SECONDS = 60.0
"""What a case may take, once it is compiled: then its kernel is taken to wait for ever."""
COMPILE_SECONDS = 240.0
"""What compiling a batch may take."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a GPU says of a case.

    Attributes:
      passed: whether every output is near enough to its reference; None: not run, and `reason` says why.
      differences: one per output, as dictionaries of `numerics.Difference`.
      seconds, low, high: of one call; None: not timed.
      flops, bandwidth: a second; of_product, of_copy: shares of what the device was measured to do.
    """

    passed: bool | None
    reason: str = ""
    differences: tuple[dict[str, Any], ...] = ()
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    flops: float | None = None
    bandwidth: float | None = None
    of_product: float | None = None
    of_copy: float | None = None


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A case with its programs compiled, or the exception that compiling one of them raised."""

    case: Case
    program: Any = None
    reference: Any = None
    baseline: Any = None
    error: Exception | None = None


def missing() -> str | None:
    """Why nothing can be measured here, or None."""
    return None if compute_capability() is not None else "no NVIDIA GPU"


def applies(case: Case) -> str | None:
    """Why a case cannot run on the default device, or None."""
    if case.size == "small":
        return "a case of interpret mode"
    if case.backend == "tpu":
        return "needs a TPU"
    here = compute_capability()
    if here not in case.device:
        return f"needs compute capability {' or '.join(case.device)}, here is {here}"
    return None


def prepare(cases: list[Case], threads: int) -> list[Prepared]:
    """Compiles the programs of several cases at once."""

    def one(case: Case) -> Prepared:
        try:
            given = shapes(case)
            program = timing.compiled(case.call, given)
            # By default products of float32 are rounded to fewer bits on tensor cores.
            with jax.default_matmul_precision("highest"):
                reference = jax.jit(case.reference).lower(*given).compile()
            baseline = None if case.baseline is None else jax.jit(case.baseline).lower(*given).compile()
        except Exception as error:
            return Prepared(case, error=error)
        return Prepared(case, program, reference, baseline)

    # What was tuned since the last ones were compiled counts for these.
    tuning.table.cache_clear()
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, cases))


def measure(prepared: Prepared, ceilings: timing.Ceilings | None, seed: int = 0) -> Result:
    """Compares and, given the device's ceilings, times. Whatever the kernel raises is the finding."""
    case = prepared.case
    if prepared.error is not None:
        return Result(False, brief(prepared.error))
    try:
        first = case.inputs(seed)
        sets = (first, *(case.inputs(seed + i) for i in range(1, timing.rotations(first))))
        out, reference = prepared.program(sets)[0], prepared.reference(*first)
        baseline = None if prepared.baseline is None else prepared.baseline(*first)
        differences = compare(out, reference, case.tolerance, baseline, case.lse_tolerance)
        faults = [f"{d.output}: error {d.error:.2g} of {d.allowed:g}" for d in differences if not d.passed]
        del out, reference, baseline
        result = Result(not faults, "; ".join(faults), tuple(dataclasses.asdict(d) for d in differences))
        if ceilings is None:
            return result
        return _with_times(result, case, timing.time_program(prepared.program, sets), ceilings)
    except Exception as error:
        return Result(False, brief(error))


def _with_times(result: Result, case: Case, taken: timing.Timing, ceilings: timing.Ceilings) -> Result:
    flops = None if case.flops is None else case.flops / taken.seconds
    bandwidth = None if case.bytes_moved is None else case.bytes_moved / taken.seconds
    return dataclasses.replace(
        result,
        seconds=taken.seconds,
        low=taken.low,
        high=taken.high,
        flops=flops,
        bandwidth=bandwidth,
        of_product=None if flops is None else flops / ceilings.product,
        of_copy=None if bandwidth is None else bandwidth / ceilings.copy,
    )


class Gpu:
    """The process that has the GPU. It compiles cases many at a time, in the order given, and runs one when asked.

    Args:
      cases: in the order in which they will be asked for.
      times: whether to time as well.
      source: the `module:function` that gives the cases.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        threads: int,
        *,
        times: bool = True,
        source: str = "pallas_kernels.checks.collect:every_case",
    ) -> None:
        self._names = [case.name for case in cases]
        self._asked = {"threads": threads, "times": times, "source": source}
        self._process = Process("pallas_kernels.checks.on_gpu")
        self.ceilings: timing.Ceilings | None = None

    def __enter__(self) -> Gpu:
        """Starts nothing yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the process."""
        self._process.close()

    def run(self, case: Case, seconds: float = SECONDS, left: Callable[[], float] = lambda: math.inf) -> Result:
        """Compares and times a case; whatever happens to the process is the finding.

        left: seconds until all must be over; a case that has not ended by then is not run.
        """

        def ask(question: str, most: float) -> str:
            return self._process.ask(question, min(most, left()))

        try:
            if not self._process.running:
                todo = self._names[self._names.index(case.name) :]
                found = json.loads(ask(json.dumps({**self._asked, "cases": todo}), COMPILE_SECONDS))
                self.ceilings = None if found is None else timing.Ceilings(**found)
            ask(f"prepare {case.name}", COMPILE_SECONDS)
            answer = json.loads(ask(f"measure {case.name}", seconds))
        except Lost as lost:
            return Result(None, OUT_OF_TIME) if left() <= 0 else Result(False, str(lost))
        return Result(**{**answer, "differences": tuple(answer["differences"])})


def serve() -> None:
    """The process's own side. Answers what to expect with the ceilings, `prepare CASE` with nothing, `measure CASE`."""
    with answering() as (questions, answers):
        asked = json.loads(next(questions))
        module, function = asked["source"].split(":")
        cases = {case.name: case for case in getattr(importlib.import_module(module), function)()}
        ceilings = timing.ceilings() if asked["times"] else None
        print(json.dumps(None if ceilings is None else dataclasses.asdict(ceilings)), file=answers, flush=True)
        todo, ready = list(asked["cases"]), dict[str, Prepared]()
        for line in questions:
            what, name = line.strip().split(" ", 1)
            if what == "prepare":
                if name not in ready:
                    todo = todo[todo.index(name) :]
                    batch, todo = todo[: asked["threads"]], todo[asked["threads"] :]
                    ready = {made.case.name: made for made in prepare([cases[one] for one in batch], asked["threads"])}
                print(file=answers, flush=True)
            else:
                result = measure(ready.pop(name), ceilings)
                print(json.dumps(dataclasses.asdict(result)), file=answers, flush=True)


if __name__ == "__main__":
    serve()
