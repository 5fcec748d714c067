"""Speed end to end, of what the default device is for: `gpu` where that is a GPU, else `cpu`.

    python scripts/benchmark.py --out docs/results/benchmark_cpu     # on a CPU: a small model against transformers
    python scripts/benchmark.py --out docs/results                   # on a GPU: a model of 8B against its limits
    python scripts/benchmark.py gpu --tiny --out results             # the GPU's measurement on any device: it runs
    python scripts/benchmark.py gpu --help                           # all options of one of them

`cpu` is benchmark_cpu.py beside this file and `gpu` is benchmark_gpu.py, each with options of its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

KINDS = ("cpu", "gpu")


def kind_here() -> str:
    """The kind for the default device."""
    import jax

    return "gpu" if jax.default_backend() == "gpu" else "cpu"


def command(arguments: Sequence[str]) -> list[str]:
    """What is run for these arguments: the script of the kind they begin with, else of the default device's."""
    named = bool(arguments) and arguments[0] in KINDS
    kind, rest = (arguments[0], arguments[1:]) if named else (kind_here(), arguments)
    return [sys.executable, str(Path(__file__).with_name(f"benchmark_{kind}.py")), *rest]


def main(arguments: Sequence[str]) -> None:
    """Becomes that script: a process beside it would hold on to memory of the GPU."""
    run = command(arguments)
    os.execv(run[0], run)


if __name__ == "__main__":
    main(sys.argv[1:])
