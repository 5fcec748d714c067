"""Who sees what in a block of slots, and how unused slots are silenced.

A zero probability times a NaN is NaN, and an unused slot may hold anything. So before a product reads values, the rows
of slots that hold no token are zeroed; only blocks at the end of a row, or with holes, have any.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.paged_attention.mosaic_pages import Work
from pallas_kernels.paged_attention.mosaic_plan import BLOCK

AWAY = 2**30
"""Added to the position of a slot in no page: later than any query."""


@dataclasses.dataclass(frozen=True)
class Block:
    """One block of slots, as a warpgroup looks at it.

    Attributes:
      begin: its first slot.
      limit, numbers: slots of the row in use, and the block's pages, -1 for none; unused where `positions` are told.
      positions: int32[BLOCK] in shared memory, -1 for holes; None: slots stand in order.
      page: slots of a page.
      partly: whether some slots hold no token, bool[].
    """

    begin: jax.Array
    limit: jax.Array
    numbers: tuple[jax.Array, ...]
    positions: Any
    page: int
    partly: jax.Array

    def where(self, layout: Any) -> jax.Array:
        """The position of every slot, int32[BLOCK], past every query's where it lies in no page."""
        if self.positions is not None:
            return hopper.load(self.positions, layout)
        local = plgpu.layout_cast(lax.iota(jnp.int32, BLOCK), layout)
        slots = local + self.begin
        away = [jnp.where(number < 0, AWAY, 0) for number in self.numbers]
        if len(away) == 1:
            return slots + away[0]
        for j, far in enumerate(away):
            inside = (local >= j * self.page) & (local < (j + 1) * self.page)
            slots = slots + jnp.where(inside, far, 0)
        return slots

    def held(self, layout: Any) -> jax.Array:
        """Which slots hold a token, bool[BLOCK]."""
        where = self.where(layout)
        return where >= 0 if self.positions is not None else where < self.limit


def block_at(
    given: Mapping[str, Any], smem: Mapping[str, Any], todo: Work, number: jax.Array, stage: jax.Array
) -> Block:
    """Block `number` of a row; its positions, where told, have arrived in `stage`."""
    if "positions" in smem:
        plgpu.barrier_wait(smem["positions_full"].at[stage])
        holes = given["holes"][todo.batch, todo.row.row, number] != 0
        return Block(number * BLOCK, todo.limit, (), smem["positions"].at[stage], todo.row.page, holes)
    begin, numbers = number * BLOCK, todo.row.numbers(number)
    partly = begin + BLOCK > todo.limit
    for page in numbers:
        partly = partly | (page < 0)
    return Block(begin, todo.limit, numbers, None, todo.row.page, partly)


def visible(block: Block, lower: jax.Array | None, upper: jax.Array) -> jax.Array:
    """bool[rows, BLOCK]: lower <= position < upper, each int32[rows] in `hopper.ROWS`; lower None: 0, and in order."""
    shape = (upper.shape[0], BLOCK)
    where = hopper.columns_over(block.where(hopper.COLUMNS), shape)
    mask = where < hopper.rows_over(upper, shape)
    return mask if lower is None else mask & (where >= hopper.rows_over(lower, shape))


def seen_by(block: Block, lower: jax.Array | None, upper: jax.Array) -> jax.Array:
    """The same turned, bool[BLOCK, rows], of lower and upper in `hopper.COLUMNS`."""
    shape = (BLOCK, upper.shape[0])
    where = hopper.rows_over(block.where(hopper.ROWS), shape)
    mask = where < hopper.columns_over(upper, shape)
    return mask if lower is None else mask & (where >= hopper.columns_over(lower, shape))


def silence(values: Any, block: Block, begin: Any, columns: int) -> None:
    """Zeroes the rows of unused slots in values [BLOCK, *] in shared memory, columns begin .. begin + columns.

    The caller makes the writes known to other warpgroups and to the tensor cores (`plgpu.commit_smem`).
    """
    held = block.held(hopper.ROWS)
    for column in range(0, columns, 64):
        part = values.at[:, pl.ds(begin + column, min(columns - column, 64))]
        tile = hopper.load(part, plgpu.Layout.WGMMA)
        part[...] = jnp.where(hopper.rows_over(held, tile.shape), tile, jnp.zeros_like(tile))
