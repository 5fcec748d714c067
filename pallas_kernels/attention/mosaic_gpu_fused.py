"""All three gradients of attention on Hopper in one kernel: five products instead of seven, as FlashAttention-3 does
(Shah et al. 2024, 2407.08608, section 3.2 and appendix B; Dao 2023, 2307.08691, algorithm 2).

It works as `mosaic_gpu_dkv` does, by tiles of keys over the queries that see them. The slopes of the scores also go to
shared memory, where their product with the keys is this tile's share of the gradient of the queries. Thread blocks add
such shares to a float32 array in the order in which they come, so the last bits differ from run to run.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, sums
from pallas_kernels.attention.mosaic_gpu_key_tile import CONSUMERS, Inputs, KeyTile, Shared, key_tile
from pallas_kernels.attention.mosaic_gpu_scores import ROWS, Scores
from pallas_kernels.attention.ring import fill
from pallas_kernels.attention.spans import Spans, query_tiles
from pallas_kernels.attention.walk import sections

BLOCK = ROWS
"""Queries of a step: the rows of the product that gives their gradient."""


def splits(width: int, value_width: int, scores: Scores) -> bool:
    """Whether one consumer's registers are too few for both dk and dv of 64 keys, and what else it works with.

    With a soft cap that is more: the slope of a score is not its probability.
    """
    return max(width, value_width) > (128 if scores.soft_cap is None else 64)


def all_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dout: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    of: Spans,
    scores: Scores,
    *,
    stages: int,
    dout_stages: int,
    columns: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, dout [B,T,H,*], k, v [B,S,K,*], lse (in log2, +inf where nothing is seen), delta float32[B,H,T] -> dq, dk, dv.

    `columns` of dq wait at a time in shared memory to be added. Where widths are too large for `splits`, both consumers
    work on the same 64 keys, one on dv, the other on dk, to which the first hands its probabilities through shared
    memory, and each on columns of its own of dq. Otherwise each has 64 keys, and they take turns with dq.
    """
    if q.shape[3] % columns:
        raise ValueError(f"columns of dq must divide the width {q.shape[3]}, got {columns}")
    batch, queries, heads, width = q.shape
    keys, kv_heads, value_width = k.shape[1], k.shape[2], v.shape[3]
    dtype, split = q.dtype, splits(width, value_width, scores)
    tile = key_tile(split)
    tiles = keys // tile
    # Both what is read and the float32 that is added to are to stay in the cache.
    bytes_per_query = (width + value_width) * dtype.itemsize + 4 * width
    section = sections(batch * kv_heads, 1, heads // kv_heads * queries * bytes_per_query)
    owners = 1 if split else CONSUMERS
    shape = (ROWS, BLOCK)

    def body(*refs: Any) -> None:
        inputs, (dq_ref, dk_ref, dv_ref, *rest) = Inputs(*refs[: len(Inputs._fields)]), refs[len(Inputs._fields) :]
        shared, slopes_smem, dq_smem, slopes_full, *handed = rest
        mine = KeyTile.of_this_block(inputs, section=section, tiles=tiles, tile=tile, block=BLOCK)
        steps = mine.walk.steps
        q_ring, dout_ring = shared.rings(stages, dout_stages)
        me = lax.axis_index("warpgroup")

        def share(i: jax.Array, first: int, last: int) -> None:
            """Adds these columns of a step's share of dq, once its slopes lie in shared memory."""
            head, rows = mine.again(i).queries(i)
            for column in range(first, last, columns):
                here = pl.ds(column, columns)

                def products(acc: Any, here: Any = here) -> None:
                    for owner in range(owners):
                        left = slopes_smem.at[lax.rem(i, 2), owner].transpose((1, 0))
                        hopper.matmul_into(acc, left, shared.k.at[hopper.within_loop(owner, i), :, here])

                found = hopper.accumulate(products, hopper.filled((BLOCK, columns), 0.0, plgpu.Layout.WGMMA))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                staged = dq_smem.at[hopper.within_loop(me, i)]
                staged[...] = found
                plgpu.commit_smem()
                sums.add(staged, dq_ref, mine.number, (mine.b, rows, head, here))

        def done() -> Any:
            """The barrier that says that a consumer reads the keys no more, whose place dk takes."""
            return slopes_full.at[2]

        @pl.when(me == CONSUMERS)
        def produce() -> None:
            plgpu.set_max_registers(hopper.REGISTERS[CONSUMERS][1], action="decrease")
            fill(steps, (q_ring, dout_ring), mine.sources)

        def both() -> None:
            plgpu.set_max_registers(hopper.REGISTERS[CONSUMERS][0], action="increase")
            rows = pl.ds(mine.first + me * ROWS, ROWS)
            mine.start(rows, shared, me)
            for owner in range(owners):
                plgpu.barrier_wait(shared.k_full.at[owner])
            plgpu.barrier_wait(shared.v_full.at[me])

            def take_turn(i: jax.Array) -> None:
                """Adds the share of the step before, if it is this consumer's turn.

                A step late, so that neither waits for the other's slopes at once. That both take turns also tells each
                that the other has read what it is about to write over.
                """

                @pl.when((i > 0) & (lax.rem(i, 2) != me))
                def _() -> None:
                    plgpu.barrier_wait(slopes_full.at[lax.rem(i - 1, 2)])
                    share(i - 1, 0, width)

            def step(i: jax.Array, carry: tuple[jax.Array, ...], *, mask: bool) -> tuple[jax.Array, ...]:
                dk, dv = carry
                visible = mine.again(i).seen(i, rows) if mask else None
                own = hopper.within_loop(me, i)
                slot = q_ring.wait(i)
                raw = hopper.product(shared.k.at[own], shared.q.at[slot].transpose((1, 0)))
                p, slope = scores.probabilities(raw, mine.per_query(shared.lse, slot), visible)
                # Both narrow from here on: in float32 they would not fit next to two sums and a product.
                narrow, slope = p.astype(dtype), slope.astype(dtype)
                dout_slot = dout_ring.wait(i)

                def products(acc: Any) -> None:
                    hopper.matmul_into(acc[0], narrow, shared.dout.at[dout_slot])
                    hopper.matmul_into(acc[1], shared.v.at[own], shared.dout.at[dout_slot].transpose((1, 0)))

                nothing = hopper.filled(shape, 0.0, plgpu.Layout.WGMMA)
                dv, change = hopper.accumulate(products, (dv, nothing))
                change = change - mine.per_query(shared.delta, dout_slot)
                change = (slope.astype(jnp.float32) * change).astype(dtype)
                take_turn(i)
                slopes_smem[lax.rem(i, 2), own] = change
                plgpu.commit_smem()
                plgpu.barrier_arrive(slopes_full.at[lax.rem(i, 2)])
                # Not before the fence, as not only products have read from the slot.
                dout_ring.release(i)
                dk = hopper.accumulate(lambda ref: hopper.matmul_into(ref, change, shared.q.at[slot]), dk)
                q_ring.release(i)
                return dk, dv

            nothing = (hopper.filled((ROWS, w), 0.0, plgpu.Layout.WGMMA) for w in (width, value_width))
            dk, dv = mine.loop(step, tuple(nothing))
            take_turn(steps)
            plgpu.barrier_arrive(done())
            plgpu.barrier_wait(done())
            mine.store(dk * scores.scale, shared.k.at[me], dk_ref, rows)
            mine.store(dv, shared.v.at[me], dv_ref, rows)

        # Whole parts of `columns`: where they come out uneven the consumer of values takes more.
        half = -(-width // (2 * columns)) * columns

        def values() -> None:
            p_full, p_free = handed
            plgpu.set_max_registers(hopper.REGISTERS[CONSUMERS][0], action="increase")
            rows = pl.ds(mine.first, ROWS)
            mine.start(rows, shared, 0)
            plgpu.barrier_wait(shared.k_full.at[0])

            def share_before(i: jax.Array) -> None:
                """Adds the share of the step before: a step late, so as not to wait for the other's slopes at once."""

                @pl.when(i > 0)
                def _() -> None:
                    plgpu.barrier_wait(slopes_full.at[lax.rem(i - 1, 2)])
                    share(i - 1, 0, half)

            def step(i: jax.Array, dv: jax.Array, *, mask: bool) -> jax.Array:
                visible = mine.again(i).seen(i, rows) if mask else None
                slot = q_ring.wait(i)
                raw = hopper.product(shared.k.at[hopper.within_loop(0, i)], shared.q.at[slot].transpose((1, 0)))
                p, slope = scores.probabilities(raw, mine.per_query(shared.lse, slot), visible)
                hand = lax.rem(i, 2)

                @pl.when(i >= 2)
                def _() -> None:
                    plgpu.barrier_wait(p_free.at[hand])

                slopes_smem[hand, 0] = slope.astype(dtype)
                plgpu.commit_smem()
                plgpu.barrier_arrive(p_full.at[hand])
                # Not before the fence, as not only products have read from the slot.
                q_ring.release(i)
                narrow = p.astype(dtype)
                dout_slot = dout_ring.wait(i)
                dv = hopper.accumulate(lambda ref: hopper.matmul_into(ref, narrow, shared.dout.at[dout_slot]), dv)
                dout_ring.release(i)
                share_before(i)
                return dv

            dv = mine.loop(step, hopper.filled((ROWS, value_width), 0.0, plgpu.Layout.WGMMA))
            share_before(steps)
            plgpu.barrier_arrive(done())

            def drain(i: jax.Array, _: Any) -> None:
                plgpu.barrier_wait(p_free.at[lax.rem(i, 2)])

            # Once all is handed over the other consumer needs the values no more, whose place dv takes.
            lax.fori_loop(jnp.maximum(steps - 2, 0), steps, drain, None)
            plgpu.barrier_wait(shared.v_full.at[0])
            mine.store(dv, shared.v.at[0], dv_ref, rows)

        def keys_only() -> None:
            p_full, p_free = handed
            plgpu.set_max_registers(hopper.REGISTERS[CONSUMERS][0], action="increase")
            plgpu.barrier_wait(shared.v_full.at[0])
            plgpu.barrier_wait(shared.k_full.at[0])

            def step(i: jax.Array, dk: jax.Array) -> jax.Array:
                slot = dout_ring.wait(i)
                change = hopper.product(shared.v.at[hopper.within_loop(0, i)], shared.dout.at[slot].transpose((1, 0)))
                change = change - mine.per_query(shared.delta, slot)
                hand = lax.rem(i, 2)
                plgpu.barrier_wait(p_full.at[hand])
                slope = hopper.load(slopes_smem.at[hand, 0], plgpu.Layout.WGMMA)
                change = (slope.astype(jnp.float32) * change).astype(dtype)
                # In place: the slopes of the scores where those of the probabilities were.
                slopes_smem[hand, 0] = change
                plgpu.commit_smem()
                plgpu.barrier_arrive(slopes_full.at[hand])
                # Not before the fence, as not only products have read from the slot.
                dout_ring.release(i)
                q_slot = q_ring.wait(i)
                dk = hopper.accumulate(lambda ref: hopper.matmul_into(ref, change, shared.q.at[q_slot]), dk)
                q_ring.release(i)
                share(i, half, width)
                plgpu.barrier_arrive(p_free.at[hand])
                return dk

            dk = lax.fori_loop(0, steps, step, hopper.filled((ROWS, width), 0.0, plgpu.Layout.WGMMA))
            plgpu.barrier_wait(done())
            mine.store(dk * scores.scale, shared.k.at[0], dk_ref, pl.ds(mine.first, ROWS))

        if split:
            pl.when(me == 0)(values)
            pl.when(me == 1)(keys_only)
        else:
            pl.when(me < CONSUMERS)(both)

    handed = (plgpu.Barrier(num_barriers=2), plgpu.Barrier(num_barriers=2))
    run = hopper.kernel(
        body,
        name="attention_dqkv",
        out_type=(jax.ShapeDtypeStruct(k.shape, dtype), jax.ShapeDtypeStruct(v.shape, dtype)),
        grid=(batch * kv_heads * tiles,),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        scratch_types=(
            Shared.types(k, v, split=split, block=BLOCK, stages=stages, dout_stages=dout_stages),
            hopper.tiles((2, owners, ROWS, BLOCK), dtype),
            hopper.tiles((CONSUMERS, BLOCK, columns), jnp.float32),
            plgpu.Barrier(num_arrivals=owners, num_barriers=3),
            *(handed if split else ()),
        ),
    )
    ranges = query_tiles(of, BLOCK, tile)
    operands = (q, k, v, dout, lse, delta, of.positions, of.low, of.high, ranges)
    (dk, dv), dq = sums.with_sum(run, q.shape, tiles)(*operands)
    return (dq * scores.scale).astype(dtype), dk, dv
