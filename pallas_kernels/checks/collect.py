"""Finds every operation's cases."""

from __future__ import annotations

import collections
import importlib
import importlib.util
import pkgutil
from collections.abc import Sequence

import pallas_kernels
from pallas_kernels.checks.case import Case

MODULES = ("cases", "triton_cases", "tpu_cases")
OPTIONAL = ("jax_triton", "triton")


def operations() -> list[str]:
    """The packages of pallas_kernels that hold an operation."""
    found = (module.name for module in pkgutil.iter_modules(pallas_kernels.__path__) if module.ispkg)
    return sorted(name for name in found if name != "checks")


def collect() -> tuple[list[Case], dict[str, str]]:
    """All cases, targets first, and the modules whose cases cannot be had, with the reason.

    A module that is not there is nothing to report; one that lacks a package is, and so is one that is broken.

    Raises:
      ValueError: two cases share a name.
    """
    from pallas_kernels.checks.targets import targets

    cases = [target.case for target in targets()]
    absent: dict[str, str] = {}
    for operation in operations():
        for name in MODULES:
            module = f"pallas_kernels.{operation}.{name}"
            if importlib.util.find_spec(module) is None:
                continue
            try:
                cases += importlib.import_module(module).cases()
            except ModuleNotFoundError as error:
                absent[module] = f"{error.name} is not installed" if error.name in OPTIONAL else f"broken: {error}"
            except Exception as error:
                absent[module] = f"broken: {type(error).__name__}: {error}"
    twice = [name for name, count in collections.Counter(case.name for case in cases).items() if count > 1]
    if twice:
        raise ValueError(f"names of cases must be unique, these are not: {', '.join(twice)}")
    return cases, absent


def every_case() -> list[Case]:
    """Those of `collect`."""
    return collect()[0]


def select(cases: Sequence[Case], only: str) -> list[Case]:
    """Those whose operation, backend and name together hold every word of `only`."""
    words = only.lower().split()
    return [case for case in cases if all(w in f"{case.operation} {case.backend} {case.name}".lower() for w in words)]
