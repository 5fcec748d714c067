"""The backward pass of attention on Hopper: two kernels that are deterministic, or one (Dao 2023, 2307.08691).

Of the two, one works by tiles of keys and gives dk and dv, the other by tiles of queries and gives dq: seven products
where five would do, but no sum across thread blocks, whose order would change the result from run to run. The fused
kernel takes the five, and that sum.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from pallas_kernels import hopper
from pallas_kernels.attention.mosaic_gpu_dkv import key_value_gradients
from pallas_kernels.attention.mosaic_gpu_dq import query_gradient
from pallas_kernels.attention.mosaic_gpu_fused import all_gradients, splits
from pallas_kernels.attention.mosaic_gpu_key_tile import key_tile
from pallas_kernels.attention.mosaic_gpu_scores import Scores
from pallas_kernels.attention.spans import Spans


@dataclasses.dataclass(frozen=True)
class BackwardConfig:
    """How the backward kernels cut their work.

    Attributes:
      query_block: queries of a step of the kernel for dk and dv. stages: steps it holds in shared memory.
      split: dk and dv of the same keys by one consumer each.
      key_block: keys of a step of the kernel for dq. k_stages, v_stages: steps it holds in shared memory.
      fused: one kernel for all three gradients, which is not deterministic.
      q_stages, dout_stages: steps the fused kernel holds in shared memory. dq_columns: of dq, that wait there at a time
        to be added; they divide the width.
    """

    query_block: int = 64
    stages: int = 2
    split: bool = False
    key_block: int = 64
    k_stages: int = 2
    v_stages: int = 2
    # Two kernels, until a device has measured the fused one to be right and faster (`scripts/tune_kernels.py`): its sum
    # across thread blocks is the one step that nothing without a GPU can run.
    fused: bool = False
    q_stages: int = 2
    dout_stages: int = 2
    dq_columns: int = 64

    def keys(self, width: int, value_width: int, scores: Scores) -> int:
        """Whole tiles of every kernel hold multiples of so many keys."""
        if self.fused:
            return key_tile(splits(width, value_width, scores))
        return math.lcm(key_tile(self.split), self.key_block)


def default_backward_config(width: int, value_width: int) -> BackwardConfig:
    """A choice for key and value widths that nobody has measured."""
    wide = max(width, value_width)
    return BackwardConfig(
        split=wide > 128,
        key_block=128 if wide == 64 else 64,
        v_stages=1 if wide == 256 else 2,
        dout_stages=1 if wide == 256 else 2,
    )


def backward(
    residuals: tuple[jax.Array, ...],
    of: Spans,
    cotangents: tuple[jax.Array, jax.Array],
    scores: Scores,
    config: BackwardConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """From (q, k, v, out, lse float32[B,H,T]) and the cotangents of out and lse -> dq, dk, dv."""
    q, k, v, out, lse = residuals
    dout, dlse = cotangents
    some = jnp.isfinite(lse)
    delta = jnp.swapaxes(jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=3), 1, 2)
    # A log-sum-exp's slope is the probability: what changes it adds to what every score gets.
    delta = jnp.where(some, delta - dlse.astype(jnp.float32), 0.0)
    lse = jnp.where(some, lse * hopper.LOG2_E, jnp.inf)
    call = (q, k, v, dout.astype(q.dtype), lse, delta, of, scores)
    if config.fused:
        return all_gradients(*call, stages=config.q_stages, dout_stages=config.dout_stages, columns=config.dq_columns)
    dk, dv = key_value_gradients(*call, block=config.query_block, stages=config.stages, split=config.split)
    dq = query_gradient(*call, block=config.key_block, k_stages=config.k_stages, v_stages=config.v_stages)
    return dq, dk, dv
