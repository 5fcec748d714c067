"""The second gate: lowering for an H100, or a TPU, that need not be there.

Finds wrong layouts, dtypes and too much memory; for TPUs, whose compiler looks at that, wrong blocks and operations.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.checks.case import Case

H100 = "NVIDIA H100 80GB HBM3"


def abstract_h100() -> AbstractMesh:
    """A mesh of one H100, as far as tracing and lowering are concerned."""
    return AbstractMesh((1,), ("gpu",), abstract_device=AbstractDevice(H100, num_cores=None, platform="gpu"))


def shapes(case: Case) -> tuple[Any, ...]:
    """The case's arguments as `jax.ShapeDtypeStruct`s; nothing is allocated."""
    made: tuple[Any, ...] = jax.eval_shape(lambda: case.inputs(0))
    return made


def lower(case: Case) -> jax.stages.Lowered:
    """The case's call, lowered for its kind of device. Raises whatever the kernel's lowering raises."""
    if case.backend == "tpu":
        return jax.jit(case.call).trace(*shapes(case)).lower(lowering_platforms=("tpu",))
    with use_abstract_mesh(abstract_h100()):
        return jax.jit(case.call).trace(*shapes(case)).lower(lowering_platforms=("cuda",))
