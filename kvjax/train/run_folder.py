"""A training run on disk: orbax checkpoints written beside the training, the last and the best kept.

`kvjax.convert.run_store` says what lies where, and reads a run as a model.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import checkpoint_managers

from kvjax.checkpoint import save
from kvjax.convert.manifest import write_manifest
from kvjax.convert.orbax_store import save_orbax
from kvjax.convert.run_store import (
    BASE_FOLDER,
    CHECKPOINTS_FOLDER,
    MANIFESTS_FOLDER,
    RUN_FILE,
    describe_run,
    good_steps,
    read_run,
)
from kvjax.errors import CheckpointError, ConfigError
from kvjax.train.run_step import RunState


class Resumed(NamedTuple):
    """What a checkpoint holds: the state, and where in the data the next batch is."""

    state: RunState
    data: Any


class RunFolder:
    """Writes and finds a run's checkpoints; use it as a context manager, so that the last is finished.

    Args:
      path: of the run; made where it is missing.
      last, best: how many checkpoints are kept by age, and by `metric`.
      metric: the measured number by which one is better, the lower the better.

    Raises:
      CheckpointError: the folder cannot be written.
    """

    def __init__(self, path: str | Path, last: int = 2, best: int = 1, metric: str = "loss") -> None:
        self.path = Path(path).expanduser().resolve()
        self._metric = metric
        policies = checkpoint_managers
        keep: list[Any] = [policies.LatestN(last)]
        if best:
            keep.append(
                policies.BestN(
                    get_metric_fn=lambda told: told[metric],
                    reverse=True,
                    n=best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        with self._writing():
            for name in (CHECKPOINTS_FOLDER, MANIFESTS_FOLDER):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            # Folders that only seem writable are found out now, not when the first checkpoint is due.
            probe = self.path / f".{uuid.uuid4().hex}"
            probe.write_bytes(b"kvjax")
            probe.unlink()
            # What a killed run had no time to list may be anything: the list is made of what this process wrote alone.
            self._unlisted = self._steps() - self._listed()
            self._manager = ocp.CheckpointManager(
                self.path / CHECKPOINTS_FOLDER,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=policies.AnyPreservationPolicy(keep),
                    cleanup_tmp_directories=True,
                ),
            )
        self._writing_now: _Lister | None = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is None:
            self.finish()
            self._manager.close()
            return
        # The error at hand is the one to hear of.
        with contextlib.suppress(Exception):
            self._settle()
        with contextlib.suppress(Exception):
            self._manager.close()

    def begin(self, model: Any, settings: dict[str, Any], scale: float, part: bool) -> bool:
        """Whether a run is there to go on with; else writes what it is and, for a `part`, the model it begins as.

        Args:
          settings: what a run that goes on must share, as JSON holds it.

        Raises:
          ConfigError: the folder is of a run with another model, other settings or other data.
        """
        if first_says(not (self.path / RUN_FILE).exists()):
            with self._writing():
                if part:
                    save_base(model, self.path / BASE_FOLDER)
                if jax.process_index() == 0:
                    for name, content in side_files(model):
                        (self.path / name).parent.mkdir(exist_ok=True)
                        (self.path / name).write_bytes(content)
                    partial = self.path / f"{RUN_FILE}.part"
                    partial.write_text(describe_run(model.config, settings, scale, part))
                    os.replace(partial, self.path / RUN_FILE)
            together("a run begins")
            return False
        about = read_run(self.path)
        was = {**about["settings"], "model": about["config"]}
        unnamed = {"model": "of another model", "data": "on other data", "weights": "with other weights given"}
        for name, now in {**settings, "model": model.config}.items():
            if was.get(name) != now:
                other = unnamed.get(name, f"with another {name} ({was.get(name)!r}, now {now!r})")
                raise ConfigError(f"{self.path} is a run {other}; go on as it began, or in another folder")
        return True

    def save(self, state: RunState, data: Any, told: dict[str, float]) -> None:
        """Begins to write a checkpoint, and returns when the state has been copied and may change.

        Without the metric in `told` it is never the best.

        Raises:
          CheckpointError: this one or the one before cannot be written; those before are whole.
        """
        step, metric = int(state.step), float(told.get(self._metric, math.nan))
        with self._writing():
            self._settle()
            for old in self._manager.all_steps():
                # Of a run that was cut short before the checkpoint was whole, or whose checkpoint was damaged since.
                if old >= step:
                    self._manager.delete(old)
                    self._unlisted.discard(str(old))
                    (self.path / MANIFESTS_FOLDER / f"{old}.json").unlink(missing_ok=True)
            # What orbax does not count as a checkpoint: it never ended.
            if jax.process_index() == 0:
                shutil.rmtree(self.path / CHECKPOINTS_FOLDER / str(step), ignore_errors=True)
            together(f"room for step {step}")
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    rest=ocp.args.StandardSave(_rest(state)),
                    data=ocp.args.JsonSave({"state": data}),
                ),
                metrics={self._metric: metric} if math.isfinite(metric) else None,
                force=True,
            )
            if jax.process_index() == 0:
                self._writing_now = _Lister(self.path / CHECKPOINTS_FOLDER / str(step), self._list)

    def finish(self) -> None:
        """Waits until what `save` began is written, and listed, whichever process does that."""
        with self._writing():
            self._settle()
            self._manager.check_for_errors()
            if jax.process_index() == 0:
                self._list()
        together("all is written")

    def restore(self, like: RunState) -> Resumed | None:
        """The last good checkpoint, placed as `like` (arrays, or shapes with shardings) is; None: there is none.

        A damaged one is passed over with a warning.

        Raises:
          CheckpointError: a whole checkpoint does not hold such a state.
        """
        # One process looks, so that all agree: damage may lie where not all of them read.
        step = first_says(next(good_steps(self.path), -1) if jax.process_index() == 0 else -1)
        if step < 0:
            return None
        shapes = jax.tree.map(_shape, like)
        try:
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(shapes.params),
                    rest=ocp.args.StandardRestore(_rest(shapes)),
                    data=ocp.args.JsonRestore(),
                ),
            )
        except Exception as error:
            raise CheckpointError(f"cannot go on from step {step} of {self.path}: {error}") from error
        rest = found["rest"]
        tree = jax.tree.structure(like.optimizer)
        optimizer = jax.tree.unflatten(tree, [rest["optimizer"][name] for name in sorted(rest["optimizer"])])
        return Resumed(RunState(found["params"], optimizer, rest["step"], rest["key"]), found["data"]["state"])

    def _settle(self) -> None:
        """Waits until what is being written is on disk, and listed."""
        try:
            self._manager.wait_until_finished()
        finally:
            listing, self._writing_now = self._writing_now, None
            if listing is not None:
                listing.end()

    def _list(self) -> None:
        """Lists the files of checkpoints that orbax has finished, and forgets those that it removed."""
        manifests = self.path / MANIFESTS_FOLDER
        for name in self._steps() - self._listed() - self._unlisted:
            write_manifest(self.path / CHECKPOINTS_FOLDER / name, manifests / f"{name}.json")
        for name in self._listed() - self._steps():
            (manifests / f"{name}.json").unlink(missing_ok=True)

    def _steps(self) -> set[str]:
        return {entry.name for entry in (self.path / CHECKPOINTS_FOLDER).iterdir() if entry.name.isdigit()}

    def _listed(self) -> set[str]:
        return {file.stem for file in (self.path / MANIFESTS_FOLDER).glob("*.json")}

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """What cannot be written is told as such, with what is still there."""
        try:
            yield
        except (CheckpointError, ConfigError):
            raise
        except Exception as error:  # orbax and TensorStore raise ValueError and their own for a full disk
            whole = sorted((int(file.stem) for file in (self.path / MANIFESTS_FOLDER).glob("*.json")), reverse=True)
            kept = f"the checkpoint of step {whole[0]} is whole" if whole else "no checkpoint has been written yet"
            free = _free(self.path)
            raise CheckpointError(
                f"cannot write to {self.path}: {_brief(error)} ({free}); {kept}: make room or choose another folder, "
                "and run again to go on"
            ) from error


class _Lister:
    """A thread that lists a checkpoint as soon as orbax has given it its name, so that a kill soon after loses nothing.

    orbax itself can call nothing then: its own callback comes before the name.
    """

    def __init__(self, folder: Path, list_files: Callable[[], None]) -> None:
        self._folder, self._list = folder, list_files
        self._over, self._trouble = threading.Event(), list[Exception]()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Once orbax has ended, whether or not it wrote the checkpoint; raises what went wrong."""
        self._over.set()
        self._thread.join()
        if self._trouble:
            raise self._trouble[0]

    def _run(self) -> None:
        while not self._folder.exists() and not self._over.wait(0.05):
            pass
        try:
            if self._folder.exists():
                self._list()
        except Exception as error:
            self._trouble.append(error)


def save_base(model: Any, path: Path) -> None:
    """Writes a whole model, of which each process has all weights or its share of a mesh."""
    if jax.process_count() == 1:
        save(model, path)
        return
    everywhere = NamedSharding(Mesh(np.array(jax.devices()), ("processes",)), PartitionSpec())

    def shared(leaf: jax.Array) -> jax.Array:
        if not leaf.is_fully_addressable:
            return leaf
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, everywhere, lambda index: whole[index])

    if jax.process_index() == 0:
        shutil.rmtree(path, ignore_errors=True)  # of a run that was cut short before it began
        path.mkdir(parents=True)
    together("room for the base")
    save_orbax(model.config, jax.tree.map(shared, model.params), path)


def first_says(value: int) -> int:
    """The first process's value, for all."""
    return int(multihost_utils.broadcast_one_to_all(np.asarray(value, np.int32)))


def together(place: str) -> None:
    """Waits until every process has come here."""
    multihost_utils.sync_global_devices(place)


def side_files(model: Any) -> list[tuple[str, bytes]]:
    """The tokenizer and what else lies beside a model's weights."""
    files = dict(model.files)
    if model.tokenizer is not None and "tokenizer.json" not in files:
        files["tokenizer.json"] = model.tokenizer.to_str(pretty=True).encode()
    return sorted(files.items())


def _rest(state: RunState) -> dict[str, Any]:
    """Beside the weights. The optimiser's leaves by number: its tuples and named tuples are not orbax's to know."""
    leaves = jax.tree.leaves(state.optimizer)
    return {"optimizer": {f"{i:05d}": leaf for i, leaf in enumerate(leaves)}, "step": state.step, "key": state.key}


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _free(path: Path) -> str:
    while not path.exists():
        path = path.parent
    return f"{shutil.disk_usage(path).free / 1e9:.1f} GB are free there"


def _brief(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0][:200]
