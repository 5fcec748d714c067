"""Triton kernels run on the CPU by Triton's own interpreter, each program in turn with NumPy: numbers without a GPU.

Triton decides when a kernel is defined, so TRITON_INTERPRET=1 must be in the environment before anything imports it.
This checks arithmetic, masks and addresses, not races or layouts. bfloat16 products are not known to it: use float16.

`TRITON_INTERPRET=1 python -m pallas_kernels.checks.triton_interpreter WORDS` interprets the small Triton cases whose
names hold every word, and answers each with a line of JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from pallas_kernels import triton_call
from pallas_kernels.checks.case import Case
from pallas_kernels.checks.numerics import Difference, compare

MODULES = ("attention", "paged_attention", "shared_prefix")
TRITON_NAMES = {
    "float16": "fp16",
    "float32": "fp32",
    "float8_e4m3fn": "fp8e4nv",
    "float8_e5m2": "fp8e5",
    "int8": "i8",
    "int32": "i32",
    "uint8": "u8",
}


def missing() -> str | None:
    """Why nothing can be interpreted here, or None."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "TRITON_INTERPRET=1 must be set before triton is imported"
    return triton_call.absent()


class _Array:
    """An array as the interpreter asks for it: its address, and what lies there."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.dtype = TRITON_NAMES[array.dtype.name]

    def data_ptr(self) -> int:
        """The address of the first element."""
        return int(self.array.ctypes.data)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Within it, kernels traced now are interpreted when they run.

    Raises:
      RuntimeError: for one of the reasons of `missing`.
    """
    if (reason := missing()) is not None:
        raise RuntimeError(reason)
    launch = triton_call.launch
    triton_call.launch = _launch
    try:
        yield
    finally:
        triton_call.launch = launch


def _launch(
    kernel: Any,
    arguments: Sequence[jax.Array],
    out_shape: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, int, int],
    *,
    warps: int,
    stages: int,
    **constants: Any,
) -> list[jax.Array]:
    """`triton_call.launch`, by a call back to the host."""
    run = functools.partial(_run, kernel, tuple(out_shape), grid, constants)
    return list(jax.pure_callback(run, tuple(out_shape), *arguments))


@contextlib.contextmanager
def _scalars_are_indices(interpreter: Any) -> Iterator[None]:
    """The bounds of a loop are arrays of one element to the interpreter, which NumPy no longer takes for a number."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
    try:
        yield
    finally:
        interpreter._patch_lang_tensor = patch


def _run(
    kernel: Any,
    out_shape: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, int, int],
    constants: dict[str, Any],
    *arguments: Any,
) -> tuple[np.ndarray, ...]:
    from triton.runtime import interpreter

    class Executor(interpreter.GridExecutor):
        """Arrays are on the host already."""

        def _init_args_hst(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
            return args, kwargs

        def _restore_args_dev(self, *_: Any) -> None:
            pass

    inputs = [np.ascontiguousarray(argument) for argument in arguments]
    # What a kernel fails to write must not look like a result; a NaN does not.
    outputs = [np.full(shape.shape, np.nan, shape.dtype) for shape in out_shape]
    with np.errstate(all="ignore"), _scalars_are_indices(interpreter):
        executor = Executor(kernel.rewrite(), kernel.arg_names, grid)
        executor(*map(_Array, inputs), *map(_Array, outputs), **constants)
    return tuple(outputs)


def small_cases() -> list[Case]:
    """The Triton cases that are meant to be interpreted."""
    modules = (importlib.import_module(f"pallas_kernels.{name}.triton_cases") for name in MODULES)
    return [case for module in modules for case in module.cases() if case.size == "small"]


def run(case: Case, seed: int = 0) -> list[Difference]:
    """Interprets a small case and compares it with its reference."""
    arguments = case.inputs(seed)
    with interpreted():
        out = jax.tree.map(np.asarray, jax.jit(case.call)(*arguments))
    return compare(out, jax.tree.map(np.asarray, jax.jit(case.reference)(*arguments)), case.tolerance)


def main(words: Sequence[str]) -> None:
    """What the module does as a command."""
    for case in small_cases():
        if all(word in case.name for word in words):
            found = [dataclasses.asdict(difference) | {"passed": difference.passed} for difference in run(case)]
            print(json.dumps({"case": case.name, "differences": found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
