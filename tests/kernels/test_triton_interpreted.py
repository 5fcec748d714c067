"""Triton kernels on the CPU, by Triton's own interpreter, against the reference: small cases, NaN in every unused slot.

Triton decides when a kernel is defined whether it is interpreted, so all of them run in one process apart.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pallas_kernels import triton_call
from pallas_kernels.checks import triton_interpreter

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 600

pytestmark = pytest.mark.skipif(triton_call.absent() is not None, reason=str(triton_call.absent()))


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """The interpreter's answers, by case."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pallas_kernels.checks.triton_interpreter"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return {answer["case"]: answer["differences"] for answer in answers}


@pytest.mark.parametrize("name", [case.name for case in triton_interpreter.small_cases()])
def test_a_small_case_equals_its_reference(name: str, found: dict[str, Any]) -> None:
    # Tolerances are the case's own: a few roundings of float16.
    assert found[name]
    for difference in found[name]:
        assert difference["passed"], difference


def test_the_properties_hold() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    properties = Path(__file__).with_name("triton_properties.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(properties)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "skipped" not in done.stdout


def test_nothing_is_interpreted_unless_the_environment_said_so_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), triton_interpreter.interpreted():
        pass
