"""Typed reading of a JSON table whose author may have been careless."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from kvjax.errors import CheckpointError

REQUIRED: Any = object()


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object, turning every failure into a `CheckpointError` that names the file."""
    try:
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def parse_json(content: bytes, source: str) -> dict[str, Any]:
    """Likewise for content that has been read from `source`."""
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is not valid JSON: {error}; copy or download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{source} must hold a JSON object, got {type(value).__name__}")
    return value


@dataclasses.dataclass(frozen=True)
class Fields:
    """A table and where it came from. null counts as absent; every error names the source and the field."""

    table: dict[str, Any]
    source: str

    def integer(self, name: str, default: Any = REQUIRED, least: int = 1, most: int = 2**31 - 1) -> Any:
        """An integer from `least` to `most`."""
        value = self._get(name, default)
        if value is not default and (type(value) is not int or not least <= value <= most):
            raise self.wrong(name, f"an integer from {least} to {most}")
        return value

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        """A finite positive number, as a float."""
        value = self._get(name, default)
        if value is default:
            return value
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise self.wrong(name, "a finite positive number")
        return float(value)

    def flag(self, name: str, default: Any = False) -> Any:
        """true or false."""
        value = self._get(name, default)
        if value is not default and type(value) is not bool:
            raise self.wrong(name, "true or false")
        return value

    def token_ids(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """One token id or a list of them, as a tuple; null, where the field is there, means none."""
        if name in self.table and self.table[name] is None:
            return ()
        value = self._get(name, default)
        ids = tuple(value) if isinstance(value, list | tuple) else (value,)
        if any(type(i) is not int for i in ids):
            raise self.wrong(name, "a token id, a list of token ids or null")
        return ids

    def wrong(self, name: str, allowed: str) -> CheckpointError:
        """The error for a field whose value is not allowed."""
        return CheckpointError(f"{self.source}: {name} must be {allowed}, got {self.table.get(name)!r}")

    def _get(self, name: str, default: Any) -> Any:
        value = self.table.get(name)
        if value is None:
            if default is REQUIRED:
                raise CheckpointError(
                    f"{self.source}: the field {name} is missing; add it as the model's authors set it"
                )
            return default
        return value
