"""How many pages a call needs, and how big a table and a pool it is given.

Sizes round up to powers of two, so that calls of many lengths share few compilations.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvjax.cache.layout import GroupLayout
from kvjax.errors import ConfigError

SMALLEST_CONTEXT = 128


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def context_bucket(tokens: int) -> int:
    """The context a table is made for when a sequence may grow to `tokens` tokens."""
    return power_of_two(max(tokens, SMALLEST_CONTEXT))


def size_groups(
    layouts: Sequence[GroupLayout], batch: int, tokens: int, memory_bytes: int | None
) -> tuple[tuple[int, int], ...]:
    """(pages per row, pages in the pool) of each group, for `batch` sequences of up to `tokens` tokens.

    A pool whose size nobody fixed holds the whole batch at the bucketed context. With `memory_bytes` the pools share
    that much memory, each in proportion to what it would need.

    Raises:
      ConfigError: the memory does not hold one page per row of one sequence.
    """
    context = context_bucket(tokens)
    rows = [layout.pages_per_row(context) for layout in layouts]
    needed = [batch * layout.rows * n for layout, n in zip(layouts, rows, strict=True)]
    pools = [layout.num_pages or pages for layout, pages in zip(layouts, needed, strict=True)]
    if memory_bytes is not None:
        beside = batch * sum(layout.tail_bytes for layout in layouts)
        total = sum(layout.page_bytes * pages for layout, pages in zip(layouts, needed, strict=True))
        pools = [max(pages * (memory_bytes - beside) // total, 0) for pages in needed]
        least = [layout.rows for layout in layouts]
        if any(pool < floor for pool, floor in zip(pools, least, strict=True)):
            smallest = beside - (-total * max(f / n for f, n in zip(least, needed, strict=True)) // 1)
            raise ConfigError(
                f"CacheConfig.memory_bytes={memory_bytes} holds no page per row of one sequence; "
                f"give at least {int(smallest)} bytes, or a smaller page_size"
            )
    return tuple(zip(rows, pools, strict=True))
