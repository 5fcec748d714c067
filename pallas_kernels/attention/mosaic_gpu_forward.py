"""The forward pass of attention on Hopper: FlashAttention-3's (Shah et al. 2024, 2407.08608), in Mosaic GPU.

A block of two or three consumer warpgroups, 64 query rows each, and one producer that copies keys and values ahead of
them. While one consumer does its softmax the other has the tensor cores.
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
from pallas_kernels.attention.mosaic_gpu_scores import ROWS, Scores
from pallas_kernels.attention.ring import barriers, fill, ring
from pallas_kernels.attention.spans import Spans, key_blocks
from pallas_kernels.attention.walk import Walk, place, sections


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """How the forward kernel cuts its work.

    Attributes:
      block: keys of a step. stages: steps held in shared memory. consumers: warpgroups of 64 query rows.
    """

    block: int = 128
    stages: int = 2
    consumers: int = 2

    @property
    def tile(self) -> int:
        """Query rows of a thread block."""
        return self.consumers * ROWS


def default_forward_config(width: int, value_width: int) -> ForwardConfig:
    """A choice for key and value widths that nobody has measured."""
    return ForwardConfig(block=64 if max(width, value_width) > 192 else 128)


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, of: Spans, scores: Scores, *, config: ForwardConfig
) -> tuple[jax.Array, jax.Array]:
    """q [B,T,H,D], k [B,S,K,D], v [B,S,K,Dv], T and S whole tiles and blocks -> out [B,T,H,Dv], lse float32[B,H,T]."""
    batch, queries, heads, width = q.shape
    keys, kv_heads, value_width = k.shape[1], k.shape[2], v.shape[3]
    group = heads // kv_heads
    dtype, block, stages, tile, consumers = q.dtype, config.block, config.stages, config.tile, config.consumers
    tiles = queries // tile
    section = sections(batch * heads, group, keys * (width + value_width) * dtype.itemsize)
    ranges = key_blocks(of, tile, block)
    one_span, one_place = of.low.shape[0] == 1, of.positions.shape[0] == 1
    ping_pong = consumers == 2

    def body(*refs: Any) -> None:
        q_ref, k_ref, v_ref, at_ref, low_ref, high_ref, ranges_ref, *rest = refs
        out_ref, lse_ref, q_and_out, k_smem, v_smem, lse_smem, q_full, k_barriers, v_barriers, turn = rest
        k_ring, v_ring = ring((k_smem,), k_barriers, stages), ring((v_smem,), v_barriers, stages)
        q_smem, out_smem = q_and_out if value_width != width else (q_and_out, q_and_out)
        me = lax.axis_index("warpgroup")
        head_of_all, number = place(lax.axis_index("block"), section, tiles)
        # With causal masks the last tile is the longest: begin with it, and no long one is left over for the end.
        number = tiles - 1 - number
        b, head = lax.div(head_of_all, heads), lax.rem(head_of_all, heads)
        walk = Walk.read(ranges_ref, b, number)

        @pl.when(me == consumers)
        def produce() -> None:
            plgpu.set_max_registers(hopper.REGISTERS[consumers][1], action="decrease")
            kv_head = lax.div(head, group)

            def sources(i: jax.Array) -> tuple[tuple[Any], ...]:
                here = (b, pl.ds(walk.at(i)[1] * block, block), kv_head)
                return (k_ref.at[here],), (v_ref.at[here],)

            fill(walk.steps, (k_ring, v_ring), sources)

        @pl.when(me < consumers)
        def consume() -> None:
            plgpu.set_max_registers(hopper.REGISTERS[consumers][0], action="increase")
            row = number * tile + me * ROWS
            mine = q_smem.at[me, pl.ds(0, ROWS)]
            plgpu.copy_gmem_to_smem(q_ref.at[b, pl.ds(row, ROWS), head], mine, q_full.at[me])
            span = (0 if one_span else b, pl.ds(row, ROWS))
            low = hopper.load(low_ref.at[span], hopper.ROWS, optimized=False)
            high = hopper.load(high_ref.at[span], hopper.ROWS, optimized=False)
            plgpu.barrier_wait(q_full.at[me])

            def take_turn() -> None:
                if ping_pong:
                    plgpu.barrier_arrive(turn)
                    plgpu.barrier_wait(turn)

            def step(i: jax.Array, carry: tuple[jax.Array, ...], *, mask: bool) -> tuple[jax.Array, ...]:
                acc, top, total = carry
                shape = (ROWS, block)
                if mask:
                    keys_here = (0 if one_place else b, pl.ds(walk.at(i)[1] * block, block))
                    at = hopper.load(at_ref.at[keys_here], hopper.COLUMNS, optimized=False)
                slot = k_ring.wait(i)
                raw = hopper.product(mine, k_smem.at[slot].transpose((1, 0)), meanwhile=take_turn)
                k_ring.release(i)
                values = scores.capped(raw)
                if mask:
                    at = hopper.columns_over(at, shape)
                    seen = (at >= hopper.rows_over(low, shape)) & (at <= hopper.rows_over(high, shape))
                    values = jnp.where(seen, values, -jnp.inf)
                higher = jnp.maximum(top, values.max(axis=1) * scores.unit)
                shift = jnp.where(higher == -jnp.inf, 0.0, higher) if mask else higher
                fade = jnp.exp2(top - shift)
                weights = jnp.exp2(values * scores.unit - hopper.rows_over(shift, shape))
                acc = acc * hopper.rows_over(fade, acc.shape)
                total = total * fade + weights.sum(axis=1)
                narrow = weights.astype(dtype)
                if ping_pong:
                    acc, total, higher, narrow = lax.optimization_barrier((acc, total, higher, narrow))
                    plgpu.barrier_arrive(turn)
                v_ring.wait(i)
                if ping_pong:
                    plgpu.barrier_wait(turn)
                acc = hopper.accumulate(lambda ref: hopper.matmul_into(ref, narrow, v_smem.at[slot]), acc)
                v_ring.release(i)
                return acc, higher, total

            carry = (
                hopper.filled((ROWS, value_width), 0.0, plgpu.Layout.WGMMA),
                hopper.filled((ROWS,), -jnp.inf, hopper.ROWS),
                hopper.filled((ROWS,), 0.0, hopper.ROWS),
            )
            pl.when(me == 1)(take_turn)
            carry = lax.fori_loop(0, walk.plain_steps, functools.partial(step, mask=False), carry)
            acc, top, total = lax.fori_loop(walk.plain_steps, walk.steps, functools.partial(step, mask=True), carry)
            pl.when(me == 0)(take_turn)

            some = (total > 0.0) & (low <= high)
            share = 1.0 / jnp.where(some, total, 1.0)
            out = jnp.where(hopper.rows_over(some, acc.shape), acc * hopper.rows_over(share, acc.shape), 0.0)
            staged = out_smem.at[me, pl.ds(0, ROWS)]
            staged[...] = out.astype(dtype)
            lse = (top + jnp.log(jnp.where(some, total, 1.0)) * hopper.LOG2_E) * hopper.LN_2
            lse_smem[me] = jnp.where(some, lse, -jnp.inf)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged, out_ref.at[b, pl.ds(row, ROWS), head])
            plgpu.copy_smem_to_gmem(lse_smem.at[me], lse_ref.at[b, head, pl.ds(row, ROWS)])
            plgpu.wait_smem_to_gmem(0)

    # The output waits in its consumer's queries for its copy; where widths differ, rows make up for it.
    wider = max(width, value_width)
    q_and_out = hopper.tiles((consumers, ROWS * wider // width, width), dtype)
    if value_width != width:
        q_and_out = plgpu.RefUnion(
            q_and_out, hopper.tiles((consumers, ROWS * wider // value_width, value_width), dtype)
        )
    run = hopper.kernel(
        body,
        name="attention_forward",
        out_type=(
            jax.ShapeDtypeStruct((batch, queries, heads, value_width), dtype),
            jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
        ),
        grid=(batch * heads * tiles,),
        grid_names=("block",),
        num_threads=consumers + 1,
        scratch_types=(
            q_and_out,
            hopper.tiles((stages, block, width), dtype),
            hopper.tiles((stages, block, value_width), dtype),
            plgpu.SMEM((consumers, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=consumers),
            barriers(stages, 1, consumers),
            barriers(stages, 1, consumers),
            plgpu.Barrier(num_arrivals=2),
        ),
    )
    return run(q, k, v, of.positions, of.low, of.high, ranges)
