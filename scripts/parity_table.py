"""How far kvjax is from `transformers`, per family and path, on the cases of the parity tests.

    python -m scripts.parity_table --out docs/results/parity_cpu.md

Every case is a small random float32 model, saved by transformers and loaded by kvjax; both see the same tokens, more of
them than the windows are wide. Run it as a module, from the root of the repository: it takes the cases from `tests`.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import importlib.metadata
import platform
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
import tyro
from rich.console import Console

import kvjax
from kvjax.convert.families import FAMILIES
from tests.parity.cases import BATCH, CASES, LENGTH, Case
from tests.parity.helpers import random_tokens, transformers_logits

PATHS: tuple[Literal["forward", "prefill", "decode"], ...] = ("forward", "prefill", "decode")
CACHE = kvjax.CacheConfig(page_size=4)
PROMPT, CHUNK = 5, 16


@dataclasses.dataclass
class Arguments:
    """What is compared."""

    families: tuple[str, ...] = ()
    """Model types, e.g. gemma2 deepseek_v3; none: all."""
    out: Path | None = None
    """Writes the table to this file."""


def differences(case: Case) -> dict[str, float]:
    """Per path, the largest absolute difference of the case's logits."""
    theirs = case.model()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = kvjax.load(folder, dtype="float32")
    tokens = random_tokens()
    expected = transformers_logits(theirs, tokens)
    found: dict[str, float] = {}
    for path in PATHS:
        logits = kvjax.score(ours, tokens, CACHE, path=path, prompt_length=PROMPT, prefill_chunk=CHUNK)
        found[path] = float(np.abs(np.asarray(logits) - expected).max())
    return found


def markdown(results: dict[str, list[dict[str, float]]]) -> str:
    """The page."""
    packages = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    lines = [
        "# The same numbers as transformers",
        "",
        "Largest absolute difference of logits (of order one) to `transformers` with eager attention, float32, "
        f"{BATCH} sequences of {LENGTH} tokens, longer than every window. forward: the training path. prefill: through "
        f"the paged cache in chunks of {CHUNK}. decode: {PROMPT} tokens through prefill, then one token a step.",
        "",
        f"{datetime.date.today().isoformat()}, {platform.system()} {platform.machine()}. Python "
        f"{platform.python_version()}, {versions}.",
        "",
        "| family | configurations | " + " | ".join(PATHS) + " |",
        "|---|--:|" + "--:|" * len(PATHS),
    ]
    for family in (name for name in FAMILIES if name in results):
        rows = results[family]
        cells = (f"{max(row[path] for row in rows):.1e}" for path in PATHS)
        lines.append(f"| {family} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Made by `python -m scripts.parity_table --out docs/results/parity_cpu.md`.", ""])


def main(arguments: Arguments) -> None:
    """Compares, prints, and writes the table."""
    console = Console()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results: dict[str, list[dict[str, float]]] = collections.defaultdict(list)
    for case in CASES:
        family = type_of(case)
        if arguments.families and family not in arguments.families:
            continue
        row = differences(case)
        results[family].append(row)
        console.print(f"{case.name}: " + ", ".join(f"{path} {value:.1e}" for path, value in row.items()))
    page = markdown(results)
    console.print(page)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(page)


def type_of(case: Case) -> str:
    """The model type of a case, without building it."""
    return next(name for name, family in FAMILIES.items() if family.architecture == case.model_class)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
