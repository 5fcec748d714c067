"""Local text and JSONL files as documents that can be read in any order."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

from kvjax.errors import ConfigError


class TextFiles(Sequence[str]):
    """Documents: each line of a `.jsonl` file, and each other file as a whole. Text stays on disk until asked for.

    Every line of every JSONL file is looked at once, here, so that a run does not end days later at a bad one.

    Args:
      paths: files, in the order that numbers their documents.
      field: of a JSONL object: its text.

    Raises:
      ConfigError: a file is missing, cannot be read, holds no text, is not UTF-8, or a line of it is not a JSON object
        with text in `field`; the message names file and line.
    """

    def __init__(self, paths: Iterable[str | Path], field: str = "text") -> None:
        self._paths = [Path(path).expanduser() for path in paths]
        self._field = field
        # Of each document: its file, its line (0: the whole file), where it begins, how long it is.
        self._file, self._line, self._start, self._length = (array("q") for _ in range(4))
        if not self._paths:
            raise ConfigError("no text files are given; name at least one")
        for number, path in enumerate(self._paths):
            before = len(self._file)
            try:
                (self._index_lines if path.suffix == ".jsonl" else self._index_whole)(number, path)
            except OSError as error:
                raise ConfigError(f"cannot read {path}: {error.strerror}; give the path of a text file") from error
            if len(self._file) == before:
                raise ConfigError(f"{path} is empty: it holds no text to train on; leave it out")

    def __len__(self) -> int:
        return len(self._file)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        path, line = self._paths[self._file[index]], self._line[index]
        try:
            with path.open("rb") as file:
                file.seek(self._start[index])
                content = file.read(self._length[index])
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        return self._text(content, path, line) if line else _decoded(content, path, 0)

    def _index_whole(self, number: int, path: Path) -> None:
        content = path.read_bytes()
        if _decoded(content, path, 0).strip():
            self._add(number, 0, 0, len(content))

    def _index_lines(self, number: int, path: Path) -> None:
        start = 0
        with path.open("rb") as file:
            for line, content in enumerate(file, 1):
                if content.strip():
                    self._text(content, path, line)
                    self._add(number, line, start, len(content))
                start += len(content)

    def _add(self, *place: int) -> None:
        for column, value in zip((self._file, self._line, self._start, self._length), place, strict=True):
            column.append(value)

    def _text(self, content: bytes, path: Path, line: int) -> str:
        """The text of a JSONL line."""
        try:
            record = json.loads(_decoded(content, path, line))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {line}: not valid JSON ({error.msg}); mend or remove the line") from error
        text = record.get(self._field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            held = f"an object with {sorted(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
            raise ConfigError(
                f"{path}, line {line}: must be an object with text in {self._field!r}, got {held}; name the field that "
                "holds the text"
            )
        return text


def _decoded(content: bytes, path: Path, line: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"{path}, line {line}" if line else f"{path}, byte {error.start}"
        raise ConfigError(f"{where}: not UTF-8 text ({error.reason}); convert the file") from error


def matching(patterns: Iterable[str], folder: str | Path = ".") -> list[Path]:
    """The files that paths and glob patterns name, relative ones from `folder`, sorted within each pattern.

    Raises:
      ConfigError: a pattern names nothing.
    """
    found: list[Path] = []
    for pattern in patterns:
        # Globs do not follow "..".
        path = Path(os.path.normpath(Path(folder).resolve() / Path(pattern).expanduser()))
        if not any(sign in pattern for sign in "*?["):
            found.append(path)
            continue
        some = sorted(file for file in Path(path.anchor).glob(str(path.relative_to(path.anchor))) if file.is_file())
        if not some:
            raise ConfigError(f"no file matches {pattern!r} in {Path(folder).resolve()}")
        found += some
    return found
