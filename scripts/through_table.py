"""What training through a cache is worth: the demo model tuned for a few steps plainly and through two small caches.

python scripts/through_table.py --out docs/results/through_cpu

Every run sees the same rows of the standard library in the same order. Measured is held-out text along the decode path,
one token a step, with the cache itself: before, after plain tuning, and after tuning through that cache.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console

import kvjax
from kvjax import CacheConfig
from kvjax.evaluate.machine import about_machine, machine_line
from kvjax.train import Told, finetune
from kvjax.train.data import library_files, random_window, read_bytes, split_files
from kvjax.train.decode_loss import decode_loss

CACHES = {
    "SlidingWindow(64)": CacheConfig(policy=kvjax.policies.SlidingWindow(64)),
    "KIVI(2, residual=32)": CacheConfig(codec=kvjax.codecs.KIVI(2, residual=32)),
}
FULL = "Full, Dense"


@dataclasses.dataclass
class Arguments:
    """What is trained and measured."""

    model: Path = Path("models/demo")
    """The model every run starts from; its tokens are bytes."""
    out: Path | None = None
    """Writes OUT.md and OUT.json."""
    steps: int = 60
    batch: int = 8
    length: int = 256
    """Tokens of a training row."""
    learning_rate: float = 1e-4
    seed: int = 0
    rows: int = 16
    """Held-out rows."""
    held_out_length: int = 384
    """Tokens of each; the first third goes through prefill and is not counted."""


def main(arguments: Arguments) -> None:
    """Trains, measures, prints, writes."""
    about = about_machine()
    console, began = Console(stderr=True), time.process_time()
    model = kvjax.load(arguments.model, dtype="float32")
    (end,) = model.config.eos_token_ids
    training, held_out = (read_bytes(files, end) for files in split_files(library_files()))
    rng = np.random.default_rng(arguments.seed)
    tokens = windows(training, arguments.steps * arguments.batch, arguments.length, rng)
    rows = windows(held_out, arguments.rows, arguments.held_out_length, rng)

    def measured(one: kvjax.Model, cache: CacheConfig) -> float:
        return decode_loss(one, rows, cache, arguments.held_out_length // 3)

    def tuned(name: str, through: CacheConfig | None) -> kvjax.Model:
        def report(told: Told) -> None:
            if told.step % 10 == 0:
                console.print(f"{name}: step {told.step}, loss {told.numbers['loss']:.3f}, {told.seconds:.1f} s a step")

        how = arguments.steps, arguments.batch, arguments.learning_rate, arguments.seed
        return finetune(model, tokens, *how, through=through, report=report)

    plain = tuned("plainly", None)
    found: dict[str, dict[str, float]] = {}
    for name, cache in {FULL: CacheConfig(), **CACHES}.items():
        found[name] = {"before": measured(model, cache), "plain": measured(plain, cache)}
        if name != FULL:
            found[name]["through"] = measured(tuned(f"through {name}", cache), cache)
        console.print(name, found[name])
    about["cpu_seconds"] = round(time.process_time() - began)
    print(table(found))
    if arguments.out is not None:
        write(arguments, found, about)


def windows(text: np.ndarray, count: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """int32[count, length] out of `text`, from anywhere."""
    return np.stack([random_window(text, length, rng) for _ in range(count)])


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown: a row per cache; no run is tuned through the full one, which is what plain tuning is."""
    lines = ["| cache | before | tuned plainly | tuned through it |", "|---|--:|--:|--:|"]
    for name, losses in found.items():
        cells = [f"{losses[kind]:.3f}" if kind in losses else "" for kind in ("before", "plain", "through")]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def write(arguments: Arguments, found: dict[str, dict[str, float]], about: dict[str, Any]) -> None:
    """OUT.md and OUT.json."""
    assert arguments.out is not None
    command = "python " + " ".join(sys.argv)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    a, counted = arguments, arguments.held_out_length - arguments.held_out_length // 3
    page = (
        "# Tuned through the cache that serves",
        "",
        f"{a.model}, {a.steps} steps of {a.batch} rows of {a.length} bytes of the standard library, learning rate "
        f"{a.learning_rate:g}, the same rows for all, seed {a.seed}. Nats per byte of held-out files, one token a step "
        f"with that cache: {a.rows} rows of {a.held_out_length} bytes, the last {counted} of each counted.",
        "",
        table(found),
        "",
        f"`{command}`, {about['cpu_seconds']} s of processor time.",
        "",
        machine_line(about),
        "",
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".md").write_text("\n".join(page))
    whole = {"command": command, "settings": settings, "machine": about, "losses": found}
    arguments.out.with_suffix(".json").write_text(json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
