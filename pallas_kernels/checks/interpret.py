"""The first gate: a kernel interpreted on the CPU, thread by thread, with every access checked for races.

Interpret mode simulates shared memory, barriers and asynchronous copies of Mosaic GPU kernels. It needs jax 0.11.
Kernels for TPUs are interpreted block by block, for their numbers alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from pallas_kernels.checks.case import Case
from pallas_kernels.checks.numerics import Difference, compare

SECONDS = 240.0
"""After so long a kernel is taken to wait for an arrival that never comes."""


@dataclasses.dataclass
class Watch:
    """What interpreting found, complete once the context is left.

    Attributes:
      races: whether two threads touched the same memory without an order, one of them writing.
      timed_out: whether the kernel was stopped because it waited for too long.
    """

    races: bool = False
    timed_out: bool = False


def missing(backend: str = "mosaic_gpu") -> str | None:
    """Why a backend's kernels cannot be interpreted here, or None."""
    if backend == "mosaic_gpu" and jax.__version_info__ < (0, 11):
        return f"interpret mode with race detection needs jax 0.11, here is {jax.__version__}"
    if jax.default_backend() != "cpu":
        return f"interpret mode runs on the CPU, the default device here is {jax.default_backend()}"
    return None


@contextlib.contextmanager
def interpreted(seconds: float = SECONDS) -> Iterator[Watch]:
    """Within it, Mosaic GPU kernels are interpreted with race detection, one call at a time.

    A kernel that hangs, because a barrier waits for an arrival that nobody makes, is made to fail after `seconds`.
    Wait for the results (`jax.block_until_ready`) before leaving.

    Raises:
      TimeoutError: instead of whatever the stopped kernel raised.
    """
    # Older releases lack parts of these modules, where this file must be importable too.
    plgpu: Any = importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    gpu_callbacks: Any = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks")

    watch = Watch()

    def stop() -> None:
        memory = gpu_callbacks._shared_memory
        if memory is not None:
            watch.timed_out = True
            memory.set_failed(TimeoutError(f"no end after {seconds:g} s"), top_level=False)

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            yield watch
        # None where no kernel ran: there is nothing that could have raced.
        watch.races = gpu_callbacks._races is not None and gpu_callbacks.get_races().races_found
    except Exception as error:
        if watch.timed_out:
            raise TimeoutError(f"the kernel did not end within {seconds:g} s: an arrival is missing") from error
        raise
    finally:
        timer.cancel()
        gpu_callbacks.reset_gpu_interpret_mode_state()


@contextlib.contextmanager
def interpreted_tpu() -> Iterator[Watch]:
    """Within it, Pallas kernels for TPUs are interpreted, a grid's blocks one after another: nothing can race."""
    pltpu: Any = importlib.import_module("jax.experimental.pallas.tpu")
    # True is the interpreter of any Pallas kernel. That of TPUs alone fails on calls that were mapped over a batch.
    with pltpu.force_tpu_interpret_mode(True):
        yield Watch()


def run(case: Case, seed: int = 0, seconds: float = SECONDS) -> tuple[Watch, list[Difference]]:
    """Interprets a small case and compares it with its reference."""
    arguments = case.inputs(seed)
    with interpreted_tpu() if case.backend == "tpu" else interpreted(seconds) as watch:
        out: Any = jax.block_until_ready(jax.jit(case.call)(*arguments))
        out = jax.tree.map(np.asarray, out)
    with jax.default_matmul_precision("highest"):
        expected = jax.tree.map(np.asarray, jax.jit(case.reference)(*arguments))
    return watch, compare(out, expected, case.tolerance, lse_tolerance=case.lse_tolerance)
