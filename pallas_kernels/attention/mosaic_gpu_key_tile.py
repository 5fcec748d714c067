"""What kernels that work by tiles of keys over the queries that see them have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.attention.mosaic_gpu_scores import ROWS
from pallas_kernels.attention.ring import Ring, barriers, ring
from pallas_kernels.attention.walk import Walk, place

CONSUMERS = 2


def key_tile(split: bool) -> int:
    """Keys of a thread block."""
    return ROWS if split else CONSUMERS * ROWS


class Inputs(NamedTuple):
    """The operands of such a kernel, in global memory: as `key_value_gradients` takes them, and the ranges to walk."""

    q: Any
    k: Any
    v: Any
    dout: Any
    lse: Any
    delta: Any
    positions: Any
    low: Any
    high: Any
    ranges: Any


class Shared(NamedTuple):
    """The shared memory of such a kernel and its barriers; what one of them needs beside it comes behind.

    Attributes:
      k, v: of the thread block's keys, a part for each owner. q, lse, dout, delta: rings of what steps read.
      k_full, v_full: a barrier for each owner. q_ring, dout_ring: those of the rings.
    """

    k: Any
    v: Any
    q: Any
    lse: Any
    dout: Any
    delta: Any
    k_full: Any
    v_full: Any
    q_ring: Any
    dout_ring: Any

    @classmethod
    def types(cls, k: jax.Array, v: jax.Array, *, split: bool, block: int, stages: int, dout_stages: int) -> Shared:
        """What to ask for. `split`: one owner of all keys; `block`: queries of a step; `stages`: steps in flight."""
        owners = 1 if split else CONSUMERS
        width, value_width, dtype = k.shape[3], v.shape[3], k.dtype
        return cls(
            k=hopper.tiles((owners, ROWS, width), dtype),
            v=hopper.tiles((owners, ROWS, value_width), dtype),
            q=hopper.tiles((stages, block, width), dtype),
            lse=plgpu.SMEM((stages, block), jnp.float32),
            dout=hopper.tiles((dout_stages, block, value_width), dtype),
            delta=plgpu.SMEM((dout_stages, block), jnp.float32),
            k_full=plgpu.Barrier(num_barriers=owners),
            v_full=plgpu.Barrier(num_barriers=owners),
            q_ring=barriers(stages, 2, CONSUMERS),
            dout_ring=barriers(dout_stages, 2, CONSUMERS),
        )

    def rings(self, stages: int, dout_stages: int) -> tuple[Ring, Ring]:
        """Those of queries with their log-sum-exps, and of the cotangents of the output with their deltas."""
        return (
            ring((self.q, self.lse), self.q_ring, stages),
            ring((self.dout, self.delta), self.dout_ring, dout_stages),
        )


class KeyTile(NamedTuple):
    """A thread block's keys and the blocks of queries it visits, in all query heads of its KV head.

    Attributes:
      number: of the tile in its sequence. first: its first key. block: queries of a step.
    """

    inputs: Inputs
    b: jax.Array
    kv_head: jax.Array
    group: int
    number: jax.Array
    first: jax.Array
    walk: Walk
    block: int

    @classmethod
    def of_this_block(cls, inputs: Inputs, *, section: int, tiles: int, tile: int, block: int) -> KeyTile:
        """For a grid of one axis, "block"; `section` as in `walk.place`."""
        kv_heads = inputs.k.shape[2]
        group = inputs.q.shape[2] // kv_heads
        head_of_all, number = place(lax.axis_index("block"), section, tiles)
        b, kv_head = lax.div(head_of_all, kv_heads), lax.rem(head_of_all, kv_heads)
        walk = Walk.read(inputs.ranges, b, number, times=group)
        return cls(inputs, b, kv_head, group, number, number * tile, walk, block)

    def again(self, i: jax.Array) -> KeyTile:
        """The same with its walk read anew in step i, for consumers that have no registers to keep it in."""
        walk = Walk.read(self.inputs.ranges, self.b, hopper.within_loop(self.number, i), times=self.group)
        return self._replace(walk=walk)

    def sources(self, i: jax.Array) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """What a step reads: queries with their log-sum-exps, and the cotangents of the output with their deltas."""
        head, rows = self.queries(i)
        x = self.inputs
        return (
            (x.q.at[self.b, rows, head], x.lse.at[self.b, head, rows]),
            (x.dout.at[self.b, rows, head], x.delta.at[self.b, head, rows]),
        )

    def queries(self, i: jax.Array) -> tuple[jax.Array, Any]:
        """The query head of a step, and its rows."""
        of_group, at = self.walk.at(i)
        return self.kv_head * self.group + of_group, pl.ds(at * self.block, self.block)

    def start(self, rows: Any, shared: Shared, owner: Any) -> None:
        """Begins to load the keys and values of `rows` to an owner's part of shared memory."""
        x = self.inputs
        for source, to, full in ((x.k, shared.k, shared.k_full), (x.v, shared.v, shared.v_full)):
            plgpu.copy_gmem_to_smem(source.at[self.b, rows, self.kv_head], to.at[owner], full.at[owner])

    def seen(self, i: jax.Array, rows: Any) -> jax.Array:
        """bool[ROWS, block]: which of the keys in `rows` the queries of a step see."""
        x = self.inputs
        # Positions are read again in every step that needs them: the registers to keep them are not there.
        where = (0 if x.positions.shape[0] == 1 else self.b, rows)
        at = hopper.load(x.positions.at[where], hopper.ROWS, optimized=False)
        here = (0 if x.low.shape[0] == 1 else self.b, pl.ds(self.walk.at(i)[1] * self.block, self.block))
        low, high = (hopper.load(ref.at[here], hopper.COLUMNS, optimized=False) for ref in (x.low, x.high))
        shape = (ROWS, self.block)
        at = hopper.rows_over(at, shape)
        return (at >= hopper.columns_over(low, shape)) & (at <= hopper.columns_over(high, shape))

    def per_query(self, buffer: Any, slot: jax.Array) -> jax.Array:
        """float32[ROWS, block]: a number of each query, from shared memory, for all keys."""
        return hopper.columns_over(hopper.load(buffer.at[slot], hopper.COLUMNS), (ROWS, self.block))

    def loop(self, step: Callable[..., Any], init: Any) -> Any:
        """Runs step(i, carry, mask=) for all blocks, first for those that need no mask."""
        carry = lax.fori_loop(0, self.walk.plain_steps, functools.partial(step, mask=False), init)
        return lax.fori_loop(self.walk.plain_steps, self.walk.steps, functools.partial(step, mask=True), carry)

    def store(self, value: jax.Array, staged: Any, ref: Any, rows: Any) -> None:
        """A gradient of `rows` to global memory, by way of shared memory that nobody reads any more."""
        staged[...] = value.astype(staged.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, ref.at[self.b, rows, self.kv_head])
        plgpu.wait_smem_to_gmem(0)
