"""Results on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def replace(path: Path, text: str) -> None:
    """Writes a file at once: whoever cuts the run off finds the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    beside.replace(path)


def write_results(out: Path, results: Any, page: str) -> None:
    """Results for programs and the page for people: `out` with the suffixes .json and .md."""
    replace(out.with_suffix(".json"), json.dumps(results, indent=1) + "\n")
    replace(out.with_suffix(".md"), page)
