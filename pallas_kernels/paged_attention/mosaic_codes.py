"""Codes that share bytes, made into numbers that a product takes, on Hopper: code * scale + minimum.

Byte i of a vector of W bytes holds the channels i, i + W, ... from its low bits up, so a mask takes out a run of
channels, and what it leaves shifted is made up for by the scale: 8-bit integers cannot be shifted in registers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.paged_attention.mosaic_mask import Block
from pallas_kernels.paged_attention.mosaic_plan import BLOCK, CODES_AT_ONCE, Plan

LAYOUT = plgpu.Layout.WGMMA_UPCAST_2X
"""How codes lie in registers: in fours, as they are read."""
ROWS, COLUMNS = LAYOUT.reduce(1), LAYOUT.reduce(0)


def unpack(plan: Plan, name: str, smem: dict[str, Any], stage: jax.Array, kept: Any, block: Block | None = None) -> Any:
    """Fills `kept` [BLOCK, width] in shared memory from what of "k" or "v" is in `stage`; with a block, 0 where unused.

    The caller makes the writes known to the tensor cores (`plgpu.commit_smem`).
    """
    codes = smem[name].at[stage]
    stored = codes.shape[-1]
    bits = 8 // plan.packed
    held = None if block is None else block.held(ROWS)
    step, low = (_Scales(plan, name, smem[f"{name}_{part}"].at[stage], held) for part in ("step", "low"))
    for begin in range(0, stored, CODES_AT_ONCE):
        tile = hopper.load(codes.at[:, pl.ds(begin, CODES_AT_ONCE)], LAYOUT)
        for run in range(plan.packed):
            channel = run * stored + begin
            numbers = (tile & jnp.uint8((2**bits - 1) << (run * bits))).astype(jnp.float32)
            numbers = numbers * step.over(channel, tile.shape, 0.5 ** (run * bits)) + low.over(channel, tile.shape, 1.0)
            kept[:, pl.ds(channel, CODES_AT_ONCE)] = numbers.astype(kept.dtype)


class _Scales:
    """A block's scales or minima in shared memory; those of slots that `held` leaves out count as 0."""

    def __init__(self, plan: Plan, name: str, ref: Any, held: jax.Array | None) -> None:
        self.plan, self.ref, self.held = plan, ref, held
        self.groups = plan.groups(name)
        self.width = plan.width if name == "k" else plan.value_width
        self.known: dict[int, jax.Array] = {}

    def over(self, channel: int, shape: tuple[int, ...], factor: float) -> jax.Array:
        """`factor` times those of CODES_AT_ONCE channels from `channel` on, for every slot of the block."""
        if self.groups == 0:
            return self._of_channels(channel, shape, factor)
        group = channel * self.groups // self.width
        if group not in self.known:
            found = hopper.strided(self.ref, self.groups, group, ROWS).astype(jnp.float32)
            self.known[group] = found if self.held is None else jnp.where(self.held, found, 0.0)
        return hopper.rows_over(self.known[group] * factor, shape)

    def _of_channels(self, channel: int, shape: tuple[int, ...], factor: float) -> jax.Array:
        pages = self.plan.per_block
        of_page = [
            hopper.columns_over(
                hopper.load(self.ref.at[page, pl.ds(channel, shape[1])], COLUMNS, optimized=False).astype(jnp.float32)
                * factor,
                shape,
            )
            for page in range(pages)
        ]
        slot = plgpu.layout_cast(lax.iota(jnp.int32, BLOCK), ROWS)
        found = of_page[-1]
        for page in range(pages - 2, -1, -1):
            found = jnp.where(hopper.rows_over(slot < (page + 1) * (BLOCK // pages), shape), of_page[page], found)
        return found
