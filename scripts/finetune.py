"""Fine-tunes a model as a TOML file says; run again, it goes on where it was cut short.

python scripts/finetune.py configs/finetune.toml

The run's folder holds the checkpoints, log.jsonl, TensorBoard's events, and at the end loss.png; `kvjax.load` reads it
like any model. Ctrl-C ends a run after the step at hand, with a checkpoint. Several processes share a run where the
file has a table `[distributed]`: the same command for each, with --process 0, --process 1 and so on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import kvjax
from kvjax.distributed import make_mesh
from kvjax.errors import ConfigError, KvjaxError
from kvjax.train import Every, Told, finetune
from kvjax.train.decode_loss import decode_loss
from kvjax.train.packing import packed_batches
from kvjax.train.processes import Processes, check_shared, first_measures, stop_signal, whole
from kvjax.train.run_folder import RunFolder, together
from kvjax.train.run_toml import RunFile
from kvjax.train.speed import flops_per_token, share_of_peak
from kvjax.train.tensorboard import EventFile
from kvjax.train.text_files import TextFiles, matching


@dataclasses.dataclass
class Arguments:
    """What is done."""

    config: Annotated[Path, tyro.conf.Positional]
    """A TOML file like configs/finetune.toml."""
    plot: bool = True
    """--no-plot: draw no loss.png (it needs matplotlib)."""
    process: int | None = None
    """Which of several processes this is, from 0; [distributed] has the others' place."""
    processes: int | None = None
    """How many there are, instead of what [distributed] says."""
    coordinator: str | None = None
    """host:port of the first, instead of what [distributed] says."""


def main(arguments: Arguments) -> None:
    """Trains, tells, saves; of several processes the first alone tells and saves."""
    file = RunFile.from_toml(arguments.config)
    join(file.distributed, arguments)
    first = jax.process_index() == 0
    console = Console(stderr=True, quiet=not first)
    settings = {field.name: getattr(file.finetune, field.name) for field in dataclasses.fields(file.finetune)}
    # What is trained is float32 in any case; the result has the dtype that the model is stored in.
    model = kvjax.load(file.model, dtype="auto")
    teacher = None if file.teacher is None else kvjax.load(file.teacher, dtype="auto")
    batches, evaluate = data_of(file, model)
    mesh = None if file.mesh is None else make_mesh(file.mesh)
    check_shared(mesh)
    metric = "loss" if evaluate is None else "held_out"
    folder = RunFolder(file.run, file.checkpoints.last, file.checkpoints.best, metric)
    every = Every(file.checkpoints.every, file.evaluation.every if file.evaluation else 0)
    devices = 1 if mesh is None else mesh.size
    with contextlib.ExitStack() as stack:
        stopped, report = stack.enter_context(stop_signal()), None
        if first:
            log = stack.enter_context(log_of(file.run))
            advance = stack.enter_context(bar_of(file.finetune.steps, console))
            report = teller(log, advance, flops_per_token(model.config, file.data.length), devices)
        tuned = finetune(
            model,
            batches,
            **settings,
            teacher=teacher,
            mesh=mesh,
            run=folder,
            every=every,
            evaluate=None if evaluate is None else first_measures(evaluate),
            report=report,
            stopped=stopped,
        )
    tuned = whole(tuned)
    if first:
        finish(file, tuned, arguments.plot, console)
    # Nobody leaves before the first has saved: it would be told that the others are gone.
    together("saved")


def join(given: Processes | None, arguments: Arguments) -> None:
    """Joins the other processes of the run, if there are any; the command line comes before the file."""
    flags = {name: getattr(arguments, name) for name in ("coordinator", "processes", "process")}
    flags = {name: value for name, value in flags.items() if value is not None}
    if given is None and flags.keys() == {"process"}:
        raise ConfigError(
            f"--process {flags['process']} of how many? Give [distributed], or --coordinator and --processes"
        )
    if given is not None:
        dataclasses.replace(given, **flags).join()
    elif flags:
        Processes(**flags).join()


def finish(file: RunFile, tuned: kvjax.Model, plot: bool, console: Console) -> None:
    """Draws and saves what there is after the last step, or after one that was cut short."""
    if plot:
        draw(file.run)
    lines = read_log(file.run)
    if lines and lines[-1]["step"] < file.finetune.steps:
        console.print(f"stopped after step {lines[-1]['step']}; the same command goes on")
        return
    kvjax.save(tuned, file.out)
    console.print(f"{file.out}: the model after {file.finetune.steps} steps; {file.run} holds the run", soft_wrap=True)


def data_of(file: RunFile, model: kvjax.Model) -> tuple[Any, Callable[[kvjax.Model], dict[str, float]] | None]:
    """Batches to train on, and what measures a model, if anything does."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ConfigError(f"{file.model} has no tokenizer.json to read text with; copy one there")
    end = model.config.eos_token_ids[0] if file.data.end and model.config.eos_token_ids else None

    def batches(files: tuple[str, ...], rows: int, epochs: int | None) -> Any:
        documents = TextFiles(matching(files, file.folder), file.data.field)
        encode = lambda text: list(tokenizer.encode(text).ids)  # noqa: E731
        return packed_batches(documents, encode, file.data.length, rows, file.finetune.seed, end, epochs)

    training = batches(file.data.files, file.finetune.batch_size, None)
    if file.evaluation is None:
        return training, None
    chosen, cache = file.evaluation, file.evaluation.cache
    found = list(zip(range(chosen.rows), batches(chosen.files, 1, 1), strict=False))
    if not found:
        raise ConfigError(f"the evaluation's files hold no row of {file.data.length} tokens; give more text")
    rows = np.concatenate([batch["tokens"] for _, batch in found])
    return training, lambda model: {"held_out": decode_loss(model, rows, cache)}


def teller(log: Callable[[dict[str, Any]], None], advance: Callable[..., None], flops: float, devices: int) -> Any:
    """What is told of each step, and where."""
    held_out: list[float] = []

    def report(told: Told) -> None:
        speed = told.tokens / told.seconds
        numbers = {**told.numbers, "tokens_per_second": speed}
        share = share_of_peak(flops * told.tokens, told.seconds, devices)
        numbers |= {} if share is None else {"share_of_peak": share}
        if "held_out" in numbers:
            held_out[:] = [numbers["held_out"]]
        log({"step": told.step, "seconds": told.seconds, **numbers})
        words = [f"loss {numbers['loss']:.3f}", f"gradient {numbers['gradient_norm']:.2f}", f"{speed:,.0f} tokens/s"]
        words += [] if share is None else [f"{share:.0%} of peak"]
        words += [f"held out {held_out[0]:.3f}"] if held_out else []
        advance(told.step, ", ".join(words))

    return report


@contextlib.contextmanager
def log_of(run: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields what writes a line to log.jsonl, and its numbers for TensorBoard."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / "log.jsonl").open("a+") as lines, EventFile(run / "tensorboard") as events:
        lines.seek(0)
        if (text := lines.read()) and not text.endswith("\n"):
            lines.write("\n")  # a kill left half a line

        def write(numbers: dict[str, Any]) -> None:
            print(json.dumps({**numbers, "time": time.time()}), file=lines, flush=True)
            events.scalars(numbers["step"], {name: value for name, value in numbers.items() if name != "step"})

        yield write


def read_log(run: Path) -> list[dict[str, Any]]:
    """The log's lines in order of steps; of a step that was taken again after a kill, the last."""
    steps = {}
    for line in (run / "log.jsonl").read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a kill may leave half a line
            told = json.loads(line)
            steps[told["step"]] = told
    return [steps[step] for step in sorted(steps)]


@contextlib.contextmanager
def bar_of(steps: int, console: Console) -> Iterator[Callable[[int, str], None]]:
    """A progress bar on the terminal; yields `advance(step, words)`."""
    columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("compiling", total=steps)
        yield lambda step, words: bar.update(task, completed=step, description=words)


def draw(run: Path) -> None:
    """Writes loss.png: the loss of every step, and what was measured on held-out text."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        Console(stderr=True).print("no loss.png: matplotlib is not installed (the extra `plots`)")
        return
    lines = read_log(run)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], linewidth=0.8, label="training")
    measured = [line for line in lines if "held_out" in line]
    if measured:
        points = [line["step"] for line in measured], [line["held_out"] for line in measured]
        axes.plot(*points, marker="o", label="held out, decoded with the cache")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False)
    figure.savefig(run / "loss.png", dpi=150)


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except KvjaxError as error:
        sys.exit(f"error: {error}")
