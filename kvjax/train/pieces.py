"""Long work in pieces, each done once: what came of them lies in one JSON file, whole after every piece."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvjax.errors import CheckpointError, ConfigError


class Pieces:
    """The results so far, by the piece's name.

    Args:
      path: of the file; made with the first piece.
      settings: what results depend on, as JSON holds it. A file of other settings is refused.
      about: what else the file tells, such as the machine; of a file that is there, its own stays.

    Raises:
      CheckpointError: the file cannot be read, or is none.
      ConfigError: it is of other settings.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        self._path = Path(path)
        self._table: dict[str, Any] = {"about": dict(about), "settings": dict(settings), "pieces": {}}
        if not self._path.exists():
            return
        try:
            self._table = json.loads(self._path.read_text())
            was = self._table["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"cannot read the results so far, {path}: {error}; move it away to begin anew"
            ) from error
        other = sorted(name for name in {*was, *settings} if was.get(name) != settings.get(name))
        if other:
            raise ConfigError(
                f"{path} holds results of another [{other[0]}]; go on with the settings it began with, or choose "
                "another run folder"
            )

    @property
    def about(self) -> dict[str, Any]:
        """What was told when the file was made."""
        return dict(self._table["about"])

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """What is done, by name."""
        return dict(self._table["pieces"])

    def once(self, name: str, work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What came of a piece: as it was recorded, or else of doing it now; its time in seconds is added."""
        if name not in self._table["pieces"]:
            began = time.monotonic()
            result = dict(work())
            self._table["pieces"][name] = {**result, "seconds": round(time.monotonic() - began, 1)}
            self._write()
        found: dict[str, Any] = self._table["pieces"][name]
        return found

    def _write(self) -> None:
        partial = self._path.with_name(self._path.name + ".partial")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(self._table, indent=2) + "\n")
            os.replace(partial, self._path)
        except OSError as error:
            raise CheckpointError(f"cannot write {self._path}: {error.strerror}; make room and run again") from error
