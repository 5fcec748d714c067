"""Source code as byte tokens: which files, which are held out, and windows drawn from them."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from kvjax.errors import ConfigError

SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "__pycache__"}
)


def library_files(root: str | Path | None = None) -> list[Path]:
    """The `*.py` files under `root`, sorted by relative path, without tests, third-party packages and data tables.

    Args:
      root: a folder; None: the standard library of the running Python.
    """
    folder = Path(sysconfig.get_path("stdlib") if root is None else root)
    files = [path for path in folder.rglob("*.py") if not SKIPPED_FOLDERS.intersection(path.relative_to(folder).parts)]
    if not files:
        raise ConfigError(f"no Python source files under {folder}; give a folder that holds some")
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def is_held_out(name: str, one_in: int = 20) -> bool:
    """Whether a file of this relative name is kept from training: about one in `one_in`, by a hash of the name alone.

    The name alone, so that adding or removing other files never moves a file between the two sides.
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % one_in == 0


def split_files(files: Iterable[Path], root: str | Path | None = None) -> tuple[list[Path], list[Path]]:
    """(training files, held-out files), in the order given."""
    folder = Path(sysconfig.get_path("stdlib") if root is None else root)
    train: list[Path] = []
    held_out: list[Path] = []
    for path in files:
        (held_out if is_held_out(path.relative_to(folder).as_posix()) else train).append(path)
    return train, held_out


def read_bytes(files: Iterable[Path], end_token: int) -> np.ndarray:
    """All files as one int32[bytes + files] array of byte values, each file followed by `end_token`."""
    parts = []
    for path in files:
        parts.append(np.frombuffer(path.read_bytes(), np.uint8).astype(np.int32))
        parts.append(np.array([end_token], np.int32))
    return np.concatenate(parts)


def random_window(tokens: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """`length` consecutive tokens from a uniformly random place."""
    start = rng.integers(0, len(tokens) - length + 1)
    return tokens[start : start + length]


def random_lines(tokens: np.ndarray, length: int, rng: np.random.Generator, end_token: int) -> np.ndarray:
    """At most `length` tokens of whole lines, ending in a newline, from a random place; may be empty."""
    window = random_window(tokens, length + 200, rng)
    breaks = np.flatnonzero(window == ord("\n"))
    if len(breaks) < 2:
        return window[:0]
    start = breaks[0] + 1
    last = breaks[breaks < start + length]
    lines = window[start : last[-1] + 1]
    return lines[lines != end_token]
