"""The list of caches to compare, from TOML: one `[[cache]]` table per method, whose lists are swept."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvjax.cache.config import CacheConfig
from kvjax.config import read_toml
from kvjax.errors import ConfigError
from kvjax.evaluate.random_eviction import RandomEviction

METHODS: tuple[type, ...] = (RandomEviction,)
"""Methods that exist for comparison only."""

METHOD_KEYS = ("policy", "codec", "select")


@dataclasses.dataclass(frozen=True)
class Row:
    """One cache to evaluate.

    Attributes:
      label: of the method: rows with one label make one curve.
      point: the swept values, such as "64" or "32+32"; "" where nothing is swept.
      cache: the cache.
    """

    label: str
    point: str
    cache: CacheConfig

    @property
    def name(self) -> str:
        """What people read."""
        return f"{self.label} {self.point}".strip()


def rows_of(path: str | Path, methods: Iterable[type] = ()) -> tuple[Row, ...]:
    """Reads the `[[cache]]` tables of a file.

    A table holds what `CacheConfig.from_dict` takes and a `label` (else the policy's name, and the codec's and the
    select's if they are given). Lists among the arguments of policy, codec and select are swept together: the first
    row takes the first of each, and so on; a list of one entry is for all rows. So an argument that is itself a list
    stands in one more pair of brackets. `[defaults]` holds keys for all tables.

    Args:
      methods: classes of one's own that names may mean.

    Raises:
      ConfigError: unknown names or keys, lists of different lengths, two rows with one name.
    """
    document = read_toml(path)
    unknown = [key for key in document if key not in ("cache", "defaults")]
    if unknown:
        raise ConfigError(f"{path}: unknown key {unknown[0]!r}; allowed: cache, defaults")
    tables, defaults = document.get("cache"), document.get("defaults", {})
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{path} has no [[cache]] table; add one per method (see configs/evaluate.toml)")
    found: list[Row] = []
    for number, table in enumerate(tables):
        found += _swept({**defaults, **table}, table, f"{path}: cache[{number}]", (*METHODS, *methods))
    names = [row.name for row in found]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"{path}: two rows are called {twice[0]!r}; give each table a `label` of its own")
    return tuple(found)


def _swept(table: dict[str, Any], own: dict[str, Any], source: str, methods: tuple[type, ...]) -> list[Row]:
    """The rows of one table; `own` is the table without defaults, which labels it."""
    label = table.get("label") or _label(own)
    rest = {key: value for key, value in table.items() if key != "label"}
    lists = _lists(rest)
    lengths = {len(values) for values in lists}
    if 0 in lengths or len(lengths - {1}) > 1:
        raise ConfigError(f"{source}: swept lists must be of one length (or of one entry) and not empty, got {lists}")
    rows = []
    for index in range(max(lengths, default=1)):
        cache = CacheConfig.from_dict(_taken(rest, index), source, methods)
        point = "+".join(str(values[index]) for values in lists if len(values) > 1)
        rows.append(Row(label, point, cache))
    return rows


def _lists(table: dict[str, Any]) -> list[list[Any]]:
    """The swept arguments, in order."""
    tables = [table[what] for what in METHOD_KEYS if isinstance(table.get(what), dict)]
    return [value for arguments in tables for value in arguments.values() if isinstance(value, list)]


def _taken(table: dict[str, Any], index: int) -> dict[str, Any]:
    """The table with entry `index` of every swept list."""

    def entry(value: Any) -> Any:
        return value[min(index, len(value) - 1)] if isinstance(value, list) else value

    methods = {what: table[what] for what in METHOD_KEYS if isinstance(table.get(what), dict)}
    return {
        **table,
        **{what: {key: entry(value) for key, value in arguments.items()} for what, arguments in methods.items()},
    }


def _label(table: dict[str, Any]) -> str:
    """The names a table gives."""
    given = [table.get(what) for what in METHOD_KEYS]
    names = [value.get("name", "") if isinstance(value, dict) else str(value) for value in given if value is not None]
    return " ".join(names) or "Full"
