"""Ranges and levels of a model's keys and values, from text: the file that the codec KVQuant is given.

python scripts/calibrate.py                                           # the demo model, on what it was trained on
python scripts/calibrate.py MODEL --text notes.txt more.txt --out MODEL/kvquant.npz --length 2048
python scripts/generate.py MODEL --codec kvquant:3,calibration=MODEL/kvquant.npz ...
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import tyro

import kvjax
from kvjax.errors import ConfigError, KvjaxError
from kvjax.evaluate.tasks import material_of
from kvjax.train.data import library_files, random_window, split_files

ROOT = Path(__file__).resolve().parent.parent
FILES = 64
"""Source files that are read where no text is given."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What is read, and what it is for.

    Attributes:
      model: a Hugging Face directory or a kvjax checkpoint.
      out: the .npz file that is written.
      text: text files of the kind that will be served; none: source files of Python's library, none of those that
        scripts/evaluate.py asks about.
      sequences, length: how many windows of how many tokens are drawn from them.
      outliers, first: as the codec will be given them.
      dtype: of the model; None: bfloat16 on an accelerator, float32 on a CPU.
      seed: of the windows.
    """

    model: tyro.conf.Positional[Path] = ROOT / "models" / "demo"
    out: Path = Path("runs/kvquant.npz")
    text: tuple[Path, ...] = ()
    sequences: int = 16
    length: int = 512
    outliers: float = 0.01
    first: int = 1
    dtype: str | None = None
    seed: int = 0


def main(arguments: Arguments) -> None:
    """Draws windows, calibrates, writes."""
    rng = np.random.default_rng(arguments.seed)
    model = kvjax.load(arguments.model, dtype=arguments.dtype)
    files = list(arguments.text)
    if not files:
        known = split_files(library_files())[0]
        files = [known[index] for index in rng.choice(len(known), min(FILES, len(known)), replace=False)]
    tokens = material_of(model, files).tokens
    if len(tokens) < arguments.length:
        raise ConfigError(f"--text holds {len(tokens)} tokens, --length asks for {arguments.length}; give more text")
    windows = np.stack([random_window(tokens, arguments.length, rng) for _ in range(arguments.sequences)])
    found = kvjax.calibrate(model, windows, outliers=arguments.outliers, first=arguments.first)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    found.save(arguments.out)
    print(f"{arguments.out}: {found}, of {windows.size} tokens")


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except KvjaxError as error:
        sys.exit(f"error: {error}")
