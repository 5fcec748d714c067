"""Packing sequences that share a prefix into tiles, so that one product serves several of them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packing:
    """Tiles of at most `sharers` sequences, all of one group.

    Attributes:
      members: int32[tiles, sharers], the sequence in each place, -1 is none.
      group: int32[tiles], whose prefix the tile reads; 0 for a tile without members.
      tile, place: int32[B], where each sequence is; 0 for those of no group.
    """

    members: jax.Array
    group: jax.Array
    tile: jax.Array
    place: jax.Array


def tiles_at_most(batch: int, groups: int, sharers: int) -> int:
    """The most tiles that `batch` sequences in `groups` groups can need: every group may leave one tile unfilled."""
    return max(min(batch, (batch + groups * (sharers - 1)) // sharers), 1)


def pack(group: jax.Array, groups: int, sharers: int) -> Packing:
    """Packs the sequences of group int32[B], -1 being none. Which group has how many sequences may change freely."""
    batch = group.shape[0]
    count = tiles_at_most(batch, groups, sharers)
    shares = group >= 0
    members = jnp.sum(group[None, :] == jnp.arange(groups)[:, None], axis=1)
    needed = (members + sharers - 1) // sharers
    first = jnp.cumsum(needed) - needed
    rank = jnp.sum(jnp.tril(group[:, None] == group[None, :], -1), axis=1)
    tile, place = first[jnp.maximum(group, 0)] + rank // sharers, rank % sharers
    # Beyond the last tile: dropped.
    filled = jnp.full((count, sharers), -1, jnp.int32)
    filled = filled.at[jnp.where(shares, tile, count), place].set(jnp.arange(batch, dtype=jnp.int32), mode="drop")
    return Packing(
        members=filled,
        group=jnp.where(filled[:, 0] >= 0, group[jnp.maximum(filled[:, 0], 0)], 0),
        tile=jnp.where(shares, tile, 0),
        place=jnp.where(shares, place, 0),
    )
