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

    def nullable_number(self, name: str, absent: Any) -> Any:
        """Likewise, but a null that is there means None, and only an absent field `absent`."""
        return self.number(name, None if name in self.table else absent)

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of finite positive numbers, as floats."""
        values = self._get(name, REQUIRED)
        if not isinstance(values, list) or any(
            type(value) not in (int, float) or not 0 < value <= sys.float_info.max for value in values
        ):
            raise self.wrong(name, "a list of finite positive numbers")
        return tuple(float(value) for value in values)

    def integers(self, name: str, least: int = 1) -> tuple[int, ...]:
        """A list of integers, each at least `least`; none where the field is absent."""
        values = self._get(name, [])
        if not isinstance(values, list) or any(type(value) is not int or value < least for value in values):
            raise self.wrong(name, f"a list of integers of at least {least}")
        return tuple(values)

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

    def same(self, *names: str, least: int = 1) -> int:
        """An integer that goes by several names, of which those that are there must agree."""
        given = [name for name in names if self.table.get(name) is not None] or [names[0]]
        values = [self.integer(name, least=least) for name in given]
        if len(set(values)) > 1:
            raise CheckpointError(
                f"{self.source}: {' and '.join(given)} are names of one number, but differ: {values}; remove one"
            )
        return int(values[0])

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
