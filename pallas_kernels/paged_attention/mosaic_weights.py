"""The kernel of `paged_weights` on Hopper: what each slot receives, from the final log-sum-exps.

Here slots are the rows of a product and query rows its columns, so that a slot's mass is a sum along a row, and eight
query rows are enough for a product. Slots are independent: shares of a sequence need no merge.
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
from pallas_kernels.paged_attention.mosaic_mask import block_at, seen_by
from pallas_kernels.paged_attention.mosaic_pages import GRID, Work, code_columns, produce, staging, streams, work
from pallas_kernels.paged_attention.mosaic_plan import BLOCK, Plan
from pallas_kernels.paged_attention.mosaic_scores import Scoring


def weigh(plan: Plan, scoring: Scoring, operands: dict[str, jax.Array], blocks: int) -> jax.Array:
    """Runs the kernel.

    Args:
      operands: as `mosaic_read.read` takes them, without values, and "lse", "weight" float32[B, K, tiles * rows]: the
        log-sum-exp of each query row in units of log2, 0 where it is -inf, and how much the row counts.
      blocks: of the table's width.

    Returns:
      float32[tiles, B, K, blocks * BLOCK], undefined in blocks outside a tile's bounds.
    """
    batch, kv_heads = operands["q"].shape[:2]
    names = tuple(operands)
    kernel = hopper.kernel(
        functools.partial(_body, plan, scoring, names),
        name="paged_weights",
        out_type=jax.ShapeDtypeStruct((plan.tiles, batch, kv_heads, blocks * BLOCK), jnp.float32),
        grid=(batch, kv_heads, plan.tiles, plan.splits),
        grid_names=GRID,
        num_threads=plan.consumers + 1,
        scratch_types=(_scratch(plan, names, operands["q"].dtype, operands["k"].dtype),),
    )
    mass: jax.Array = kernel(*operands.values())
    return mass


def _scratch(plan: Plan, names: tuple[str, ...], compute: Any, stored: Any) -> dict[str, Any]:
    scratch = staging(plan, names, {"k": plan.width}, stored)
    scratch["q"] = hopper.tiles((plan.rows, plan.width), compute)
    scratch["q_full"] = plgpu.Barrier()
    return scratch


def _body(plan: Plan, scoring: Scoring, names: tuple[str, ...], *refs: Any) -> None:
    given, (mass, smem) = dict(zip(names, refs[: len(names)], strict=True)), refs[len(names) :]
    todo = work(plan, given)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == plan.consumers)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")
        rows = given["q"].at[todo.batch, todo.head, pl.ds(todo.tile * plan.rows, plan.rows)]
        plgpu.copy_gmem_to_smem(rows, smem["q"], smem["q_full"])
        produce(streams(given, smem, todo), todo, plan.stages)

    @pl.when(warpgroup < plan.consumers)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        _Consumer(plan, scoring, given, smem, todo, warpgroup).run(mass)


@dataclasses.dataclass(frozen=True)
class _Consumer:
    """One computing warpgroup, number `me`: `given` in global memory, `smem` shared memory and barriers."""

    plan: Plan
    scoring: Scoring
    given: dict[str, Any]
    smem: dict[str, Any]
    todo: Work
    me: jax.Array

    def of_rows(self, name: str, index: Any) -> jax.Array:
        """One number for each query row of the tile, along a product's columns."""
        rows = pl.ds(self.todo.tile * self.plan.rows, self.plan.rows)
        return hopper.load(self.given[name].at[self.todo.batch, index, rows], hopper.COLUMNS, optimized=False)

    def run(self, mass: Any) -> None:
        """Sums the weights of every slot in this consumer's blocks."""
        plan, todo, smem = self.plan, self.todo, self.smem
        upper = self.of_rows("upper", todo.row.row)
        lower = self.of_rows("lower", todo.row.row) if "lower" in self.given else None
        lse, weight = self.of_rows("lse", todo.head), self.of_rows("weight", todo.head)
        plgpu.barrier_wait(smem["q_full"])

        def step(index: jax.Array, _: None) -> None:
            number = index * plan.consumers + self.me
            stage = lax.rem(number, jnp.int32(plan.stages))
            block = block_at(self.given, smem, todo, todo.first + number, stage)
            mask = seen_by(block, lower, upper)
            scores = self.scores(stage)
            weights = jnp.exp2(scores - hopper.columns_over(lse, scores.shape))
            weights = jnp.where(mask, weights * hopper.columns_over(weight, scores.shape), 0.0)
            if "positions" in smem:
                plgpu.barrier_arrive(smem["positions_free"].at[stage])
            mass[todo.tile, todo.batch, todo.head, pl.ds(block.begin, BLOCK)] = jnp.sum(weights, axis=1)

        steps = lax.div(todo.steps - self.me + plan.consumers - 1, jnp.int32(plan.consumers))
        lax.fori_loop(0, steps, step, None)

    def scores(self, stage: jax.Array) -> jax.Array:
        """A block's scores in units of log2, float32[BLOCK, rows]; gives its stage back."""
        smem = self.smem
        plgpu.barrier_wait(smem["k_full"].at[stage])
        keys, queries = smem["k"].at[stage], smem["q"]
        row_scale = hopper.load(smem["k_scale"].at[stage], hopper.ROWS) if "k_scale" in smem else None
        if keys.dtype == queries.dtype:
            products = hopper.product(keys, queries.transpose((1, 0)))
        else:
            products = self.converted_product(keys, queries)
        plgpu.barrier_arrive(smem["k_free"].at[stage])
        if row_scale is not None:
            products = products * hopper.rows_over(row_scale, products.shape)
        return self.scoring(products)

    def converted_product(self, codes: Any, queries: Any) -> jax.Array:
        """codes [BLOCK, D] in shared memory, converted in registers, times the turned queries [rows, D]."""
        products = hopper.filled((BLOCK, self.plan.rows), 0.0, plgpu.Layout.WGMMA)
        step = code_columns(self.plan.width)
        for begin in range(0, self.plan.width, step):
            columns = pl.ds(begin, step)
            tile = hopper.load(codes.at[:, columns], plgpu.Layout.WGMMA_UPCAST_2X)
            if not jnp.issubdtype(tile.dtype, jnp.integer):
                tile = tile.astype(jnp.float32)
            tile = plgpu.layout_cast(tile.astype(queries.dtype), plgpu.Layout.WGMMA)
            part = queries.at[:, columns].transpose((1, 0))
            products = hopper.accumulate(functools.partial(hopper.matmul_into, a=tile, b=part), products)
        return products
