"""Tuning tables: which configuration of a kernel a device measured fastest, per operation.

`<operation>/tuning/<device>.json` holds entries made by `scripts/tune_kernels.py`. What it has no entry for, the
kernel's own heuristic decides.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

from pallas_kernels.device import device_kind


@dataclasses.dataclass(frozen=True)
class Key:
    """What an entry is for.

    Attributes:
      kernel: which of the operation's kernels, such as "forward" or "decode"; or "backend", which one serves the call.
      dtype: of what is read from memory, such as "bfloat16" or "int8".
      width: channels of a key.
      group: query heads per KV head; 0 where it decides nothing.
      page: slots per page; 0 where there are no pages.
      length: tokens of a sequence, rounded up to a power of two (`bucket`).
      batch: sequences, rounded up to a power of two; 0 where it decides nothing.
    """

    kernel: str
    dtype: str
    width: int
    group: int
    page: int
    length: int
    batch: int


def bucket(number: int, least: int = 1) -> int:
    """The power of two that stands for a length or a batch: the next one up, and at least `least`."""
    return 1 << (max(number, least) - 1).bit_length()


def device_name(kind: str) -> str:
    """A device's short name, for files: "NVIDIA H100 80GB HBM3" -> "h100"."""
    models = re.findall(r"\b[A-Z]{1,3}\d{2,4}\w*\b", kind.removeprefix("NVIDIA"))
    return (models[0] if models else re.sub(r"\W+", "_", kind).strip("_")).lower()


@functools.cache
def table(operation: str, device: str) -> Mapping[Key, Mapping[str, Any]]:
    """The entries of an operation's table for a device, by its short name; empty where there is none."""
    file = resources.files("pallas_kernels") / operation / "tuning" / f"{device}.json"
    if not file.is_file():
        return {}
    entries = json.loads(file.read_text())["entries"]
    return {Key(**entry["key"]): entry for entry in entries}


_forced: contextvars.ContextVar[Mapping[tuple[str, str], Mapping[str, Any]]] = contextvars.ContextVar("forced")


@contextlib.contextmanager
def forced(operation: str, kernel: str, config: Mapping[str, Any]) -> Iterator[None]:
    """Within it, `tuned` answers `config` for this kernel: how candidates are compiled and timed."""
    token = _forced.set({**_forced.get({}), (operation, kernel): config})
    try:
        yield
    finally:
        _forced.reset(token)


def tuned(operation: str, key: Key) -> dict[str, Any] | None:
    """The configuration measured fastest on the default device, as keyword arguments; None: use the heuristic.

    Where there is no entry for this length, that for the nearest one serves.
    """
    chosen = _forced.get({}).get((operation, key.kernel))
    if chosen is not None:
        return dict(chosen)
    entries = table(operation, device_name(device_kind()))
    alike = [other for other in entries if dataclasses.replace(other, length=key.length) == key]
    if not alike:
        return None
    nearest = min(alike, key=lambda other: abs(other.length.bit_length() - key.length.bit_length()))
    return dict(entries[nearest]["config"])
