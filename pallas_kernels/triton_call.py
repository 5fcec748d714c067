"""Launching a Triton kernel from JAX through jax-triton, on the device here or lowered for another.

Neither package need be installed: nothing is imported before a kernel is launched.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import get_abstract_mesh

from pallas_kernels import device

LEAST = "8.0"
"""The first compute capability that Triton's products and asynchronous copies are made for."""
DTYPES = ("bfloat16", "float16")
SHARED_MEMORY = {80: 166912, 87: 166912, 90: 232448, 100: 232448, 103: 232448}
"""Bytes a program may have, by compute capability times ten; the others have 101376."""
CAPABILITIES = {"A100": 80, "A30": 80, "A40": 86, "A10": 86, "L40": 89, "L4": 89, "H100": 90, "H200": 90, "H800": 90}
"""Of devices that are only described, in an abstract mesh."""


def absent() -> str | None:
    """Why no Triton kernel can be made at all, or None."""
    lacking = [name for name in ("jax_triton", "triton") if not _installed(name)]
    if lacking:
        return f"{' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} not installed"
    return _import_error()


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@functools.cache
def _import_error() -> str | None:
    """jax-triton refuses to be imported where jax has no plugin for a GPU, even to lower for one that is elsewhere."""
    try:
        importlib.import_module("jax_triton")
    except ImportError as error:
        return f"jax_triton cannot be imported: {str(error).splitlines()[0]}"
    return None


def target() -> int:
    """The compute capability to compile for, times ten: that of the abstract mesh, else of the device, else 90."""
    described = getattr(get_abstract_mesh(), "abstract_device", None)
    if described is not None:
        return next((value for name, value in CAPABILITIES.items() if name in described.device_kind), 90)
    here = device.compute_capability()
    return 90 if here is None else int(here.replace(".", ""))


def shared_memory() -> int:
    """Bytes of shared memory that a program may have on what is compiled for."""
    return SHARED_MEMORY.get(target(), 101376)


def launch(
    kernel: Any,
    arguments: Sequence[jax.Array],
    out_shape: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, int, int],
    *,
    warps: int,
    stages: int,
    **constants: Any,
) -> list[jax.Array]:
    """Runs `kernel`, whose parameters are the arguments, then the outputs, then its compile-time constants.

    Args:
      grid: programs along each axis; the first may be as large as 2^31 - 1, the others 65535.
      warps, stages: of a program, and of the pipeline that the compiler makes of its loop.
    """
    import jax_triton

    return list(
        jax_triton.triton_call(
            *arguments,
            kernel=kernel,
            out_shape=tuple(out_shape),
            grid=grid,
            num_warps=warps,
            num_stages=stages,
            compute_capability=target(),
            **constants,
        )
    )


def two_parts(width: int) -> tuple[int, int]:
    """`width` as MAIN + REST for a kernel's tiles: powers of two of at least 16, REST perhaps padded or 0."""
    main = 1 << (width.bit_length() - 1)
    return main, 0 if main == width else power_of_two(width - main)


def power_of_two(number: int) -> int:
    """The least power of two that is not below `number`, nor below 16, the smallest side of a product."""
    return max(16, 1 << (number - 1).bit_length())
