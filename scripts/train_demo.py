"""Trains the demo's model on the standard library's source, key=value recall and copying, and measures it.

python scripts/train_demo.py                    # train, or go on where a run was cut short; then write models/demo
python scripts/train_demo.py --config configs/demo_far.toml --start models/demo --run runs/demo_far   # its second stage
python scripts/train_demo.py --no-train         # write models/demo from the run's last checkpoint
python scripts/train_demo.py --evaluate         # measure models/demo as it was saved
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import kvjax
from kvjax.errors import ConfigError, KvjaxError
from kvjax.model import parameter_shapes
from kvjax.train.checkpoint import load_state, save_state
from kvjax.train.data import library_files, read_bytes, split_files
from kvjax.train.evaluate import Logits, copy_accuracy, nats_per_token, predictor, recall_by_depth
from kvjax.train.initial import initial_params
from kvjax.train.recipe import Recipe
from kvjax.train.step import TrainState, forward, make_train_step, start
from kvjax.train.tokenizer import END_ID, byte_tokenizer, side_files
from kvjax.typing import Params

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclasses.dataclass
class Arguments:
    """What is done."""

    config: Path = Path("configs/demo.toml")
    """Its [model] and [train] tables."""
    start: Path | None = None
    """A model whose weights a new run starts from; None: random ones."""
    run: Path = Path("runs/demo")
    """Holds state.npz, from which a run goes on, and log.jsonl."""
    out: Path = Path("models/demo")
    """The model, as a Hugging Face directory."""
    train: bool = True
    """--no-train: only write the model from the run's state."""
    evaluate: bool = False
    """Measure the model in `out` instead of making one."""
    context: int | None = None
    """Tokens at most when measuring; None: the longest rows of the recipe."""
    save_every: float = 120.0
    """Seconds between checkpoints."""
    log_every: int = 20
    """Steps between lines of the log."""
    evaluate_every: int = 100
    """Steps between measurements, which go to the log too."""


def main(arguments: Arguments) -> None:
    """Trains and writes, or measures."""
    recipe = Recipe.from_toml(arguments.config)
    train_files, held_out_files = split_files(library_files())
    if arguments.evaluate:
        report(measure(arguments.out, read_bytes(held_out_files, END_ID), arguments.context or recipe.context))
        return
    config = kvjax.ModelConfig.from_toml(arguments.config)
    state = start(first_params(config, recipe, arguments.start), recipe.optimizer())
    checkpoint = arguments.run / "state.npz"
    if checkpoint.exists() or not arguments.train:
        state = load_state(checkpoint, state)
    if arguments.train:
        code, held_out = read_bytes(train_files, END_ID), read_bytes(held_out_files, END_ID)
        state = train(arguments, config, recipe, state, code, held_out)
    write(config, state, arguments.out)
    Console(stderr=True).print(f"{arguments.out}: the model after {int(state.step)} steps")


def first_params(config: kvjax.ModelConfig, recipe: Recipe, path: Path | None) -> Params:
    """What a run starts from, float32: random weights, or those of the model at `path`."""
    if path is None:
        return initial_params(config, recipe.seed)
    model = kvjax.load(path, dtype="float32")
    if jax.tree.map(jnp.shape, model.params) != jax.tree.map(lambda leaf: leaf.shape, parameter_shapes(config)):
        raise ConfigError(f"the model at {path} has other shapes than the recipe's [model]; start from one that fits")
    return model.params


def train(
    arguments: Arguments,
    config: kvjax.ModelConfig,
    recipe: Recipe,
    state: TrainState,
    code: np.ndarray,
    held_out: np.ndarray,
) -> TrainState:
    """Takes the steps that are left; an interrupt or SIGTERM ends it after the step at hand, with a checkpoint."""
    # Unrolled layers: on a CPU a step is quicker than with a scan, at the price of a longer compilation.
    logits, optimizer = forward(config, scan=False), recipe.optimizer()
    mixture, steps = recipe.mixture(code, END_ID), {}
    arguments.run.mkdir(parents=True, exist_ok=True)
    stopped = stop_signal()
    began = saved = time.monotonic()
    first, losses = int(state.step), []
    with (arguments.run / "log.jsonl").open("a") as log, steps_bar(first, recipe.steps) as advance:
        for step in range(first, recipe.steps):
            phase = mixture.phase(step)
            if phase not in steps:
                steps[phase] = make_train_step(logits, optimizer, recipe.parts(phase))
            tokens, weights = mixture.batch(step)
            state, metrics = steps[phase](state, jnp.asarray(tokens), jnp.asarray(weights))
            losses.append(float(metrics["loss"]))
            advance(losses[-1], phase.length)
            done = step + 1
            if done % arguments.log_every == 0:
                line: dict[str, Any] = {"step": done, "loss": float(np.mean(losses)), "length": phase.length}
                line["seconds"] = round(time.monotonic() - began, 1)
                if done % arguments.evaluate_every == 0:
                    line |= quick_measure(logits, state.params, held_out, phase.length)
                print(json.dumps(line), file=log, flush=True)
                losses = []
            if stopped() or done == recipe.steps or time.monotonic() - saved > arguments.save_every:
                save_state(arguments.run / "state.npz", state)
                saved = time.monotonic()
            if stopped():
                break
    return state


def stop_signal() -> Callable[[], bool]:
    """Whether SIGINT or SIGTERM has come since; a second one ends the process as usual."""
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        came.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return lambda: bool(came)


@contextlib.contextmanager
def steps_bar(done: int, total: int) -> Iterator[Callable[[float, int], None]]:
    """A progress bar on the terminal; yields `advance(loss, length)`."""
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}, rows of {task.fields[length]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=done, loss=float("nan"), length=0)
        yield lambda loss, length: bar.update(task, advance=1, loss=loss, length=length)


def quick_measure(logits: Logits, params: Params, held_out: np.ndarray, length: int) -> dict[str, float]:
    """A small sample of `measure`, for the log of a run."""
    predict = predictor(logits, params)
    recall = recall_by_depth(predict, held_out, length, (0.0, 0.5), count=8, distractors=1)
    return {
        "held_out": nats_per_token(logits, params, held_out, length, limit=max(1, 16384 // length)),
        "recall": float(np.mean(list(recall.values()))),
        "copy": copy_accuracy(predict, length, count=8),
    }


def write(config: kvjax.ModelConfig, state: TrainState, out: Path) -> None:
    """Saves the weights, in the config's dtype, with the tokenizer, as a Hugging Face directory."""
    params = jax.tree.map(lambda leaf: leaf.astype(config.dtype), state.params)
    model = kvjax.Model(config, params, byte_tokenizer(), side_files(config.max_position_embeddings))
    kvjax.save(model, out, format="safetensors")


def measure(path: Path, held_out: np.ndarray, context: int) -> dict[str, Any]:
    """The saved model (float32 arithmetic on its weights) on held-out files, recall by depth, and copying."""
    model = kvjax.load(path, dtype="float32")
    logits = forward(model.config, scan=False)
    predict = predictor(logits, model.params)
    result: dict[str, Any] = {"parameters": model.num_parameters, "context": context}
    result["held_out"] = nats_per_token(logits, model.params, held_out, context)
    lengths = [length for length in (64, 128, 256, 512, 1024, 2048) if length <= context]
    for length in lengths:
        distractors = 1 if length < 256 else 4
        result[f"recall_{length}"] = recall_by_depth(predict, held_out, length, DEPTHS, distractors=distractors)
        result[f"copy_{length}"] = copy_accuracy(predict, length)
    return result


def report(result: dict[str, Any]) -> None:
    """The table for people on stderr, the numbers for programs on stdout."""
    table = Table("tokens", *(f"recall at depth {depth:g}" for depth in DEPTHS), "copied tokens")
    for name in result:
        if name.startswith("recall_"):
            length = name.removeprefix("recall_")
            table.add_row(
                length, *(f"{share:.0%}" for share in result[name].values()), f"{result[f'copy_{length}']:.0%}"
            )
    console = Console(stderr=True)
    console.print(f"held-out code: {result['held_out']:.3f} nats per byte, windows of {result['context']}")
    console.print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except KvjaxError as error:
        sys.exit(f"error: {error}")
