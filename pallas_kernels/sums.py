"""Sums that thread blocks of a Mosaic GPU kernel add to in global memory, in whatever order they come.

The copies that add are TMA reductions, which interpret mode does not know: there each block writes a part of its own,
and the parts are summed afterwards. Everything but the addition itself is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import interpreted


def with_sum(run: Callable[..., Any], shape: tuple[int, ...], parts: int) -> Callable[..., tuple[Any, jax.Array]]:
    """(operands) -> (what `run` gives, the sum float32[shape]), for a kernel whose last operand is what `add` adds to.

    What is added to is an array of zeros made anew in every call, and changed in place: the kernel's operand and one of
    its results share their memory, which XLA knows and copies for, should anybody else read the zeros. Needs jax 0.11:
    earlier ones lose track of which operand is written to where a function brings its own rule for batching.

    run: of `hopper.kernel`. parts: how many blocks at most add to the same place.
    """
    whole = (parts, *shape) if interpreted() else shape

    def call(*operands: Any) -> tuple[Any, jax.Array]:
        total = jax.new_ref(jnp.zeros(whole, jnp.float32))
        out = run(*operands, total)
        found = jax.freeze(total)
        return out, jnp.sum(found, axis=0) if interpreted() else found

    return call


def add(staged: Any, to: Any, part: jax.Array, where: tuple[Any, ...]) -> None:
    """to[where] += staged float32, from shared memory, asynchronously: one block's share of the sum.

    Like any copy from shared memory it needs `commit_smem` before and `wait_smem_to_gmem` after it.

    part: tells apart the blocks that add to the same place. None may add to the same place twice.
    """
    if interpreted():
        plgpu.copy_smem_to_gmem(staged, to.at[(part, *where)])
    else:
        plgpu.copy_smem_to_gmem(staged, to.at[where], reduction_op="add")
