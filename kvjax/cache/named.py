"""Policies, codecs and selects by name: in tables (`{ name = "h2o", heavy = 64 }`) and in texts (`h2o:heavy=64`)."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from kvjax.errors import ConfigError

# What is chosen -> the module that holds its classes, and a method that tells them from what else lies there.
_PLACES = {
    "policy": ("kvjax.cache.policies", "capacity"),
    "codec": ("kvjax.cache.codecs", "bytes_per_vector"),
    "select": ("kvjax.cache.selects", None),
}


def method_named(what: str, given: Any, source: str, more: Iterable[type] = ()) -> Any:
    """An instance of the class that `given` names.

    Names are read in any case, with or without underscores and hyphens.

    Args:
      what: "policy", "codec" or "select".
      given: a name, with arguments behind a colon or without; or a table of `name` and arguments, of which lists become
        tuples; anything else is returned as it is.
      source: begins every error.
      more: classes beside kvjax's own; one with the same name goes first.

    Raises:
      ConfigError: an unknown name, or arguments that the class does not take or lacks.
    """
    if isinstance(given, str):
        name, arguments, named = _from_text(given)
    elif isinstance(given, dict):
        if not isinstance(given.get("name"), str):
            raise ConfigError(f'{source}: a table needs the name of a {what}, such as name = "...", got {given!r}')
        name, arguments = given["name"], []
        named = {key: _frozen(value) for key, value in given.items() if key != "name"}
    else:
        return given
    kind = _kind(what, name, source, more)
    allowed = list(inspect.signature(kind).parameters)
    unknown = [key for key in named if key not in allowed]
    if unknown:
        listed = ", ".join(allowed) or "no arguments"
        raise ConfigError(f"{source}: {kind.__name__} takes no {unknown[0]!r}; it takes {listed}")
    try:
        return kind(*arguments, **named)
    except TypeError as error:
        listed = ", ".join(allowed) or "nothing"
        raise ConfigError(f"{source}: {given!r} does not give {kind.__name__} what it takes ({listed})") from error


def method_table(method: Any, keep: Callable[[Any], Any] | None = None) -> dict[str, Any]:
    """The table from which `method_named` makes an equal method: its class's name, and the arguments it takes.

    Args:
      keep: makes something plain of an argument that is not; None: such a one is refused.

    Raises:
      ConfigError: an argument is no attribute of the same name, or not plain.
    """
    kind = type(method)
    table: dict[str, Any] = {"name": kind.__name__}
    for name, parameter in inspect.signature(kind).parameters.items():
        if name == "name" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ConfigError(f"{kind.__name__}: an argument {str(parameter)!r} cannot be written into a table")
        if not hasattr(method, name):
            raise ConfigError(f"{kind.__name__}: its argument {name!r} is no attribute of that name; make it one")
        try:
            table[name] = _plain(getattr(method, name), keep)
        except ConfigError as error:
            raise ConfigError(f"{kind.__name__}.{name} cannot be written into a table: {error}") from error
    return table


def is_ours(what: str, method: Any) -> bool:
    """Whether a method is of a class that `method_named` finds without being given it."""
    module = importlib.import_module(_PLACES[what][0])
    return getattr(module, type(method).__name__, None) is type(method)


def _plain(value: Any, keep: Callable[[Any], Any] | None) -> Any:
    """A value as JSON and TOML hold it; a tuple becomes a list."""
    if isinstance(value, tuple | list):
        return [_plain(one, keep) for one in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if keep is None:
        raise ConfigError(f"{value!r:.80} is neither a number nor a text nor a tuple of them")
    return keep(value)


def _kind(what: str, name: str, source: str, more: Iterable[type]) -> type:
    place, mark = _PLACES[what]
    try:
        module = importlib.import_module(place)
        known = [kind for kind in vars(module).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    except ModuleNotFoundError:
        known = []
    kinds = {_key(kind.__name__): kind for kind in (*known, *more) if mark is None or hasattr(kind, mark)}
    if _key(name) not in kinds:
        listed = ", ".join(sorted(kind.__name__ for kind in kinds.values())) or "none yet"
        raise ConfigError(f"{source}: {name!r} is unknown; allowed: {listed}")
    return kinds[_key(name)]


def _key(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _frozen(value: Any) -> Any:
    """Lists as tuples, since whatever is compiled in must be hashable."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _from_text(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """`name:1,key=2` -> the name, arguments without names, arguments with names."""
    name, _, rest = text.partition(":")
    arguments: list[Any] = []
    named: dict[str, Any] = {}
    for argument in filter(None, rest.split(",")):
        key, _, value = argument.rpartition("=")
        if key:
            named[key] = _number(value)
        else:
            arguments.append(_number(value))
    return name, arguments, named


def _number(text: str) -> int | float | str:
    """A number if it reads as one."""
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
