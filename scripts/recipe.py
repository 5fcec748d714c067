"""Trains a small MHA model, converts it to GQA, MQA, MLA and CLA, heals what came of it, and measures everything.

    python scripts/recipe.py --out docs/results/recipe_cpu

The work is in pieces, each done once: run again, it goes on where it was cut short.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import kvjax
from kvjax.errors import KvjaxError
from kvjax.evaluate.machine import about_machine, machine_line
from kvjax.train.data import library_files, read_bytes, split_files
from kvjax.train.pieces import Pieces
from kvjax.train.recipe_file import RecipeFile
from kvjax.train.recipe_table import Row, markdown, rows_of, summary
from kvjax.train.recipe_work import Tell, Work
from kvjax.train.tokenizer import END_ID
from pallas_kernels.checks.files import write_results

MARKS = {"plain": "o", "distilled": "D"}
"""Of healed models in the picture."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What is done.

    Attributes:
      config: a file like configs/recipe.toml.
      run: the folder of weights and of pieces.json, the results so far.
      corpus: a folder of Python files to train on; None: the standard library.
      out: OUT.json and OUT.md are written after every piece, OUT.png at the end; None: only the table on the terminal.
      work: --no-work: do no piece, only write what there is.
    """

    config: Path = Path("configs/recipe.toml")
    run: Path = Path("runs/recipe")
    corpus: Path | None = None
    out: Path | None = None
    work: bool = True


def main(arguments: Arguments) -> None:
    """Does what is left, and writes it up."""
    file = RecipeFile.from_toml(arguments.config)
    console = Console(stderr=True)
    pieces = Pieces(arguments.run / "pieces.json", file.as_table(), about_machine(("jax", "jaxlib", "flax", "optax")))
    if arguments.work:
        train_files, held_out_files = split_files(library_files(arguments.corpus), arguments.corpus)
        code, held_out = read_bytes(train_files, END_ID), read_bytes(held_out_files, END_ID)
        with bars(console) as (begin, tell):
            work = list(Work(file, arguments.run, code, held_out, tell).everything())
            for name, piece in work:
                begin(name, len(work))
                pieces.once(name, piece)
                write(arguments, file, pieces)
    write(arguments, file, pieces)
    rows = rows_of(file, pieces.results)
    if arguments.out is not None and rows:
        draw(rows, arguments.out.with_suffix(".png"))
    console.print(page(arguments, file, pieces), highlight=False, soft_wrap=True, markup=False)


@contextlib.contextmanager
def bars(console: Console) -> Iterator[tuple[Callable[[str, int], None], Tell]]:
    """Two progress bars; yields what begins a piece, by its name and of how many, and what tells of its steps."""
    columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        whole = progress.add_task("recipe", total=None, completed=-1)
        within = progress.add_task("", total=None)

        def begin(name: str, count: int) -> None:
            progress.update(whole, total=count, advance=1)
            progress.reset(within, total=None, description=name)

        def tell(done: int, count: int, word: str) -> None:
            progress.update(within, completed=done, total=count)
            progress.update(whole, description=word)

        yield begin, tell


def page(arguments: Arguments, file: RecipeFile, pieces: Pieces) -> str:
    """The results so far, for people."""
    command = "python scripts/recipe.py" + (f" --out {arguments.out}" if arguments.out else "")
    return markdown(file, pieces.results, machine_line(pieces.about), command)


def write(arguments: Arguments, file: RecipeFile, pieces: Pieces) -> None:
    """OUT.json and OUT.md."""
    if arguments.out is None:
        return
    table: dict[str, Any] = {
        "machine": pieces.about,
        "settings": file.as_table(),
        "rows": summary(rows_of(file, pieces.results)),
        "pieces": pieces.results,
    }
    write_results(arguments.out, table, page(arguments, file, pieces))


def draw(rows: list[Row], path: Path) -> None:
    """Loss against bytes of a token: converted, healed, from scratch."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        Console(stderr=True).print("no picture: matplotlib is not installed (the extra `plots`)")
        return
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    # Conversions of equal bytes stand side by side.
    sizes = sorted({row.bytes for row in rows})
    peers = {size: [row for row in rows if row.bytes == size] for size in sizes}
    for number, row in enumerate(rows):
        beside = peers[row.bytes]
        x = row.bytes * 2 ** (0.13 * (beside.index(row) - (len(beside) - 1) / 2))
        color = f"C{number}"
        axes.plot(x, row.converted, marker="x", color=color, linestyle="none")
        for objective, mark in MARKS.items():
            healed = row.healed[objective]
            if healed.mean is not None:
                axes.errorbar(x, healed.mean, healed.spread / 2, marker=mark, color=color, markersize=5, capsize=2)
                axes.plot([x, x], [healed.mean, row.converted], color=color, linewidth=0.6, alpha=0.6)
        if row.scratch is not None:
            axes.plot(x, row.scratch, marker="_", color=color, markersize=16, linestyle="none")
        axes.plot([], [], marker="s", linestyle="none", color=color, label=row.name)
    kinds = {"x": "converted", "o": "healed, plain", "D": "healed, distilled", "_": "from scratch"}
    for mark, label in kinds.items():
        axes.plot([], [], marker=mark, linestyle="none", color="black", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_yticks(ticks := [1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0], [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    low = min([row.converted for row in rows] + [row.scratch or row.converted for row in rows])
    axes.set_ylim(0.93 * low, 1.07 * max(row.converted for row in rows))
    axes.set_xlabel("bytes of a token in the cache, bfloat16")
    axes.set_ylabel("held-out loss, nats per byte")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    # Most pieces differ in their data alone: each program is compiled once.
    given = tyro.cli(Arguments, description=__doc__)
    kvjax.enable_compilation_cache(given.run / "programs")
    try:
        main(given)
    except KvjaxError as error:
        sys.exit(f"error: {error}")
