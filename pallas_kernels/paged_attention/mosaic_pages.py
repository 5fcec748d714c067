"""Pages on their way from the pool to shared memory: where a block's pages lie, and the copies that bring them.

One warpgroup copies, the others compute. A block of slots is one page, part of one, or several; its copies arrive at
one barrier. Every index is a coordinate of the copy engine's tensor map, int32 an axis, with strides of 40 bits: a pool
may hold more than 2^31 elements.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.paged_attention.mosaic_plan import BLOCK, CODES_AT_ONCE, Plan

GRID = ("batch", "head", "tile", "split")


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a block table in global memory.

    Attributes:
      table: int32[B, K or 1, N]. sequence, row: which one. layer, head: the place within a page.
      page: slots of a page.
    """

    table: Any
    sequence: jax.Array
    row: Any
    layer: jax.Array
    head: Any
    page: int

    @property
    def per_block(self) -> int:
        """Pages of a block."""
        return max(BLOCK // self.page, 1)

    def numbers(self, block: jax.Array) -> tuple[jax.Array, ...]:
        """The pages of a block, -1 for none; past the table's end its last entry again."""
        last = self.table.shape[2] - 1
        if self.page >= BLOCK:
            first = lax.div(block, jnp.int32(self.page // BLOCK))
        else:
            first = block * self.per_block
        places = (jnp.minimum(first + j, last) for j in range(self.per_block))
        return tuple(self.table[self.sequence, self.row, place] for place in places)

    def pages(self, pool: Any, block: jax.Array, numbers: tuple[jax.Array, ...], rows: int) -> list[Any]:
        """Where a block lies in a pool, page by page, in order, `rows` rows of each."""
        if pool.shape[3] == rows:
            slots: Any = slice(None)
        else:
            slots = pl.ds(lax.rem(block, jnp.int32(self.page // BLOCK)) * rows, rows)
        # Whatever is read for a page that is not there, the mask hides.
        rest = (slice(None),) * (len(pool.shape) - 4)
        return [pool.at[(jnp.maximum(number, 0), self.layer, self.head, slots, *rest)] for number in numbers]


@dataclasses.dataclass(frozen=True)
class Stream:
    """What follows a sequence block by block into shared memory, behind one pair of barriers.

    Attributes:
      pools: pairs of a pool in global memory and its stages in shared memory [stages, rows, ...], BLOCK rows but for
        scales of parts of vectors.
      flat: pairs of an array [S] in global memory, S a multiple of BLOCK, and its stages [stages, BLOCK].
      full: one arrival for each copy of a block. free: one for each consumer of a block.
    """

    pools: tuple[tuple[Any, Any], ...]
    full: Any
    free: Any
    flat: tuple[tuple[Any, Any], ...] = ()

    def load(self, row: Row, block: jax.Array, numbers: tuple[jax.Array, ...], stage: jax.Array) -> None:
        """Starts the copies of a block that lies in the pages `numbers`."""
        for pool, stages in self.pools:
            size = stages.shape[1] // row.per_block
            for j, source in enumerate(row.pages(pool, block, numbers, size)):
                plgpu.copy_gmem_to_smem(source, stages.at[stage, pl.ds(j * size, size)], self.full.at[stage])
        for array, stages in self.flat:
            plgpu.copy_gmem_to_smem(array.at[pl.ds(block * BLOCK, BLOCK)], stages.at[stage], self.full.at[stage])


@dataclasses.dataclass(frozen=True)
class Work:
    """What one thread block does.

    Attributes:
      batch, head, tile, split: its place in the grid.
      row: the row of the block table it reads.
      first, steps: its share of the row's blocks, int32[].
      limit: slots of the row in use, int32[].
    """

    batch: jax.Array
    head: jax.Array
    tile: jax.Array
    split: jax.Array
    row: Row
    first: jax.Array
    steps: jax.Array
    limit: jax.Array


def work(plan: Plan, given: Mapping[str, Any]) -> Work:
    """Of the thread block that asks. A tile's blocks are dealt out evenly over the splits, by its own bounds."""
    batch, head, tile, split = (lax.axis_index(name) for name in GRID)
    row, head_in_page = (0, head) if plan.shared_rows else (head, 0)
    pages = Row(given["table"], batch, row, given["layer"][0], head_in_page, plan.page)
    begin, end = (given["bounds"][side, batch, row, tile] for side in (0, 1))
    share = lax.div(end - begin + plan.splits - 1, jnp.int32(plan.splits))
    first = begin + split * share
    steps = jnp.maximum(jnp.minimum(first + share, end) - first, 0)
    return Work(batch, head, tile, split, pages, first, steps, given["limit"][batch, row])


def staging(plan: Plan, names: Collection[str], widths: Mapping[str, int], stored: Any) -> dict[str, Any]:
    """Shared memory and barriers for what of "k", "v", their scales and "positions" is among `names`."""
    sharers = 1 if plan.share == "blocks" else plan.consumers
    scratch: dict[str, Any] = {}
    arrivals = {}
    for name, width in widths.items():
        arrivals[name] = plan.per_block
        if plan.packed > 1:
            scratch[name] = _tiles((plan.stages, BLOCK, width // plan.packed), stored, CODES_AT_ONCE)
            rows, columns = plan.scales_of_page(name)
            for part in ("step", "low"):
                scratch[f"{name}_{part}"] = plgpu.SMEM((plan.stages, plan.per_block * rows, columns), jnp.float16)
            arrivals[name] *= 3
        else:
            scratch[name] = _tiles((plan.stages, BLOCK, width), stored, code_columns(width))
        if f"{name}_scale" in names:
            scratch[f"{name}_scale"] = plgpu.SMEM((plan.stages, BLOCK), jnp.float32)
            arrivals[name] *= 2
    if "positions" in names:
        scratch["positions"] = plgpu.SMEM((plan.stages, BLOCK), jnp.int32)
        arrivals["positions"] = 1
    for name, count in arrivals.items():
        scratch[f"{name}_full"] = plgpu.Barrier(num_arrivals=count, num_barriers=plan.stages)
        scratch[f"{name}_free"] = plgpu.Barrier(num_arrivals=sharers, num_barriers=plan.stages)
    return scratch


def code_columns(width: int) -> int:
    """Columns of codes of this width converted at a time: a tile of them. More take registers that sums need."""
    return 128 if width == 128 else 64


def _tiles(shape: tuple[int, ...], stored: Any, columns: int) -> Any:
    if jnp.dtype(stored).itemsize > 1:
        return hopper.tiles(shape, stored)
    return plgpu.SMEM(shape, stored, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(columns)))


def streams(given: Mapping[str, Any], scratch: Mapping[str, Any], todo: Work) -> tuple[Stream, ...]:
    """What `staging` has room for, in the order in which consumers wait for it."""
    found = []
    if "positions" in scratch:
        flat = (given["positions"].at[todo.batch, todo.row.row], scratch["positions"])
        found.append(Stream((), scratch["positions_full"], scratch["positions_free"], (flat,)))
    for name in ("k", "v"):
        if name in scratch:
            parts = (name, f"{name}_scale", f"{name}_step", f"{name}_low")
            pools = [(given[part], scratch[part]) for part in parts if part in scratch]
            found.append(Stream(tuple(pools), scratch[f"{name}_full"], scratch[f"{name}_free"]))
    return tuple(found)


def produce(streams: tuple[Stream, ...], todo: Work, stages: int) -> None:
    """Copies block after block as stages come free, and waits until the last was read."""

    def load(step: jax.Array, _: None) -> None:
        stage = lax.rem(step, jnp.int32(stages))
        numbers = todo.row.numbers(todo.first + step)
        for stream in streams:

            @pl.when(step >= stages)
            def _(stream: Stream = stream) -> None:
                plgpu.barrier_wait(stream.free.at[stage])

            stream.load(todo.row, todo.first + step, numbers, stage)

    lax.fori_loop(0, todo.steps, load, None)
    for stage in range(stages):

        @pl.when(todo.steps > stage)
        def _(stage: int = stage) -> None:
            for stream in streams:
                plgpu.barrier_wait(stream.free.at[stage])
