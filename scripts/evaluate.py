"""What each cache loses and saves: text, recall, tracking and copying through the decode path, bytes and speed.

python scripts/evaluate.py                                     # the demo model under configs/evaluate.toml
python scripts/evaluate.py MODEL --caches MINE.toml --out runs/mine --context 4096 --batch 4
python scripts/evaluate.py --methods my_policies --caches MINE.toml    # classes of my_policies.py, by name

Results are kept as they are made: the same command again goes on where it was cut short.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import tyro
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import kvjax
from kvjax.errors import ConfigError, KvjaxError
from kvjax.evaluate.machine import about_machine
from kvjax.evaluate.report import QUALITIES, curves, heatmaps, markdown, table
from kvjax.evaluate.results import Results, open_results
from kvjax.evaluate.rows import Row, rows_of
from kvjax.evaluate.suite import Settings, Suite
from kvjax.evaluate.tasks import material_of

matplotlib.use("agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What is evaluated.

    Attributes:
      model: a Hugging Face directory or a kvjax checkpoint.
      caches: TOML with a [[cache]] table per method.
      out: writes OUT.json, OUT.md, OUT_quality.png, OUT_reads.png and OUT_recall.png.
      only: labels of the caches to run; none: all of the file.
      methods: modules with policies, codecs or selects of your own, which the file may then name.
      text: text files to ask about; none: source files that the demo model was not trained on.
      dtype: of the model; None: bfloat16 on an accelerator, float32 on a CPU.
      settings: what is asked, how often.
      fresh: forget the results that OUT.json holds.
      draw: only report what OUT.json holds already.
      compilation_cache: keep compiled programs on disk, so that the next run is quicker.
    """

    model: tyro.conf.Positional[Path] = ROOT / "models" / "demo"
    caches: Path = ROOT / "configs" / "evaluate.toml"
    out: Path = Path("runs/evaluate")
    only: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    text: tuple[Path, ...] = ()
    dtype: str | None = None
    settings: tyro.conf.OmitArgPrefixes[Settings] = Settings()
    fresh: bool = False
    draw: bool = False
    compilation_cache: bool = True


def main(arguments: Arguments) -> None:
    """Runs what is missing, and reports."""
    console = Console(stderr=True)
    if arguments.compilation_cache:
        kvjax.enable_compilation_cache()
    rows = chosen_rows(arguments)
    model = kvjax.load(arguments.model, dtype=arguments.dtype)
    suite = Suite(model, material_of(model, arguments.text or None), arguments.settings)
    about = None if arguments.draw else about_run(arguments)
    results = open_results(arguments.out.with_suffix(".json"), suite.identity, about, arguments.fresh)
    if not arguments.draw:
        run(suite, rows, results, console)
    report(results, rows, arguments, console)


def chosen_rows(arguments: Arguments) -> tuple[Row, ...]:
    """The rows of the file, or those asked for."""
    # A module beside the caller counts too, as it does for `python -m`.
    sys.path.insert(0, os.getcwd())
    own: list[type] = []
    for name in arguments.methods:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ConfigError(f"--methods: cannot import {name}: {error}; give the name of a Python module") from error
        own += [kind for kind in vars(module).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    rows = rows_of(arguments.caches, own)
    unknown = set(arguments.only) - {row.label for row in rows}
    if unknown:
        labels = ", ".join(dict.fromkeys(row.label for row in rows))
        raise ConfigError(f"--only: no cache is labelled {sorted(unknown)[0]!r}; {arguments.caches} has {labels}")
    return tuple(row for row in rows if not arguments.only or row.label in arguments.only)


def run(suite: Suite, rows: Sequence[Row], results: Results, console: Console) -> None:
    """Measures what the results lack, and keeps each as it is made."""
    pairs = [(row, task) for row in rows for task in suite.settings.tasks]
    missing = [(row, task) for row, task in pairs if results.find(row, task) is None]
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False)),
    )
    with Progress(*columns, console=console) as bar:
        job = bar.add_task("", total=len(pairs), completed=len(pairs) - len(missing))
        for row, task in missing:
            bar.update(job, description=f"{row.name}: {task}")
            try:
                measured = suite.measure(task, row.cache)
            except KvjaxError as error:
                raise ConfigError(f"{row.name}, {task}: {error}") from error
            results.add(row, task, measured)
            bar.advance(job)


def report(results: Results, rows: tuple[Row, ...], arguments: Arguments, console: Console) -> None:
    """The table on the terminal, the page and the pictures."""
    entries = results.of(rows, arguments.settings.tasks)
    if not entries:
        raise ConfigError(f"{results.path} holds no results of these caches and tasks; run without --draw")
    print_table(*table(entries))
    pictures = [draw_quality(entries, arguments.out, "held"), draw_recall(entries, arguments.out)]
    if any(row.cache.select is not None for row in rows):
        pictures.insert(1, draw_quality(entries, arguments.out, "read"))
    names = [picture.name for picture in pictures if picture is not None]
    page = markdown(entries, results.identity, results.about, names)
    arguments.out.with_suffix(".md").write_text(page)
    console.print(f"{results.path} and the page and pictures beside it", highlight=False)


IN_SHORT = (
    "cache",
    "of the first",
    "kB held",
    "kB read a step",
    "above full",
    "recall",
    "tracking",
    "copied",
)
"""Columns that a narrow terminal shows, without errors; the page has all."""


def print_table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """All columns where there is room for them."""

    def made(chosen: Sequence[int], errors: bool) -> Table:
        shown = Table(*(titles[i] for i in chosen))
        for column in shown.columns:
            column.no_wrap, column.justify = True, "right"
        shown.columns[0].justify = "left"
        for line in lines:
            shown.add_row(*(line[i] if errors else line[i].partition(" ±")[0] for i in chosen))
        return shown

    def width(of: Table) -> int:
        endless = Console(width=10_000)
        return Measurement.get(endless, endless.options, of).maximum

    terminal = Console()
    shown = made(range(len(titles)), errors=True)
    if not terminal.is_terminal:
        # What no terminal is waiting for need not fit one.
        terminal = Console(width=width(shown))
    elif width(shown) > terminal.width:
        shown = made([i for i, title in enumerate(titles) if title in IN_SHORT], errors=False)
    terminal.print(shown)


SIZES = {
    "held": ("quality", "kB of keys and values held, per sequence"),
    "read": ("reads", "kB read by one decoding step, per sequence"),
}
"""Field of a footprint -> the picture's name, and its axis."""


def draw_quality(entries: list[dict[str, Any]], out: Path, size: str) -> Path:
    """Quality against bytes, one curve per label and one panel per task; size: of `SIZES`."""
    tasks = [task for task in QUALITIES if any(entry["task"] == task for entry in entries)]
    figure, panels = plt.subplots(1, len(tasks), figsize=(4.2 * len(tasks), 4.4), layout="constrained", squeeze=False)
    labels = list(dict.fromkeys(entry["label"] for entry in entries))
    marks = {label: ("osD^vP*X"[i % 8], plt.get_cmap("tab20")(i % 20)) for i, label in enumerate(labels)}
    for task, axes in zip(tasks, panels[0], strict=True):
        for label, points in curves(entries, task, size).items():
            sizes, values, errors = zip(*points, strict=True)
            marker, colour = marks[label]
            kilobytes = [each / 1000 for each in sizes]
            axes.errorbar(
                kilobytes,
                values,
                errors,
                marker=marker,
                color=colour,
                markersize=4,
                linewidth=1,
                capsize=2,
                label=label,
            )
        axes.set(xscale="log", xlabel=SIZES[size][1], title=QUALITIES[task][1])
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.3)
    handles = {label: line for axes in panels[0] for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(8, 2 * len(tasks)), fontsize=8
    )
    path = out.with_name(f"{out.name}_{SIZES[size][0]}.png")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def draw_recall(entries: list[dict[str, Any]], out: Path) -> Path | None:
    """Recall by depth and budget, one heatmap per label; nothing where nothing was swept."""
    maps = heatmaps(entries)
    if not maps:
        return None
    across = min(5, len(maps))
    down = -(-len(maps) // across)
    figure, panels = plt.subplots(
        down, across, figsize=(2.6 * across + 0.8, 2.1 * down + 0.4), layout="constrained", squeeze=False
    )
    image = None
    for axes in panels.flat[len(maps) :]:
        axes.axis("off")
    for axes, (label, (points, depths, values)) in zip(panels.flat, maps.items(), strict=False):
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_title(label, fontsize=9)
        axes.set_xticks(range(len(depths)), depths, fontsize=7)
        axes.set_yticks(range(len(points)), points, fontsize=7)
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                colour = "white" if value < 0.6 else "black"
                axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=7)
    assert image is not None
    figure.colorbar(image, ax=panels, label="answers right", shrink=0.8)
    figure.supxlabel("depth of the line asked for (0: the start)", fontsize=9)
    figure.supylabel("budget", fontsize=9)
    path = out.with_name(f"{out.name}_recall.png")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def about_run(arguments: Arguments) -> dict[str, Any]:
    """What ran, on what, when."""
    given = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return {
        "command": shlex.join(["python", "scripts/evaluate.py", *given]),
        "model": arguments.model.name,
        "caches": arguments.caches.name,
        **about_machine(),
    }


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except KvjaxError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
