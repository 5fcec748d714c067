"""Runs on disk: going on exactly, which checkpoints are kept, and what damage, full disks and NaNs do."""

from __future__ import annotations

import errno
import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.convert.run_store import good_steps
from kvjax.errors import CheckpointError, ConfigError, TrainingError
from kvjax.model import init
from kvjax.train import Batch, Every, LoRA
from kvjax.train.batches import CountedBatches, fingerprint
from kvjax.train.run_folder import RunFolder
from kvjax.train.run_step import RunState

PROGRAM = Path(__file__).with_name("tiny_run.py")
specification = importlib.util.spec_from_file_location("tiny_run", PROGRAM)
assert specification is not None
assert specification.loader is not None
tiny_run = importlib.util.module_from_spec(specification)
specification.loader.exec_module(tiny_run)
trained, digest, TOKENS = tiny_run.trained, tiny_run.digest, tiny_run.TOKENS


@pytest.fixture(scope="module")
def uninterrupted():
    return trained()


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model, _ = trained(folder)
    return folder, model


def steps_of(folder: Path) -> list[int]:
    return sorted(int(entry.name) for entry in (folder / "checkpoints").iterdir() if entry.name.isdigit())


def stop_after(steps: int):
    left = iter([False] * (steps - 1))
    return lambda: next(left, True)


def test_checkpoints_change_nothing(uninterrupted, finished_run):
    assert digest(finished_run[1]) == digest(uninterrupted[0])


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(uninterrupted, tmp_path):
    _, first = trained(tmp_path, stopped=stop_after(3))
    assert sorted(first) == [1, 2, 3]
    model, rest = trained(tmp_path)
    assert {**first, **rest} == uninterrupted[1]
    assert sorted(rest) == [4, 5, 6]
    assert digest(model) == digest(uninterrupted[0])


def test_a_run_is_loaded_as_the_model_it_has_become(finished_run):
    folder, model = finished_run
    assert digest(kvjax.load(folder)) == digest(model)
    assert digest(kvjax.load(folder / "checkpoints" / "4")) != digest(model)
    out = kvjax.generate(kvjax.load(folder), [[1, 2, 3]], max_new_tokens=2)
    assert len(out.tokens[0]) == 2


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_of_adapters_is_loaded_with_them_merged(tmp_path, scan):
    model, _ = trained(tmp_path, trainable=LoRA(rank=2), steps=2, scan=scan)
    loaded = kvjax.load(tmp_path)
    # Merged outside of a compiled program: one rounding more.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), loaded.params, model.params)
    again, rest = trained(tmp_path, trainable=LoRA(rank=2), steps=2, scan=scan)
    assert not rest
    assert digest(again) == digest(model)
    with pytest.raises(ConfigError, match="is a run with other weights given; go on as it began"):
        trained(tmp_path, model=init(tiny_run.CONFIG, seed=5), trainable=LoRA(rank=2), steps=2, scan=scan)


@pytest.fixture(scope="module")
def cut_run(tmp_path_factory):
    """A run that was stopped after four of its steps."""
    folder = tmp_path_factory.mktemp("cut")
    trained(folder, stopped=stop_after(4))
    assert steps_of(folder) == [2, 4]
    return folder


def damage_data(step: Path) -> None:
    largest = max((file for file in step.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def damage_by_cutting(step: Path) -> None:
    largest = max((file for file in step.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])


def damage_by_removing(step: Path) -> None:
    next(file for file in sorted((step / "rest").rglob("*")) if file.is_file()).unlink()


def damage_by_never_finishing(step: Path) -> None:
    (step.parent.parent / "manifests" / f"{step.name}.json").unlink()


@pytest.mark.parametrize(
    "harm, why",
    [
        (damage_data, "other content"),
        (damage_by_cutting, "bytes instead of"),
        (damage_by_removing, "is missing"),
        (damage_by_never_finishing, "never finished"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(cut_run, tmp_path, harm, why):
    run = shutil.copytree(cut_run, tmp_path / "run")
    harm(run / "checkpoints" / "4")
    with pytest.warns(UserWarning, match=rf"checkpoints.4 is not used: .*{why}"):
        assert digest(kvjax.load(run)) == digest(kvjax.load(run / "checkpoints" / "2"))
    with pytest.raises(CheckpointError, match=rf"4 is damaged: .*{why}"):
        kvjax.load(run / "checkpoints" / "4")


def test_training_goes_on_from_before_the_damage(uninterrupted, cut_run, tmp_path):
    run = shutil.copytree(cut_run, tmp_path / "run")
    damage_data(run / "checkpoints" / "4")
    with pytest.warns(UserWarning, match="is not used"):
        model, rest = trained(run)
    assert sorted(rest) == [3, 4, 5, 6]
    assert digest(model) == digest(uninterrupted[0])
    assert steps_of(run) == [4, 6]
    assert digest(kvjax.load(run)) == digest(model)


def test_without_any_whole_checkpoint_loading_says_so_and_training_begins_anew(uninterrupted, cut_run, tmp_path):
    run = shutil.copytree(cut_run, tmp_path / "run")
    for step in ("2", "4"):
        damage_data(run / "checkpoints" / step)
    with (
        pytest.warns(UserWarning, match="not used"),
        pytest.raises(CheckpointError, match="without a whole checkpoint"),
    ):
        kvjax.load(run)
    with pytest.warns(UserWarning, match="not used"):
        _, losses = trained(run, stopped=stop_after(1))
    assert losses == {1: uninterrupted[1][1]}


def test_another_run_in_the_same_folder_is_refused(finished_run):
    folder, _ = finished_run
    with pytest.raises(ConfigError, match=r"another learning_rate \(0\.01, now 0\.02\)"):
        trained(folder, learning_rate=2e-2)


def test_a_run_goes_on_with_its_own_data_alone(finished_run):
    folder, _ = finished_run
    other = TOKENS.copy()
    other[7, 3] = (other[7, 3] + 1) % 32
    with pytest.raises(ConfigError, match="is a run on other data; go on as it began, or in another folder"):
        trained(folder, tokens=other)


def test_looking_at_data_takes_none_of_it():
    source = CountedBatches(iter([TOKENS[:4], TOKENS[4:8]]))
    assert fingerprint(source) == fingerprint(CountedBatches(iter([TOKENS[:4]])))
    assert fingerprint(source) != fingerprint(CountedBatches(iter([TOKENS[4:8]])))
    assert source.get_state() == {"taken": 0}
    assert np.array_equal(next(source), TOKENS[:4])
    assert np.array_equal(next(source), TOKENS[4:8])


def state(step: int) -> RunState:
    weights = {"w": jnp.full(4, float(step))}
    return RunState(weights, {"m": jnp.zeros(4)}, jnp.asarray(step, jnp.int32), jnp.zeros(2, jnp.uint32))


def test_a_checkpoint_that_cannot_be_written_is_told_and_harms_no_other(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with RunFolder(tmp_path) as folder:
        folder.save(state(1), None, {"loss": 1.0})
        folder.finish()
        monkeypatch.setattr(folder._manager, "save", full)
        with pytest.raises(CheckpointError, match="No space left on device .* the checkpoint of step 1 is whole"):
            folder.save(state(2), None, {"loss": 1.0})
    with RunFolder(tmp_path) as folder:
        found = folder.restore(state(0))
    assert found is not None
    assert int(found.state.step) == 1


def test_a_checkpoint_counts_as_soon_as_it_is_written(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.save(state(1), None, {"loss": 1.0})
        # No later one is needed, and no end of the run: a kill now loses nothing.
        until = time.monotonic() + 60
        while not (tmp_path / "manifests" / "1.json").exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert list(good_steps(tmp_path)) == [1]


def test_the_last_and_the_best_are_kept(tmp_path):
    with RunFolder(tmp_path, last=2, best=1, metric="held_out") as folder:
        for step, loss in enumerate([5.0, 1.0, 3.0, 2.0, 4.0], 1):
            folder.save(state(step), {"taken": step}, {"held_out": loss})
    assert steps_of(tmp_path) == [2, 4, 5]
    assert sorted(file.stem for file in (tmp_path / "manifests").iterdir()) == ["2", "4", "5"]
    with RunFolder(tmp_path, metric="held_out") as folder:
        found = folder.restore(state(0))
    assert found is not None
    assert int(found.state.step) == found.data["taken"] == 5
    assert found.state.params["w"].tolist() == [5.0] * 4


@pytest.mark.parametrize(
    "harm, error, match",
    [
        ("nan", TrainingError, "loss became nan at step 4; the checkpoints in .* are of before"),
        ("file", ConfigError, "a.jsonl, line 3: not valid JSON"),
        ("end", TrainingError, "the batches ended after 3"),
    ],
)
def test_what_ends_a_run_leaves_its_checkpoints(tmp_path, harm, error, match):
    def batches():
        for step in range(1, 9):
            if step == 4 and harm == "file":
                raise ConfigError("a.jsonl, line 3: not valid JSON")
            if step == 4 and harm == "end":
                return
            yield Batch(TOKENS[:4], weights=np.full((4, 16), np.nan if step == 4 else 1, np.float32))

    with pytest.raises(error, match=match):
        trained(tmp_path, tokens=batches(), every=Every(save=1))
    assert steps_of(tmp_path) == [2, 3]
    weights = kvjax.load(tmp_path).params
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(weights))


def test_a_folder_that_cannot_be_written_is_told_before_the_first_step(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write to .*file.run: Not a directory"):
        trained(tmp_path / "file" / "run")

    def refuse(self: Path, content: bytes) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    # Root, as in containers, may write where modes forbid it: what a read-only mount says is said here.
    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(CheckpointError, match="Read-only file system.*no checkpoint has been written yet"):
        trained(tmp_path / "run")


def started(folder: Path, steps: int, *more: str) -> subprocess.Popen:
    command = [sys.executable, str(PROGRAM), str(folder), str(steps), *more]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(PROGRAM.parents[2]),
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
    }
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines_of(process: subprocess.Popen) -> dict[str, str]:
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return dict(line.split() for line in out.splitlines())


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    whole = lines_of(started(tmp_path / "whole", 30))
    last = random.randint(8, 27)
    process = started(tmp_path / "killed", 30)
    seen = {}
    assert process.stdout is not None
    for line in process.stdout:
        step, loss = line.split()
        seen[step] = loss
        if int(step) == last:
            os.kill(process.pid, signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    rest = lines_of(started(tmp_path / "killed", 30))
    # Where the last good checkpoint was, and no earlier: some had been written by then.
    assert 1 < int(min(rest.keys() - {"weights"}, key=int)) <= last + 1
    both = {**seen, **rest}
    assert both == whole, f"killed after step {last}"
    assert all(rest.get(step, loss) == loss for step, loss in seen.items())


@pytest.mark.slow
def test_a_write_that_fails_in_the_background_is_told_and_harms_no_checkpoint(tmp_path):
    lines_of(started(tmp_path, 4))
    weights = digest(kvjax.load(tmp_path))
    about = tmp_path / "kvjax_run.json"
    about.write_text(about.read_text().replace('"steps": 4', '"steps": 8'))
    process = started(tmp_path, 8, "2000")
    _, error = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "cannot write to" in error
    assert "the checkpoint of step 4 is whole" in error
    with warnings.catch_warnings():
        # What there was no room for may be there, half-written.
        warnings.simplefilter("ignore")
        assert digest(kvjax.load(tmp_path)) == weights


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for two checkpoints of three that are there at once."""
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(path)], capture_output=True)
    if done.returncode:
        pytest.skip("may not mount a file system")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.slow
def test_a_run_goes_on_exactly_once_a_full_disk_has_room_and_is_read_from_a_read_only_one(small_disk):
    def remounted(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(small_disk)], check=True)

    options = dict(steps=8, every=Every(save=1))
    with pytest.raises(CheckpointError, match="cannot write to .* the checkpoint of step . is whole: make room"):
        trained(small_disk, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kvjax.load(small_disk)
        remounted("size=9m")
        model, rest = trained(small_disk, **options)
    assert len(rest) < 8
    assert digest(model) == digest(trained(**options)[0])
    remounted("ro")
    with pytest.raises(CheckpointError, match="Read-only file system.*the checkpoint of step 8 is whole"):
        trained(small_disk, **options)
    assert digest(kvjax.load(small_disk)) == digest(model)
