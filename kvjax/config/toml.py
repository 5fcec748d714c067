"""Tables to dataclasses, TOML files to tables."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

from kvjax.errors import ConfigError


def build(kind: type, values: dict[str, Any], source: str) -> Any:
    """Builds dataclass `kind` from a table, naming unknown and missing keys."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(f"{source}: unknown key {unknown[0]!r}; allowed: {', '.join(fields)}")
    required = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in values]
    if missing:
        raise ConfigError(f"{source}: missing key {missing[0]!r}; required: {', '.join(required)}")
    return kind(**values)


def read_toml(path: str | Path) -> dict[str, Any]:
    """Reads a TOML file, turning every failure into a `ConfigError` that names the file."""
    try:
        return tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give the path of a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
