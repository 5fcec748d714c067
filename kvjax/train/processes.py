"""A run shared by several processes: how they find one another, and how they stop together."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from kvjax.errors import ConfigError
from kvjax.model import Model


@dataclasses.dataclass(frozen=True)
class Processes:
    """Which processes share a run, as `jax.distributed` is told: the `[distributed]` table.

    Attributes:
      coordinator: "host:port" of the first process, which all can reach.
      processes: how many there are. process: which one this is, from 0; None: the command line says.
      auto: ask SLURM, Open MPI, or the cloud's own settings for all of these.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    auto: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.auto, bool):
            raise ConfigError(f"distributed.auto must be true or false, got {self.auto!r}")
        if self.auto:
            given = [name for name in ("coordinator", "processes", "process") if getattr(self, name) is not None]
            if given:
                raise ConfigError(
                    f"distributed.auto asks the cluster for everything, and distributed.{given[0]} is given too; "
                    "leave one out"
                )
            return
        host, _, port = str(self.coordinator).rpartition(":")
        if not isinstance(self.coordinator, str) or not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigError(
                "distributed.coordinator must be the first process's 'host:port', such as 'node1:12345' (or set "
                f"auto = true), got {self.coordinator!r}"
            )
        if not _whole(self.processes, 1):
            raise ConfigError(f"distributed.processes must be an integer of at least 1, got {self.processes!r}")
        assert self.processes is not None
        if self.process is not None and not (_whole(self.process, 0) and self.process < self.processes):
            raise ConfigError(
                f"distributed.process must be an integer from 0 to processes - 1 ({self.processes - 1}), got "
                f"{self.process!r}"
            )

    def join(self) -> None:
        """Waits until all are there; call it before anything else of jax.

        Raises:
          ConfigError: nobody says which process this is, or the cluster says nothing.
        """
        if self.auto:
            try:
                jax.distributed.initialize()
            except ValueError as error:
                raise ConfigError(
                    "distributed.auto = true, but nothing here tells of a cluster (SLURM, Open MPI and clouds do); "
                    "give coordinator, processes and process"
                ) from error
            return
        if self.process is None:
            raise ConfigError(
                f"which of the {self.processes} processes is this? Give --process 0 to the first, --process 1 to the "
                "next, and so on"
            )
        jax.distributed.initialize(
            self.coordinator, self.processes, self.process, cluster_detection_method="deactivate"
        )


def check_shared(mesh: Mesh | None) -> None:
    """Whether each of this run's processes has a part in it.

    Raises:
      ConfigError: there are several, and the mesh is not over the devices of all.
    """
    if jax.process_count() > 1 and (mesh is None or mesh.size != jax.device_count()):
        has = "none" if mesh is None else f"one of {mesh.size}"
        raise ConfigError(
            f"{jax.process_count()} processes share a run over a mesh of all their {jax.device_count()} devices, got "
            f"{has}; give [mesh] axes and a shape that multiply to {jax.device_count()}, such as shape = [-1]"
        )


def whole(model: Model) -> Model:
    """The same model with all weights at hand in every process, in host memory; alone, as it is. All must call it."""
    if jax.process_count() == 1:
        return model
    gathered = jax.tree.map(lambda leaf: np.asarray(multihost_utils.process_allgather(leaf, tiled=True)), model.params)
    return dataclasses.replace(model, params=gathered)


def first_measures(measure: Callable[[Model], dict[str, float]]) -> Callable[[Model], dict[str, float]]:
    """The same measurement, taken by the first process alone, on all weights, and told to the others."""

    def measured(model: Model) -> dict[str, float]:
        if jax.process_count() == 1:
            return measure(model)
        model = whole(model)
        found: dict[str, Any] = {}
        if jax.process_index() == 0:
            found = measure(dataclasses.replace(model, params=jax.tree.map(jax.numpy.asarray, model.params)))
        return told_to_all(found)

    return measured


def told_to_all(found: dict[str, float]) -> dict[str, float]:
    """The first process's numbers by name, for all."""
    text = "\n".join(f"{name} {float(value).hex()}" for name, value in found.items()).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(text), np.int32)))
    held = np.zeros(size, np.uint8)
    held[: len(text)] = np.frombuffer(text, np.uint8)[:size]
    lines = bytes(np.asarray(multihost_utils.broadcast_one_to_all(held), np.uint8)).decode().splitlines()
    return {name: float.fromhex(value) for name, value in map(str.split, lines)}


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Yields what is asked after each step: whether to stop, as SIGINT or SIGTERM said; a second one ends the process.

    Of several processes it is enough that one is told: all stop after the same step.
    """
    came: list[int] = []
    shared, steps = jax.process_count() > 1, itertools.count()

    def note(number: int, frame: Any) -> None:
        came.append(number)
        signal.signal(number, signal.SIG_DFL)
        if shared:
            # jax.distributed listens to SIGTERM, and finds a step that none of the processes is past.
            os.kill(os.getpid(), signal.SIGTERM)

    def stopped() -> bool:
        return multihost_utils.reached_preemption_sync_point(next(steps)) if shared else bool(came)

    numbers = (signal.SIGINT,) if shared else (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
