"""What a pool that is too small is answered with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvjax.cache.pages import Shortage
from kvjax.cache.state import Cache
from kvjax.errors import OutOfPages


def out_of_pages(shortage: Shortage, cache: Cache, what: str) -> OutOfPages | None:
    """The exception a shortage calls for, or None; waits for the device."""
    needed, available = np.asarray(shortage.needed), np.asarray(shortage.available)
    short = np.flatnonzero(needed > available)
    if not short.size:
        return None
    group = cache.groups[short[0]]
    return OutOfPages(
        f"{what} need {needed[short[0]]} more pages of {group.layout.page_size} slots, but {available[short[0]]} of "
        f"{group.num_pages} are free ({group.layout.policy!r}, layers {span(group.layout.layers)}); "
        "raise CacheConfig.num_pages or memory_bytes, shorten or split the batch, or choose a smaller policy",
        needed=int(needed[short[0]]),
        available=int(available[short[0]]),
    )


def span(layers: Sequence[int]) -> str:
    """Layers as people write them."""
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}..{layers[-1]}"
