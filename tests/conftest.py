"""What every test shares: light XLA settings, a compilation cache, and who may run where.

The environment is set before jax is imported, which is why it happens at the top of this file and not in a fixture.
"""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from tests.xla_flags import xla_flags

# An empty JAX_PLATFORMS (`make test-all`) lets jax choose; unset means the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = xla_flags()

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
