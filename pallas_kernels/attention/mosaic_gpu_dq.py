"""The gradient of the queries on Hopper: a tile of queries at a time, over the keys it sees."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.attention.mosaic_gpu_scores import ROWS, Scores
from pallas_kernels.attention.ring import barriers, fill, ring
from pallas_kernels.attention.spans import Spans, key_blocks
from pallas_kernels.attention.walk import Walk, place, sections

CONSUMERS = 2
TILE = CONSUMERS * ROWS


def query_gradient(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dout: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    of: Spans,
    scores: Scores,
    *,
    block: int,
    k_stages: int,
    v_stages: int,
) -> jax.Array:
    """q, dout [B,T,H,*], k, v [B,S,K,*], lse (in log2, +inf where nothing is seen), delta float32[B,H,T] -> dq."""
    batch, queries, heads, width = q.shape
    keys, kv_heads, value_width = k.shape[1], k.shape[2], v.shape[3]
    dtype, group, tiles = q.dtype, heads // kv_heads, queries // TILE
    section = sections(batch * heads, group, keys * (width + value_width) * dtype.itemsize)

    def body(*refs: Any) -> None:
        q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, at_ref, low_ref, high_ref, ranges_ref, *rest = refs
        dq_ref, q_smem, dout_smem, k_smem, v_smem, q_full, dout_full, k_barriers, v_barriers = rest
        k_ring, v_ring = ring((k_smem,), k_barriers, k_stages), ring((v_smem,), v_barriers, v_stages)
        me = lax.axis_index("warpgroup")
        head_of_all, number = place(lax.axis_index("block"), section, tiles)
        number = tiles - 1 - number
        b, head = lax.div(head_of_all, heads), lax.rem(head_of_all, heads)
        walk = Walk.read(ranges_ref, b, number)

        @pl.when(me == CONSUMERS)
        def produce() -> None:
            plgpu.set_max_registers(hopper.REGISTERS[CONSUMERS][1], action="decrease")

            def sources(i: jax.Array) -> tuple[tuple[Any], ...]:
                here = (b, pl.ds(walk.at(i)[1] * block, block), lax.div(head, group))
                return (k_ref.at[here],), (v_ref.at[here],)

            fill(walk.steps, (k_ring, v_ring), sources)

        @pl.when(me < CONSUMERS)
        def consume() -> None:
            plgpu.set_max_registers(hopper.REGISTERS[CONSUMERS][0], action="increase")
            row = number * TILE + me * ROWS
            rows = pl.ds(row, ROWS)
            plgpu.copy_gmem_to_smem(q_ref.at[b, rows, head], q_smem.at[me], q_full.at[me])
            plgpu.copy_gmem_to_smem(dout_ref.at[b, rows, head], dout_smem.at[me], dout_full.at[me])
            span = (0 if low_ref.shape[0] == 1 else b, rows)
            low, high = (hopper.load(ref.at[span], hopper.ROWS, optimized=False) for ref in (low_ref, high_ref))
            lse_here, delta_here = (
                hopper.load(ref.at[b, head, rows], hopper.ROWS, optimized=False) for ref in (lse_ref, delta_ref)
            )
            plgpu.barrier_wait(q_full.at[me])
            plgpu.barrier_wait(dout_full.at[me])

            def step(i: jax.Array, acc: jax.Array, *, mask: bool) -> jax.Array:
                shape = (ROWS, block)
                if mask:
                    keys_here = (0 if at_ref.shape[0] == 1 else b, pl.ds(walk.at(i)[1] * block, block))
                    at = hopper.load(at_ref.at[keys_here], hopper.COLUMNS, optimized=False)
                mine = hopper.within_loop(me, i)
                k_slot = k_ring.wait(i)
                raw = hopper.product(q_smem.at[mine], k_smem.at[k_slot].transpose((1, 0)))
                if mask:
                    at = hopper.columns_over(at, shape)
                    seen = (at >= hopper.rows_over(low, shape)) & (at <= hopper.rows_over(high, shape))
                else:
                    seen = None
                _, slope = scores.probabilities(raw, hopper.rows_over(lse_here, shape), seen)
                v_slot = v_ring.wait(i)
                change = hopper.product(dout_smem.at[mine], v_smem.at[v_slot].transpose((1, 0)))
                v_ring.release(i)
                narrow = (slope * (change - hopper.rows_over(delta_here, shape))).astype(dtype)
                acc = hopper.accumulate(lambda ref: hopper.matmul_into(ref, narrow, k_smem.at[k_slot]), acc)
                k_ring.release(i)
                return acc

            acc = hopper.filled((ROWS, width), 0.0, plgpu.Layout.WGMMA)
            acc = lax.fori_loop(0, walk.plain_steps, functools.partial(step, mask=False), acc)
            acc = lax.fori_loop(walk.plain_steps, walk.steps, functools.partial(step, mask=True), acc)
            q_smem[me] = (acc * scores.scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[me], dq_ref.at[b, rows, head])
            plgpu.wait_smem_to_gmem(0)

    run = hopper.kernel(
        body,
        name="attention_dq",
        out_type=jax.ShapeDtypeStruct(q.shape, dtype),
        grid=(batch * heads * tiles,),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        scratch_types=(
            hopper.tiles((CONSUMERS, ROWS, width), dtype),
            hopper.tiles((CONSUMERS, ROWS, value_width), dtype),
            hopper.tiles((k_stages, block, width), dtype),
            hopper.tiles((v_stages, block, value_width), dtype),
            plgpu.Barrier(num_barriers=CONSUMERS),
            plgpu.Barrier(num_barriers=CONSUMERS),
            barriers(k_stages, 1, CONSUMERS),
            barriers(v_stages, 1, CONSUMERS),
        ),
    )
    ranges = key_blocks(of, TILE, block)
    return run(q, k, v, dout, lse, delta, of.positions, of.low, of.high, ranges)
