"""What a live cache takes, read from its arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache.state import Cache, Group

BOOKKEEPING = frozenset(
    {"table", "length", "position", "victim", "row_state", "settled", "missing", "free", "top", "refs"}
    | {"peak", "copied", "shared", "tables"}
)
"""Fields of a group that say where tokens are, or how they are coded.

Whatever else it holds is, or stands for, keys and values.
"""


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes of a live cache.

    Attributes:
      held: per sequence, of the pages in use and of what is kept beside them, scales included.
      pool: allocated for the whole batch: sizes that nobody fixed round up to powers of two.
      bookkeeping: per sequence, tables, positions and scores.
      read: per sequence, what one decoding step reads of `held`.
    """

    held: int
    pool: int
    bookkeeping: int
    read: int


def footprint_of(cache: Cache, sequences: int) -> Footprint:
    """The footprint of a cache that holds so many sequences."""
    groups = (*cache.groups, *cache.context)
    held = sum(map(_held, groups)) + cache.recurrent_bytes
    pool = sum(_bytes(list(_stored(group).values())) for group in groups) + cache.recurrent_bytes
    told = sum(map(_bytes, groups)) + cache.recurrent_bytes - pool
    read = sum(map(_read, groups)) + cache.recurrent_bytes
    return Footprint(round(held / sequences), pool, round(told / sequences), round(read / sequences))


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))


def _stored(group: Group) -> dict[str, Any]:
    """The fields that are not bookkeeping."""
    names = [field.name for field in dataclasses.fields(group) if not field.metadata.get("static")]
    return {name: getattr(group, name) for name in names if name not in BOOKKEEPING}


def _held(group: Group) -> float:
    """Bytes of the pages in use, and all bytes of what does not lie in pages."""
    share = int(group.used) / group.num_pages
    leaves = jax.tree.leaves(_stored(group))
    paged = [leaf for leaf in leaves if leaf.ndim and leaf.shape[0] == group.num_pages]
    return share * _bytes(paged) + _bytes(leaves) - _bytes(paged)


def _read(group: Group) -> float:
    """Bytes one step reads: pages in whole, or of each what the select picks and picks by; and what lies in no page.

    Block tables and positions are not counted.
    """
    layout = group.layout
    spec, size = layout.spec, layout.page_size
    itemsize = jnp.dtype(layout.dtype).itemsize
    lengths = np.asarray(group.length)
    read = 0
    for pages in (-(-lengths // size)).reshape(-1).tolist():
        entries, state = pages * size, 0
        if layout.select is not None and not layout.select.covers(pages, size):
            entries, state = layout.select.cost(pages, size, spec.key_dim, spec.value_dim, itemsize)
        read += entries * layout.bytes_per_vector_pair + state
    return layout.layers_per_page * layout.heads_per_page * read + _bytes(group.tail)
