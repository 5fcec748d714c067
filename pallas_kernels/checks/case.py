"""One kernel at one shape: what every gate runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from pallas_kernels.checks.numerics import LSE_TOLERANCE


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of one operation through one backend, with what it is compared with.

    Attributes:
      name: unique among cases, such as "decode d128 bf16 page64 group4".
      operation: "attention", "attention gradient", "paged_attention", "paged_weights", "shared_prefix", "append".
      backend: what serves it: "mosaic_gpu", "triton", "cudnn", "tpu".
      size: "small" runs in interpret mode; "full" is lowered, compiled ahead of time and, on a GPU, compared and timed.
      inputs: seed -> the arguments, real arrays; `jax.eval_shape` gives their shapes without making them.
      call: arguments -> outputs (a pytree), through the backend by its name.
      reference: arguments -> the same outputs by plain jnp, from the same inputs in float32.
      tolerance: of norm(out - reference) / norm(reference), for every output but log-sum-exps.
      lse_tolerance: of these, absolute.
      flops: what the call computes; None where a rate would tell nothing. bytes_moved: what it must read and write.
      device: the compute capabilities that can run it, such as ("9.0",); none for TPUs.
      baseline: the same call by `xla` in the inputs' own dtype: no error may exceed twice its; None: not compared.
    """

    name: str
    operation: str
    backend: str
    size: Literal["small", "full"]
    inputs: Callable[[int], tuple[Any, ...]]
    call: Callable[..., Any]
    reference: Callable[..., Any]
    tolerance: float
    flops: float | None = None
    bytes_moved: float | None = None
    device: tuple[str, ...] = ("9.0",)
    baseline: Callable[..., Any] | None = None
    lse_tolerance: float = LSE_TOLERANCE
