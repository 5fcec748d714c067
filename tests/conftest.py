"""What every test shares: light XLA settings, a compilation cache, and who may run where.

The environment is set before jax is imported, which is why it happens at the top of this file and not in a fixture.
"""

from __future__ import annotations

import gc
import importlib.metadata
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

# An empty JAX_PLATFORMS (`make test-all`) lets jax choose; unset means the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The older way of compiling fusions takes a third of the time. `make test-all` takes the way that users get; jaxlib 0.11
# and later have no other, and refuse flags that they do not know.
HAS_OLD_FUSIONS = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11)
OLD_FUSIONS = HAS_OLD_FUSIONS and os.environ.get("KVJAX_TEST_FUSIONS") != "new"
# Several test processes share few cores: one thread each beats many that wait for one another.
os.environ["XLA_FLAGS"] = " ".join(
    (
        # Most of a test's time is LLVM's; without its optimisations programs compute the same, and XLA's own stay.
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false" if OLD_FUSIONS else "",
        os.environ.get("XLA_FLAGS", ""),
        "--xla_cpu_multi_thread_eigen=false",
        "intra_op_parallelism_threads=1",
    )
).strip()

import jax
import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Random examples come from a fixed seed, so that a red run is red again; the first call of an example may compile.
settings.register_profile("kvjax", deadline=None, derandomize=True)
settings.load_profile("kvjax")


MOST_MAPPINGS = 20_000
"""Memory mappings after which a test process drops its compiled programs: Linux allows 65,530, and each takes some."""


TESTS = itertools.count(1)
"""Run so far; counting the mappings takes milliseconds, so that only every sixteenth test does."""


@pytest.fixture(autouse=True)
def compiled_programs_do_not_pile_up() -> Iterator[None]:
    """Between tests: a process that has compiled some thousand programs would be aborted."""
    yield
    mappings = Path("/proc/self/maps")
    if next(TESTS) % 16 == 0 and mappings.exists() and len(mappings.read_bytes().splitlines()) > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests/kernels, and skips what asks for a GPU where there is none."""
    no_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU, and jax sees none")
    gpu = any(device.platform == "gpu" for device in jax.devices())
    for item in items:
        if "kernels" in item.path.relative_to(ROOT / "tests").parts[:-1]:
            item.add_marker(pytest.mark.kernels)
        if not gpu and item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)
