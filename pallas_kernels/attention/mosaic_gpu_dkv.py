"""The gradients of keys and values on Hopper: a tile of keys at a time, over the queries that see it.

Products are taken transposed, keys by queries, so that probabilities are the left side of the next product where they
are, in registers. All query heads of a KV head are visited by one thread block: nothing is added across blocks, and
the result does not depend on their order.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.attention.mosaic_gpu_key_tile import CONSUMERS, Inputs, KeyTile, Shared, key_tile
from pallas_kernels.attention.mosaic_gpu_scores import ROWS, Scores
from pallas_kernels.attention.ring import fill
from pallas_kernels.attention.spans import Spans, query_tiles
from pallas_kernels.attention.walk import sections


def key_value_gradients(
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
    stages: int,
    split: bool,
) -> tuple[jax.Array, jax.Array]:
    """q, dout [B,T,H,*], k, v [B,S,K,*], lse (in log2, +inf where nothing is seen), delta float32[B,H,T] -> dk, dv.

    `split`: both consumers work on the same 64 keys, one on dv, the other on dk, to which the first hands its
    probabilities through shared memory: for widths of which one consumer cannot hold both sums in registers.
    """
    batch, queries, heads, width = q.shape
    keys, kv_heads, value_width = k.shape[1], k.shape[2], v.shape[3]
    dtype, group = q.dtype, heads // kv_heads
    tile = key_tile(split)
    tiles = keys // tile
    section = sections(batch * kv_heads, 1, group * queries * (width + value_width) * dtype.itemsize)
    shape = (ROWS, block)

    def body(*refs: Any) -> None:
        inputs, (dk_ref, dv_ref, shared, *handed) = Inputs(*refs[: len(Inputs._fields)]), refs[len(Inputs._fields) :]
        mine = KeyTile.of_this_block(inputs, section=section, tiles=tiles, tile=tile, block=block)
        steps = mine.walk.steps
        q_ring, dout_ring = shared.rings(stages, stages)
        me = lax.axis_index("warpgroup")

        @pl.when(me == CONSUMERS)
        def produce() -> None:
            plgpu.set_max_registers(hopper.REGISTERS[CONSUMERS][1], action="decrease")
            fill(steps, (q_ring, dout_ring), mine.sources)

        def both() -> None:
            plgpu.set_max_registers(hopper.REGISTERS[CONSUMERS][0], action="increase")
            rows = pl.ds(mine.first + me * ROWS, ROWS)
            mine.start(rows, shared, me)
            plgpu.barrier_wait(shared.k_full.at[me])
            plgpu.barrier_wait(shared.v_full.at[me])

            def step(i: jax.Array, carry: tuple[jax.Array, ...], *, mask: bool) -> tuple[jax.Array, ...]:
                dk, dv = carry
                visible = mine.seen(i, rows) if mask else None
                own = hopper.within_loop(me, i)
                slot = q_ring.wait(i)
                raw = hopper.product(shared.k.at[own], shared.q.at[slot].transpose((1, 0)))
                p, slope = scores.probabilities(raw, mine.per_query(shared.lse, slot), visible)
                narrow = p.astype(dtype)
                dout_ring.wait(i)

                def products(sums: Any) -> None:
                    hopper.matmul_into(sums[0], narrow, shared.dout.at[slot])
                    hopper.matmul_into(sums[1], shared.v.at[own], shared.dout.at[slot].transpose((1, 0)))

                nothing = hopper.filled(shape, 0.0, plgpu.Layout.WGMMA)
                dv, change = hopper.accumulate(products, (dv, nothing))
                change = (slope * (change - mine.per_query(shared.delta, slot))).astype(dtype)
                dout_ring.release(i)
                dk = hopper.accumulate(lambda ref: hopper.matmul_into(ref, change, shared.q.at[slot]), dk)
                q_ring.release(i)
                return dk, dv

            nothing = (hopper.filled((ROWS, w), 0.0, plgpu.Layout.WGMMA) for w in (width, value_width))
            dk, dv = mine.loop(step, tuple(nothing))
            mine.store(dk * scores.scale, shared.k.at[me], dk_ref, rows)
            mine.store(dv, shared.v.at[me], dv_ref, rows)

        def values() -> None:
            p_smem, p_full, p_free = handed
            plgpu.set_max_registers(hopper.REGISTERS[CONSUMERS][0], action="increase")
            rows = pl.ds(mine.first, ROWS)
            mine.start(rows, shared, 0)
            plgpu.barrier_wait(shared.k_full.at[0])

            def step(i: jax.Array, dv: jax.Array, *, mask: bool) -> jax.Array:
                visible = mine.seen(i, rows) if mask else None
                slot = q_ring.wait(i)
                raw = hopper.product(shared.k.at[hopper.within_loop(0, i)], shared.q.at[slot].transpose((1, 0)))
                p, slope = scores.probabilities(raw, mine.per_query(shared.lse, slot), visible)
                q_ring.release(i)
                hand = lax.rem(i, 2)

                @pl.when(i >= 2)
                def _() -> None:
                    plgpu.barrier_wait(p_free.at[hand])

                p_smem[hand] = slope.astype(dtype)
                plgpu.commit_smem()
                plgpu.barrier_arrive(p_full.at[hand])
                narrow = p.astype(dtype)
                dout_ring.wait(i)
                dv = hopper.accumulate(lambda ref: hopper.matmul_into(ref, narrow, shared.dout.at[slot]), dv)
                dout_ring.release(i)
                return dv

            dv = mine.loop(step, hopper.filled((ROWS, value_width), 0.0, plgpu.Layout.WGMMA))

            def drain(i: jax.Array, _: Any) -> None:
                plgpu.barrier_wait(p_free.at[lax.rem(i, 2)])

            # Once all is handed over the other consumer needs the values no more, whose place dv takes.
            lax.fori_loop(jnp.maximum(steps - 2, 0), steps, drain, None)
            plgpu.barrier_wait(shared.v_full.at[0])
            mine.store(dv, shared.v.at[0], dv_ref, rows)

        def keys_only() -> None:
            p_smem, p_full, p_free = handed
            plgpu.set_max_registers(hopper.REGISTERS[CONSUMERS][0], action="increase")
            plgpu.barrier_wait(shared.v_full.at[0])

            def step(i: jax.Array, dk: jax.Array) -> jax.Array:
                slot = dout_ring.wait(i)
                change = hopper.product(shared.v.at[hopper.within_loop(0, i)], shared.dout.at[slot].transpose((1, 0)))
                change = change - mine.per_query(shared.delta, slot)
                dout_ring.release(i)
                hand = lax.rem(i, 2)
                plgpu.barrier_wait(p_full.at[hand])
                slope = hopper.load(p_smem.at[hand], plgpu.Layout.WGMMA)
                change = (slope.astype(jnp.float32) * change).astype(dtype)
                plgpu.barrier_arrive(p_free.at[hand])
                q_ring.wait(i)
                dk = hopper.accumulate(lambda ref: hopper.matmul_into(ref, change, shared.q.at[slot]), dk)
                q_ring.release(i)
                return dk

            dk = hopper.filled((ROWS, width), 0.0, plgpu.Layout.WGMMA)
            dk = lax.fori_loop(0, steps, step, dk)
            # The other consumer's last product with the keys came before the last probabilities it handed over.
            plgpu.barrier_wait(shared.k_full.at[0])
            mine.store(dk * scores.scale, shared.k.at[0], dk_ref, pl.ds(mine.first, ROWS))

        if split:
            pl.when(me == 0)(values)
            pl.when(me == 1)(keys_only)
        else:
            pl.when(me < CONSUMERS)(both)

    handed = (
        hopper.tiles((2, ROWS, block), dtype),
        plgpu.Barrier(num_barriers=2),
        plgpu.Barrier(num_barriers=2),
    )
    run = hopper.kernel(
        body,
        name="attention_dkv",
        out_type=(jax.ShapeDtypeStruct(k.shape, dtype), jax.ShapeDtypeStruct(v.shape, dtype)),
        grid=(batch * kv_heads * tiles,),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        scratch_types=(
            Shared.types(k, v, split=split, block=block, stages=stages, dout_stages=stages),
            *(handed if split else ()),
        ),
    )
    ranges = query_tiles(of, block, tile)
    return run(q, k, v, dout, lse, delta, of.positions, of.low, of.high, ranges)
