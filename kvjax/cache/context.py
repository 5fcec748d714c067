"""The encoded context of sequences, in pages of their own: put there once, read by every step, never grown."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.cache.codecs import Encoded
from kvjax.cache.layout import GroupLayout
from kvjax.cache.pages import reserve
from kvjax.cache.policies.protocol import EMPTY
from kvjax.cache.state import Cache, Group, empty_group
from kvjax.cache.write import write


def context_group(layout: GroupLayout, totals: jax.Array, pages: tuple[int, int]) -> Group:
    """A group in which totals int32[B] slots of each sequence are taken and their pages reserved, still to be written.

    Args:
      pages: (pages per row, pages in the pool), enough for `totals`.
    """
    group = empty_group(layout, totals.shape[0], *pages)
    reserved, _ = reserve(Cache((group,), jnp.zeros_like(totals)), totals)
    (group,) = reserved.groups
    order = jnp.arange(group.position.shape[2], dtype=jnp.int32)
    position = jnp.where(order < totals[:, None], order, EMPTY)
    return dataclasses.replace(group, length=totals[None], position=position[None])


def write_chunks(group: Group, encoded: Encoded, owner: jax.Array, start: jax.Array, count: jax.Array) -> Group:
    """Stores chunks, leaves [N, T, 1, ...]: the first count[i] tokens of chunk i from slot start[i] of owner[i] on.

    owner, start, count int32[N]; chunks of one sequence may come in any order. A chunk with count 0 stores nothing.
    """
    order = jnp.arange(encoded.values.shape[1], dtype=jnp.int32)
    slots = jnp.where(order < count[:, None], start[:, None] + order, EMPTY)
    # Each chunk writes as if it were a sequence that holds its owner's pages.
    view = dataclasses.replace(group, table=group.table[:, owner])
    return dataclasses.replace(write(view, 0, slots[None], encoded, None), table=group.table)
