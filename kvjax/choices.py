"""Policies and codecs by name, for command lines and TOML: `full`, `sliding_window:1024`, `h2o:heavy=64,recent=64`."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

from kvjax.cache import codecs, policies
from kvjax.cache.codecs import Codec
from kvjax.cache.policies import Policy
from kvjax.errors import ConfigError


def parse_policy(text: str) -> Policy:
    """A policy by name, its arguments behind a colon, with or without their names.

    Raises:
      ConfigError: an unknown name, or arguments the policy does not take.
    """
    found: Policy = _parse(text, policies, "capacity")
    return found


def parse_codec(text: str) -> Codec:
    """A codec by name, its arguments behind a colon, with or without their names.

    Raises:
      ConfigError: an unknown name, or arguments the codec does not take.
    """
    found: Codec = _parse(text, codecs, "bytes_per_vector")
    return found


def _parse(text: str, module: ModuleType, method: str) -> Any:
    """An instance of the frozen dataclass of `module` that `text` names, in any case, with or without underscores."""
    kinds: dict[str, Any] = {
        name.lower(): kind
        for name, kind in vars(module).items()
        if dataclasses.is_dataclass(kind) and hasattr(kind, method)
    }
    name, _, arguments = text.partition(":")
    kind = kinds.get(name.replace("_", "").replace("-", "").lower())
    if kind is None:
        raise ConfigError(f"{name!r} is unknown; allowed: {', '.join(sorted(kinds))}")
    values: list[Any] = []
    named: dict[str, Any] = {}
    for argument in filter(None, arguments.split(",")):
        key, _, value = argument.rpartition("=")
        if key:
            named[key] = _value(value)
        else:
            values.append(_value(value))
    try:
        return kind(*values, **named)
    except TypeError as error:
        fields = ", ".join(field.name for field in dataclasses.fields(kind) if field.init)
        raise ConfigError(f"{text!r} does not give {kind.__name__} what it takes ({fields or 'nothing'})") from error


def _value(text: str) -> int | float | str:
    """A number if it reads as one."""
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
