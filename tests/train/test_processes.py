"""scripts/finetune.py in several processes: what the file and the command line may say, and two that share a run."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import kvjax
from kvjax.errors import ConfigError
from kvjax.train.processes import Processes, check_shared, told_to_all
from kvjax.train.run_toml import RunFile
from scripts.finetune import Arguments, join, main, read_log
from tests.train.test_script import TOML
from tests.train.test_script import folder as folder  # a fixture
from tests.train.test_sharding import ENVIRONMENT

SCRIPT = Path(__file__).parents[2] / "scripts" / "finetune.py"
SHARED = """
[mesh]
axes = ["fsdp"]
shape = [2]
[distributed]
coordinator = "localhost:1"
processes = 2
"""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(), "coordinator must be the first process's 'host:port'.*got None"),
        (dict(coordinator="node1", processes=2), "'host:port'.*got 'node1'"),
        (dict(coordinator="node1:99999", processes=2), "'host:port'.*got 'node1:99999'"),
        (dict(coordinator="node1:1234"), "processes must be an integer of at least 1, got None"),
        (dict(coordinator="node1:1234", processes=0), "processes must be an integer of at least 1, got 0"),
        (dict(coordinator="node1:1234", processes=2, process=2), r"from 0 to processes - 1 \(1\), got 2"),
        (dict(coordinator="node1:1234", processes=2, process=True), "got True"),
        (dict(auto="yes"), "auto must be true or false, got 'yes'"),
        (dict(auto=True, processes=2), "distributed.processes is given too; leave one out"),
    ],
)
def test_processes_that_cannot_be_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        Processes(**given)


def test_the_command_line_says_what_the_file_leaves_open(monkeypatch, tmp_path):
    begun: list[Any] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **_: begun.append(given))
    file = Processes("node1:1234", 2)
    with pytest.raises(ConfigError, match="which of the 2 processes is this"):
        join(file, Arguments(tmp_path))
    join(file, Arguments(tmp_path, process=1))
    join(file, Arguments(tmp_path, process=0, processes=4, coordinator="node2:5"))
    join(None, Arguments(tmp_path, process=0, processes=4, coordinator="node2:5"))
    join(None, Arguments(tmp_path))
    assert begun == [("node1:1234", 2, 1), ("node2:5", 4, 0), ("node2:5", 4, 0)]
    with pytest.raises(ConfigError, match="--process 1 of how many"):
        join(None, Arguments(tmp_path, process=1))
    with pytest.raises(ConfigError, match="distributed.process is given too"):
        join(Processes(auto=True), Arguments(tmp_path, process=1))


def test_a_cluster_that_says_nothing_is_told_as_such(monkeypatch):
    def nothing() -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nothing)
    with pytest.raises(ConfigError, match="nothing here tells of a cluster"):
        Processes(auto=True).join()


def test_a_file_names_the_processes(folder):
    (folder / "run.toml").write_text(TOML + SHARED)
    assert RunFile.from_toml(folder / "run.toml").distributed == Processes("localhost:1", 2)
    (folder / "run.toml").write_text(TOML + SHARED + "hosts = 2\n")
    with pytest.raises(ConfigError, match="hosts"):
        RunFile.from_toml(folder / "run.toml")


def test_processes_without_a_mesh_over_all_of_them_are_refused(monkeypatch):
    check_shared(None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"2 processes .* got none; give \[mesh\]"):
        check_shared(None)


def test_numbers_told_to_all_are_the_same_to_the_last_bit():
    found = {"held_out": 0.1 + 0.2, "recall": 1e-30}
    assert told_to_all(found) == found
    assert told_to_all({}) == {}


def started(config: Path) -> list[subprocess.Popen[str]]:
    """Both processes of a run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(SCRIPT), str(config), "--coordinator", f"localhost:{port}", "--process"]
    pipes: dict[str, Any] = dict(env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return [subprocess.Popen([*command, number], **pipes) for number in "01"]


def ended(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What each said, once all have ended well."""
    said = []
    try:
        told = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, error) in zip(processes, told, strict=True):
        assert process.returncode == 0, error[-4000:]
        said.append(out + error)
    return said


@pytest.mark.slow
def test_two_processes_do_the_run_of_one_and_the_first_alone_writes(folder):
    # Adam steps by the learning rate however small a gradient is: rounding moves weights by a share of that.
    text = TOML.replace("learning_rate = 1e-2", "learning_rate = 1e-4")
    (folder / "run.toml").write_text(text + SHARED)
    said = ended(started(folder / "run.toml"))
    assert "the model after 4 steps" in said[0]
    assert "/4" not in said[1]
    assert "the model" not in said[1]
    lines = (folder / "run" / "log.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert (folder / "run" / "loss.png").exists()
    assert len(list((folder / "run" / "tensorboard").iterdir())) == 1
    both, out = read_log(folder / "run"), kvjax.load(folder / "out")

    for name in ("run", "out"):
        (folder / name).rename(folder / f"{name} of both")
    (folder / "run.toml").write_text(text)
    main(Arguments(folder / "run.toml", plot=False))
    for mine, theirs in zip(read_log(folder / "run"), both, strict=True):
        # The same float32 sums in another order, four of Adam's steps.
        numbers = [{n: line[n] for n in ("loss", "held_out") if n in line} for line in (mine, theirs)]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-5)
    assert [line["step"] for line in both if "held_out" in line] == [2, 4]
    alone = kvjax.load(folder / "out").params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), out.params, alone)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_with_a_checkpoint(folder):
    long = TOML.replace("steps = 4", "steps = 100000").replace("every = 2", "every = 100000")
    (folder / "run.toml").write_text(long + SHARED)
    log, both = folder / "run" / "log.jsonl", started(folder / "run.toml")
    until = time.monotonic() + 600
    while not (log.exists() and log.read_text().count("\n") > 2):
        assert time.monotonic() < until
        assert both[0].poll() is None, both[0].communicate()[1][-4000:]
        time.sleep(0.1)
    both[1].send_signal(signal.SIGINT)
    said = ended(both)
    last = read_log(folder / "run")[-1]["step"]
    assert f"stopped after step {last}" in said[0].replace("\n", " ")
    assert [path.name for path in (folder / "run" / "checkpoints").iterdir() if path.name.isdigit()] == [str(last)]
    kvjax.load(folder / "run")
