"""Results on disk: written as they are made, so that a run cut short goes on where it was."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from kvjax.errors import ConfigError
from kvjax.evaluate.rows import Row

FORMAT = 1
"""Of the file; rises when older files can no longer be read."""


@dataclasses.dataclass
class Results:
    """The file of one evaluation.

    Attributes:
      path: where it lies. identity: what its results depend on beside the cache.
      about: whatever describes the run: the machine, the command. entries: one per (row, task), in any order.
    """

    path: Path
    identity: dict[str, Any]
    about: dict[str, Any]
    entries: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def find(self, row: Row, task: str) -> dict[str, Any] | None:
        """What was measured of this cache and task before, whatever the row was called then."""
        key = (repr(row.cache), task)
        return next((entry for entry in self.entries if (entry["cache"], entry["task"]) == key), None)

    def add(self, row: Row, task: str, measured: dict[str, Any]) -> dict[str, Any]:
        """Takes in a result and writes the file anew; a kill at any time leaves the old file or the new one."""
        entry = {"label": row.label, "point": row.point, "cache": repr(row.cache), "task": task, **measured}
        self.entries.append(entry)
        self.write()
        return entry

    def of(self, rows: tuple[Row, ...], tasks: tuple[str, ...]) -> list[dict[str, Any]]:
        """The entries of these rows, in their order, under their present names."""
        found = []
        for row in rows:
            for task in tasks:
                entry = self.find(row, task)
                if entry is not None:
                    found.append({**entry, "label": row.label, "point": row.point})
        return found

    def write(self) -> None:
        """Writes the file, in one move."""
        document = {"format": FORMAT, "identity": self.identity, "about": self.about, "results": self.entries}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
        os.replace(part, self.path)


def open_results(path: Path, identity: dict[str, Any], about: dict[str, Any] | None, fresh: bool = False) -> Results:
    """The results at `path` to go on with, or none yet.

    Args:
      about: of the run that begins; None: nothing will be added, what the file says stays.
      fresh: begin anew, whatever is there.

    Raises:
      ConfigError: the file is damaged, or its results were made with another model, text or other settings.
    """
    if fresh or not path.exists():
        return Results(path, identity, about or {})
    document = read_results(path)
    different = [key for key in identity if document["identity"].get(key) != identity[key]]
    if different:
        was, now = document["identity"].get(different[0]), identity[different[0]]
        if isinstance(was, dict) and isinstance(now, dict):
            was = {key: value for key, value in was.items() if now.get(key) != value}
            now = {key: value for key, value in now.items() if key in was}
        raise ConfigError(
            f"the results in {path.name} were made with another {different[0]} ({was}, now {now}); delete the file, "
            "begin anew with --fresh, or give another --out"
        )
    return Results(path, identity, document["about"] if about is None else about, document["results"])


def read_results(path: Path) -> dict[str, Any]:
    """A whole results file.

    Raises:
      ConfigError: it cannot be read, or is damaged.
    """
    remedy = "delete it, begin anew with --fresh, or give another --out"
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is damaged: {error}; {remedy}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ConfigError(f"{path} holds no results of format {FORMAT}; {remedy}")
    entries = document.get("results")
    parts = {"label": str, "point": str, "cache": str, "task": str, "metrics": dict, "bytes": dict, "seconds": dict}
    whole = all(isinstance(document.get(key), dict) for key in ("identity", "about")) and isinstance(entries, list)
    for number, entry in enumerate(entries if whole and isinstance(entries, list) else []):
        if not isinstance(entry, dict) or any(not isinstance(entry.get(key), kind) for key, kind in parts.items()):
            raise ConfigError(f"{path} is damaged: result {number} lacks something; {remedy}")
    if not whole:
        raise ConfigError(f"{path} is damaged: it lacks an identity, what it is about, or results; {remedy}")
    return document
