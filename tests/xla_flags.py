"""The XLA flags of test processes: what compiles quickly, in one thread. Imports no jax, which reads them once."""

from __future__ import annotations

import importlib.metadata
import os


def xla_flags() -> str:
    """Flags for the environment; those that are in it already count for more."""
    # Most of a test's time is LLVM's; without its optimisations programs compute the same, and XLA's own stay.
    quick = ["--xla_backend_optimization_level=0"]
    # The older way of compiling fusions takes a third of the time. `make test-all` takes the way that users get; jaxlib
    # 0.11 and later have no other, and refuse flags that they do not know.
    release = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
    if release < (0, 11) and os.environ.get("KVJAX_TEST_FUSIONS") != "new":
        quick.append("--xla_cpu_use_fusion_emitters=false")
    # Several test processes share few cores: one thread each beats many that wait for one another.
    alone = ["--xla_cpu_multi_thread_eigen=false", "intra_op_parallelism_threads=1"]
    return " ".join([*quick, os.environ.get("XLA_FLAGS", ""), *alone]).strip()
