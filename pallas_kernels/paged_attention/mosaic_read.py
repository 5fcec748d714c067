"""The kernel that reads pages on Hopper: a running softmax over blocks of slots (Dao 2023, 2307.08691; FlashDecoding).

Query rows are packed 64 to a product: all query heads of a KV head, and all tokens of a chunk. Rows are independent, so
what fills the rows that no query has is never looked at. Codes are converted on their way to the product; a key's scale
multiplies its column of scores and a value's its column of probabilities, so no scaling happens inside a product.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.paged_attention.mosaic_codes import unpack
from pallas_kernels.paged_attention.mosaic_mask import Block, block_at, silence, visible
from pallas_kernels.paged_attention.mosaic_pages import GRID, Work, code_columns, produce, staging, streams, work
from pallas_kernels.paged_attention.mosaic_plan import BLOCK, CODES_AT_ONCE, ROWS, Plan
from pallas_kernels.paged_attention.mosaic_scores import Scoring


def read(plan: Plan, scoring: Scoring, operands: dict[str, jax.Array], dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel.

    Args:
      operands: "q" [B, K, tiles * rows, D], "k" and unless it lies in the key "v" (pools), "table" int32[B, K or 1, N],
        "layer" int32[1], "bounds" int32[2, B, K or 1, tiles] (the blocks from and before which a tile sees anything),
        "lower", "upper" int32[B, K or 1, tiles * held_rows] (the positions a row sees, from and before),
        "limit" int32[B, K or 1] (slots in use), and where they apply "positions" int32[B, K or 1, blocks * BLOCK],
        "holes" int32[B, K or 1, blocks] (whether a block has positions of -1), "k_scale", "v_scale" (pools), or for
        codes that share bytes "k_step", "k_low", "v_step", "v_low" (pools, rows as in `Plan.scales_of_page`).

    Returns:
      out [parts, B, K, tiles * rows, Dv], float32, or where `plan.finished` in `dtype`; lse float32[parts, B, K,
      tiles * held_rows].
    """
    batch, kv_heads = operands["q"].shape[:2]
    names = tuple(operands)
    stored = operands["k"].dtype
    kernel = hopper.kernel(
        functools.partial(_body, plan, scoring, names),
        name="paged_attention",
        out_type=(
            jax.ShapeDtypeStruct(
                (plan.parts, batch, kv_heads, plan.tiles * plan.rows, plan.value_width),
                dtype if plan.finished else jnp.float32,
            ),
            jax.ShapeDtypeStruct((plan.parts, batch, kv_heads, plan.tiles * plan.held_rows), jnp.float32),
        ),
        grid=(batch, kv_heads, plan.tiles, plan.splits),
        grid_names=GRID,
        num_threads=plan.consumers + 1,
        scratch_types=(_scratch(plan, names, operands["q"].dtype, stored, dtype),),
    )
    out, lse = kernel(*operands.values())
    return out, lse


def _scratch(plan: Plan, names: tuple[str, ...], compute: Any, stored: Any, dtype: Any) -> dict[str, Any]:
    widths = {name: width for name, width in (("k", plan.width), ("v", plan.value_width)) if name in names}
    scratch = staging(plan, names, widths, stored)
    # Both sides of a product are cut into tiles of the same width.
    columns = CODES_AT_ONCE if plan.packed > 1 else None
    scratch["q"] = hopper.tiles((plan.held_rows // ROWS, ROWS, plan.width), compute, columns)
    scratch["q_full"] = plgpu.Barrier(num_arrivals=plan.held_rows // ROWS)
    if plan.share != "blocks":
        scratch["meet"] = plgpu.Barrier(num_arrivals=plan.consumers)
    if stored != compute:
        scratch["converted"] = hopper.tiles((plan.consumers, BLOCK, max(widths.values())), compute, columns)
    if plan.rows < ROWS:
        scratch["out"] = hopper.tiles((plan.consumers, ROWS, BLOCK), jnp.float32)
    return scratch


def _body(plan: Plan, scoring: Scoring, names: tuple[str, ...], *refs: Any) -> None:
    given, (out, lse, smem) = dict(zip(names, refs[: len(names)], strict=True)), refs[len(names) :]
    todo = work(plan, given)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == plan.consumers)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")
        for begin in range(0, plan.rows, ROWS):
            rows = min(plan.rows - begin, ROWS)
            plgpu.copy_gmem_to_smem(
                given["q"].at[todo.batch, todo.head, pl.ds(todo.tile * plan.rows + begin, rows)],
                smem["q"].at[begin // ROWS, pl.ds(0, rows)],
                smem["q_full"],
            )
        produce(streams(given, smem, todo), todo, plan.stages)

    @pl.when(warpgroup < plan.consumers)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        consumer = _Consumer(plan, scoring, given, smem, todo, warpgroup)
        consumer.store(out, lse, *consumer.run())


@dataclasses.dataclass(frozen=True)
class _Consumer:
    """One computing warpgroup, number `me`: `given` in global memory, `smem` shared memory and barriers."""

    plan: Plan
    scoring: Scoring
    given: dict[str, Any]
    smem: dict[str, Any]
    todo: Work
    me: jax.Array

    @property
    def first_row(self) -> jax.Array:
        """Of the 64 query rows that this consumer computes."""
        begin = self.todo.tile * self.plan.held_rows
        return begin + self.me * ROWS if self.plan.share == "rows" else begin

    def run(self) -> tuple[jax.Array, jax.Array]:
        """All blocks, or this consumer's part of them -> out float32[64, columns], lse float32[64]."""
        plan, todo, own = self.plan, self.todo, self.plan.share == "blocks"
        sees = (todo.batch, todo.row.row, pl.ds(self.first_row, ROWS))
        upper = hopper.load(self.given["upper"].at[sees], hopper.ROWS, optimized=False)
        lower = None
        if "lower" in self.given:
            lower = hopper.load(self.given["lower"].at[sees], hopper.ROWS, optimized=False)
        plgpu.barrier_wait(self.smem["q_full"])

        def step(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            acc, top, total = carry
            number = index * plan.consumers + self.me if own else index
            stage = lax.rem(number, jnp.int32(plan.stages))
            block = block_at(self.given, self.smem, todo, todo.first + number, stage)
            scores = self.scores(stage, block)
            scores = jnp.where(visible(block, lower, upper), scores, -jnp.inf)
            higher = jnp.maximum(top, jnp.max(scores, axis=1))
            shift = jnp.where(higher == -jnp.inf, 0.0, higher)
            weights = jnp.exp2(scores - hopper.rows_over(shift, scores.shape))
            fade = jnp.exp2(top - shift)
            total = total * fade + jnp.sum(weights, axis=1)
            acc = acc * hopper.rows_over(fade, acc.shape)
            return self.weighted(acc, weights, stage, block), higher, total

        nothing = (
            hopper.filled((ROWS, plan.columns), 0.0, plgpu.Layout.WGMMA),
            hopper.filled((ROWS,), -jnp.inf, hopper.ROWS),
            hopper.filled((ROWS,), 0.0, hopper.ROWS),
        )
        steps = lax.div(todo.steps - self.me + plan.consumers - 1, jnp.int32(plan.consumers)) if own else todo.steps
        acc, top, total = lax.fori_loop(0, steps, step, nothing)
        some = total > 0.0
        total = jnp.where(some, total, 1.0)
        out = acc * hopper.rows_over(1.0 / total, acc.shape)
        return out, jnp.where(some, top * hopper.LN_2 + jnp.log(total), -jnp.inf)

    def scores(self, stage: jax.Array, block: Block) -> jax.Array:
        """The block's scores in units of log2, float32[64, BLOCK]."""
        smem = self.smem
        plgpu.barrier_wait(smem["k_full"].at[stage])
        keys: Any = smem["k"].at[stage]
        if "v" not in smem:
            self.silenced(keys, block, self.me * self.plan.columns, self.plan.columns)
        column_scale = hopper.load(smem["k_scale"].at[stage], hopper.COLUMNS) if "k_scale" in smem else None
        if "converted" in smem:
            keys = self.unpacked("k", stage) if self.plan.packed > 1 else self.converted(keys, self.plan.width)
            plgpu.barrier_arrive(smem["k_free"].at[stage])
        queries = smem["q"].at[self.me if self.plan.share == "rows" else 0]
        products = hopper.product(queries, keys.transpose((1, 0)))
        if "converted" not in smem and "v" in smem:
            plgpu.barrier_arrive(smem["k_free"].at[stage])
        if column_scale is not None:
            products = products * hopper.columns_over(column_scale, products.shape)
        return self.scoring(products)

    def weighted(self, acc: jax.Array, weights: jax.Array, stage: jax.Array, block: Block) -> jax.Array:
        """acc + weights @ values; gives the stage back."""
        smem, plan, name = self.smem, self.plan, "v" if "v" in self.smem else "k"
        values: Any = smem[name].at[stage]
        if name == "v":
            plgpu.barrier_wait(smem["v_full"].at[stage])
        if plan.share == "columns":
            values = values.at[:, pl.ds(self.me * plan.columns, plan.columns)]
        if "v_scale" in smem:
            column_scale = hopper.load(smem["v_scale"].at[stage], hopper.COLUMNS)
            # An unused slot's scale may be NaN.
            column_scale = jnp.where(block.held(hopper.COLUMNS), column_scale, 0.0)
            weights = weights * hopper.columns_over(column_scale, weights.shape)
        narrow = weights.astype(smem["q"].dtype)  # before the conversion, which needs registers
        if "converted" in smem:
            packed = plan.packed > 1
            values = self.unpacked("v", stage, block) if packed else self.converted(values, plan.columns, block)
            plgpu.barrier_arrive(smem["v_free"].at[stage])
        elif name == "v":
            self.silenced(values, block, 0, plan.value_width)
        acc = hopper.accumulate(lambda ref: hopper.matmul_into(ref, narrow, values), acc)
        if "converted" not in smem:
            plgpu.barrier_arrive(smem[f"{name}_free"].at[stage])
        if "positions" in smem:
            plgpu.barrier_arrive(smem["positions_free"].at[stage])
        return acc

    def converted(self, codes: Any, width: int, block: Block | None = None) -> Any:
        """Codes [BLOCK, width] as numbers a product takes: keys, or with a block values, 0 in its unused slots."""
        kept = self.smem["converted"].at[self.me]
        step = code_columns(self.plan.width if block is None else self.plan.value_width)
        for begin in range(0, width, step):
            columns = pl.ds(begin, step)
            tile = hopper.load(codes.at[:, columns], plgpu.Layout.WGMMA_UPCAST_2X)
            if not jnp.issubdtype(tile.dtype, jnp.integer):
                tile = tile.astype(jnp.float32)
                if block is not None:  # these codes can be NaN
                    held = block.held(plgpu.Layout.WGMMA_UPCAST_2X.reduce(1))
                    tile = jnp.where(hopper.rows_over(held, tile.shape), tile, 0.0)
            kept[:, columns] = tile.astype(kept.dtype)
        plgpu.commit_smem()
        return kept.at[:, pl.ds(0, width)]

    def unpacked(self, name: str, stage: jax.Array, block: Block | None = None) -> Any:
        """The same of codes that share bytes."""
        kept = self.smem["converted"].at[self.me]
        unpack(self.plan, name, self.smem, stage, kept, block)
        plgpu.commit_smem()
        return kept.at[:, pl.ds(0, self.plan.width if name == "k" else self.plan.value_width)]

    def silenced(self, values: Any, block: Block, begin: Any, columns: int) -> None:
        """Zeroes unused slots where there are any; consumers that share the block wait for each other."""

        @pl.when(block.partly)
        def _() -> None:
            if self.plan.share == "rows":
                pl.when(self.me == 0)(lambda: silence(values, block, begin, columns))
            else:
                silence(values, block, begin, columns)
            plgpu.commit_smem()
            if self.plan.share != "blocks":
                plgpu.barrier_arrive(self.smem["meet"])
                plgpu.barrier_wait(self.smem["meet"])

    def store(self, out: Any, lse: Any, values: jax.Array, scores: jax.Array) -> None:
        """Writes what `run` gives where it belongs in the kernel's outputs."""
        plan, todo, me = self.plan, self.todo, self.me
        part = todo.split * plan.consumers + me if plan.share == "blocks" else todo.split
        to = (part, todo.batch, todo.head)

        def keep() -> None:
            lse[(*to, pl.ds(self.first_row, ROWS))] = scores

        # Consumers with a part of the columns each know the same log-sum-exp.
        pl.when(me == 0)(keep) if plan.share == "columns" else keep()
        if plan.rows >= ROWS and not plan.finished:
            # From registers: numbers of 32 bits fill whole sectors of memory.
            begin = me * plan.columns if plan.share == "columns" else 0
            out[(*to, pl.ds(self.first_row, ROWS), pl.ds(begin, plan.columns))] = values
            return
        first: Any
        if plan.finished:
            # The consumer's own queries have been read for the last time, and leave room.
            staged, first, rows, step = self.smem["q"].at[me], self.first_row, ROWS, plan.columns
        else:
            staged, first, rows, step = self.smem["out"].at[me], 0, plan.rows, BLOCK
        for begin in range(0, plan.columns, step):
            staged[...] = values[:, begin : begin + step].astype(out.dtype)
            plgpu.commit_smem()
            target = out.at[(*to, pl.ds(first, rows), pl.ds(begin, step))]
            plgpu.copy_smem_to_gmem(staged.at[pl.ds(0, rows)], target)
            plgpu.wait_smem_to_gmem(0)
