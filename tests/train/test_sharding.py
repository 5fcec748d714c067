"""Training on a mesh: the same numbers, less of the weights on each device."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from kvjax.checkpoint import load
from kvjax.config import ModelConfig
from kvjax.model import init
from kvjax.train import LoRA, finetune

PROGRAM = Path(__file__).with_name("eight_devices.py")
ENVIRONMENT = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(PROGRAM.parents[2]),
    "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
}


def observed(*arguments: str) -> dict[str, Any]:
    """What the program sees with eight devices."""
    flags = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
    command = [sys.executable, str(PROGRAM), *arguments]
    environment = {**ENVIRONMENT, "XLA_FLAGS": flags}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, Any]:
    return observed(str(tmp_path_factory.mktemp("mesh")))


def test_the_first_steps_on_eight_devices_are_those_on_one():
    found = observed()
    # The same float32 sums in another order.
    assert found["losses"] < 1e-5
    assert found["weights"] < 1e-5
    assert found["share"] < 0.27


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["dp", "fsdp", "tp", "dp x fsdp x tp", "adapters", "through a cache"])
def test_sharded_training_is_unsharded_training(seen, mesh):
    # Twenty steps of the same float32 sums in another order: found were 1.5e-6 of losses of 3.5, 3e-7 of weights of 1.
    # A gradient that is 0 but for rounding would be as long a step of Adam's as any other: here there is none.
    assert seen[mesh]["losses"] < 1e-5
    assert seen[mesh]["weights"] < 1e-5


@pytest.mark.slow
def test_each_device_holds_its_share(seen):
    assert seen["dp"]["share"] == 1
    assert seen["fsdp"]["share"] < 0.13
    # Norms stay whole, and the two key-value heads do not divide by four.
    assert seen["tp"]["share"] < 0.4
    assert seen["dp x fsdp x tp"]["share"] < 0.27


@pytest.mark.slow
def test_a_run_goes_on_on_a_mesh_of_another_shape(seen):
    assert seen["moved"]["steps"] == 10
    assert seen["moved"]["weights"] < 1e-5
    assert seen["moved"]["loaded"] == 0


@pytest.mark.slow
def test_a_run_is_loaded_onto_a_mesh(seen):
    assert seen["stacked"]["loaded"] == 0
    assert seen["stacked"]["share"] < 0.52


@pytest.mark.slow
def test_a_model_is_measured_along_the_decode_path_where_it_lies(seen):
    # Weights within 1e-5 of each other.
    assert seen["measured"] < 1e-5


@pytest.mark.slow
def test_rows_that_cannot_be_split_are_refused(seen):
    assert "take a multiple of 8" in seen["refused"]


@pytest.mark.slow
def test_two_processes_train_as_one_and_go_on_with_what_both_wrote(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    program = str(PROGRAM.with_name("two_processes.py"))
    pipes: dict[str, Any] = dict(env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    both = [subprocess.Popen([sys.executable, program, port, number, str(tmp_path)], **pipes) for number in "01"]
    told = []
    for process in both:
        out, error = process.communicate(timeout=1800)
        assert process.returncode == 0, error[-4000:]
        told.append(json.loads(out.splitlines()[-1]))
    assert told[0] == told[1]
    assert [len(told[0][name]) for name in ("first", "rest", "adapters")] == [3, 2, 2]
    # One device of one process.
    config = ModelConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
    )
    tokens = np.tile(np.random.default_rng(0).integers(0, 32, (16, 2)), (1, 8)).astype(np.int32)
    alone: list[float] = []
    model = finetune(
        init(config, dtype="float32"), tokens, 5, 8, 1e-3, report=lambda told: alone.append(told.numbers["loss"])
    )
    # The same float32 sums in another order.
    assert told[0]["first"] + told[0]["rest"] == pytest.approx(alone, abs=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), load(tmp_path / "run").params, model.params)
    adapted = finetune(init(config, dtype="float32"), tokens, 2, 8, 1e-3, trainable=LoRA(rank=2))
    found = load(tmp_path / "adapters").params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, adapted.params)
