"""The loop around the steps: batches in, numbers out, checkpoints and measurements now and then."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from kvjax.errors import TrainingError
from kvjax.train.batch import Batch
from kvjax.train.batches import Batches, take
from kvjax.train.run_folder import RunFolder
from kvjax.train.run_step import Given, RunState


class Told(NamedTuple):
    """What is told of a step.

    Attributes:
      step: taken so far. numbers: the objective's parts and "gradient_norm"; after a measurement its numbers too.
      tokens: of the step's batch. seconds: since the step before was told, without measuring.
    """

    step: int
    numbers: dict[str, float]
    tokens: int
    seconds: float


class Every(NamedTuple):
    """Steps between things; 0: never but at the end."""

    save: int = 0
    evaluate: int = 0


def run_steps(
    step_at: Callable[[int], Callable[[RunState, Given, Batch], tuple[RunState, dict[str, jax.Array]]]],
    state: RunState,
    given: Given,
    batches: Batches,
    steps: int,
    *,
    place: Callable[[Any], Batch],
    folder: RunFolder | None = None,
    every: Every = Every(),
    evaluate: Callable[[RunState], Mapping[str, float]] | None = None,
    report: Callable[[Told], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> RunState:
    """Takes the steps that are left of `steps`.

    Args:
      step_at: what is done as step 0, 1, ... of the run, as `make_run_step` makes it.
      place: checks a batch and puts it on the device. folder: where checkpoints go; None: nowhere.
      evaluate: measures a state; its numbers are told, and may choose the best checkpoint.
      stopped: asked after each step; True ends the run early, with a checkpoint.

    Raises:
      TrainingError: a loss or gradient is not finite, before anything of it is saved, or the batches end.
      CheckpointError: a checkpoint cannot be written.
    """
    began, first = time.monotonic(), int(state.step)
    waiting: tuple[int, dict[str, jax.Array], int] | None = None
    measured: dict[str, float] = {}

    def tell() -> dict[str, float]:
        """Reads the numbers of the step before: meanwhile the device has the next one to do."""
        nonlocal began, measured
        assert waiting is not None
        done, arrays, tokens = waiting
        numbers = _floats(arrays)
        _check_finite(done, numbers, folder)
        numbers |= measured
        now = time.monotonic()
        if report is not None:
            report(Told(done, numbers, tokens, now - began))
        began, measured = now, {}
        return numbers

    for index in range(first, steps):
        batch = place(take(batches, index))
        state, arrays = step_at(index)(state, given, batch)
        if waiting is not None:
            tell()
        waiting = (index + 1, arrays, batch.tokens.size)
        end = index + 1 == steps or stopped()
        due = end or _due(index + 1, every.save)
        if evaluate is not None and (end or _due(index + 1, every.evaluate)):
            _check_finite(index + 1, _floats(arrays), folder)
            paused = time.monotonic()
            measured = dict(evaluate(state))
            began += time.monotonic() - paused
        if due:
            numbers, waiting = tell(), None
            if folder is not None:
                folder.save(state, batches.get_state(), numbers)
        if end:
            break
    return state


def _floats(arrays: Mapping[str, jax.Array]) -> dict[str, float]:
    """The loss first: where it and others are not finite, it is the one to hear of."""
    return {name: float(arrays[name]) for name in ("loss", *sorted(arrays.keys() - {"loss"}))}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _check_finite(step: int, numbers: dict[str, float], folder: RunFolder | None) -> None:
    """Whether a step may be gone on from."""
    wrong = [name for name, value in numbers.items() if not math.isfinite(value)]
    if wrong:
        kept = "" if folder is None else f"; the checkpoints in {folder.path} are of before"
        raise TrainingError(
            f"{wrong[0]} became {numbers[wrong[0]]} at step {step}{kept}: lower the learning rate, warm up "
            "longer or look at the data of that step"
        )
