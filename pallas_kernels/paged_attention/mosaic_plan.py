"""How a paged read is cut for one Hopper GPU: blocks, warpgroups, stages, splits. Everything here is static."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from pallas_kernels.paged_attention.reference import codes_per_byte

SHARED_MEMORY = 232448
"""Bytes of shared memory a thread block may have."""
BLOCK = 64
"""Slots of a block: the columns of a score tile."""
ROWS = 64
"""Query rows of one warpgroup's product."""
CONSUMERS = 2
"""Warpgroups that compute, beside the one that copies: more would leave none enough registers for its sums."""
PROCESSORS = 132
"""Streaming multiprocessors of an H100 or H200."""
MARGIN = 5120
"""Shared memory for barriers, reductions and alignment."""
MOST_STAGES = 6
CODES_AT_ONCE = 32
"""Bytes of several codes converted at a time: a tile's columns, and no wider than the channels that share a scale."""
MOST_WEIGHED = 128
"""Query rows whose weights one thread block sums; their scores are float32 in registers."""
OVERHEAD = 4
"""What starting and finishing a thread block costs, in blocks of slots."""

Share = Literal["blocks", "rows", "columns"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """One kernel's shape.

    Attributes:
      share: what the consumers divide among them. "blocks": each takes every other block of slots with all query rows
        (decoding), and leaves a partial result of its own; "rows": each has query rows of its own (a chunk);
        "columns": each has value columns of its own (values inside keys, and wide ones that are codes).
      consumers: warpgroups that compute, beside the one that copies.
      rows: query rows of a thread block, a multiple of 8. tiles: how many such cover all rows.
      stages: blocks in flight. splits: thread blocks that share one sequence.
      page, width, value_width: slots of a page, channels of a key and of a value.
      shared_rows: one table row serves all heads.
      packed: codes in a byte of the pools, which then have scales and minima; 1: none share one.
      k_groups, v_groups: into which a vector's channels fall that share those; 0: each channel of a page has its own.
    """

    share: Share
    consumers: int
    rows: int
    tiles: int
    stages: int
    splits: int
    page: int
    width: int
    value_width: int
    shared_rows: bool
    packed: int = 1
    k_groups: int = 0
    v_groups: int = 0

    def groups(self, name: str) -> int:
        """`k_groups` or `v_groups`."""
        return self.k_groups if name == "k" else self.v_groups

    def scales_of_page(self, name: str) -> tuple[int, int]:
        """The shape in which one page's part of a block has its scales copied, and as many minima: contiguous rows."""
        groups, width = self.groups(name), self.width if name == "k" else self.value_width
        return (groups, min(self.page, BLOCK)) if groups else (1, width)

    @property
    def parts(self) -> int:
        """Partial results to merge."""
        return self.splits * (self.consumers if self.share == "blocks" else 1)

    @property
    def finished(self) -> bool:
        """Whether the kernel's result is final, and goes out in the queries' dtype by way of their place."""
        return self.share == "rows" and self.splits == 1 and self.width == self.value_width

    @property
    def columns(self) -> int:
        """Value columns of one consumer."""
        return self.value_width // (self.consumers if self.share == "columns" else 1)

    @property
    def per_block(self) -> int:
        """Pages of a block; 1 where a page is a block or more."""
        return max(BLOCK // self.page, 1)

    @property
    def held_rows(self) -> int:
        """Query rows in shared memory: whole products' worth."""
        return -(-self.rows // ROWS) * ROWS


def splits_for(items: int, blocks: int) -> int:
    """Into how many shares to cut each of `items` sequences of `blocks` blocks, to end soonest on all processors."""

    def rounds(splits: int) -> int:
        return -(-items * splits // PROCESSORS) * (-(-blocks // splits) + OVERHEAD)

    return min(range(1, max(min(blocks, PROCESSORS), 1) + 1), key=lambda splits: (rounds(splits), splits))


def attention_plan(
    q: Any,
    k_pool: Any,
    v_pool: Any,
    block_table: Any,
    value_dim: int | None,
    *,
    k_scale: Any = None,
    v_scale: Any = None,
    stages: int | None = None,
    splits: int | None = None,
) -> Plan:
    """The plan of `paged_attention`; its arguments as there, of which only shapes and dtypes count.

    Raises:
      ValueError: `stages` do not fit in shared memory, or are no multiple of the consumers that take turns with them.
    """
    batch, tokens, heads, width = q.shape
    page, entries = k_pool.shape[3], block_table.shape[2]
    kv_heads = max(block_table.shape[1], k_pool.shape[2])
    rows = tokens * heads // kv_heads
    share: Share
    packed = codes_per_byte(q, k_pool)
    columns = value_dim if v_pool is None else v_pool.shape[-1] * packed
    assert columns is not None
    if v_pool is None or (k_pool.dtype.itemsize == 1 and columns > 128):
        # Converting codes beside the sums of all columns takes more registers than there are.
        share, held = "columns", ROWS
    elif rows <= ROWS:
        share, held = "blocks", -(-rows // 8) * 8
    else:
        share, held = "rows", CONSUMERS * ROWS
    once, stage = _attention_memory(held, width, columns, q.dtype, k_pool.dtype, in_key=v_pool is None)
    groups = (0, 0) if packed == 1 else (groups_of(k_pool, k_scale), groups_of(v_pool, v_scale))
    if packed > 1:
        stage = BLOCK * (width + columns) // packed + BLOCK * 4
        for count, channels in zip(groups, (width, columns), strict=True):
            stage += 4 * (BLOCK * count if count else max(BLOCK // page, 1) * channels)
    tiles = -(-rows // held)
    blocks = -(-entries * page // BLOCK)
    return Plan(
        share=share,
        consumers=CONSUMERS,
        rows=held,
        tiles=tiles,
        stages=_stages(share, once, stage, stages),
        splits=splits_for(batch * kv_heads * tiles, blocks) if splits is None else splits,
        page=page,
        width=width,
        value_width=columns,
        shared_rows=kv_heads == k_pool.shape[2],
        packed=packed,
        k_groups=groups[0],
        v_groups=groups[1],
    )


def groups_of(pool: Any, scale: Any) -> int:
    """Groups of channels with a scale of their own beside each vector of a pool; 0: each channel of a page has one."""
    return 0 if scale is None or scale.shape[3] != pool.shape[3] else int(scale.shape[4])


def weights_plan(q: Any, k_pool: Any, block_table: Any, *, splits: int | None = None) -> Plan:
    """The plan of `paged_weights`: slots are a product's rows, and query rows its columns."""
    batch, tokens, heads, width = q.shape
    page, entries = k_pool.shape[3], block_table.shape[2]
    kv_heads = max(block_table.shape[1], k_pool.shape[2])
    rows = tokens * heads // kv_heads
    held = min(-(-rows // 8) * 8, MOST_WEIGHED)
    stage = BLOCK * (width * k_pool.dtype.itemsize + 8)
    while held > 8 and held * width * q.dtype.itemsize + 2 * stage > SHARED_MEMORY - MARGIN:
        held = -(-held // 16) * 8
    tiles = -(-rows // held)
    blocks = -(-entries * page // BLOCK)
    return Plan(
        share="blocks",
        consumers=CONSUMERS,
        rows=held,
        tiles=tiles,
        stages=_stages("blocks", held * width * q.dtype.itemsize, stage, None),
        splits=splits_for(batch * kv_heads * tiles, blocks) if splits is None else splits,
        page=page,
        width=width,
        value_width=0,
        shared_rows=kv_heads == k_pool.shape[2],
    )


def _attention_memory(
    rows: int, width: int, value_width: int, dtype: Any, stored: Any, *, in_key: bool
) -> tuple[int, int]:
    """Bytes of shared memory that a thread block needs once, and for each block in flight."""
    item, code = jnp.dtype(dtype).itemsize, jnp.dtype(stored).itemsize
    once = -(-rows // ROWS) * ROWS * width * item
    stage = BLOCK * (width if in_key else width + value_width) * code + BLOCK * 4
    if rows < ROWS:
        once += CONSUMERS * ROWS * BLOCK * 4
    if code == 1:
        once += CONSUMERS * BLOCK * max(width, value_width) * item
        stage += 2 * BLOCK * 4
    return once, stage


def _stages(share: Share, once: int, stage: int, wanted: int | None) -> int:
    """Blocks in flight: those wanted, or as many as fit; below 2 the call cannot be served.

    Consumers that take turns need a multiple of their number: a stage then always serves the same one, and each
    warpgroup counts a barrier's phases by its own waits.
    """
    most = (SHARED_MEMORY - MARGIN - once) // stage
    turns = CONSUMERS if share == "blocks" else 1
    stages = min(most, MOST_STAGES) if wanted is None else wanted
    if wanted is not None and (wanted > most or wanted % turns):
        raise ValueError(f"{wanted} stages: at most {most} fit, and they must be a multiple of {turns}")
    return stages - stages % turns
