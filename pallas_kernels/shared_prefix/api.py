"""Attention over a shared prefix and each sequence's own pages: validation and the two phases."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.merge import merge
from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.shared_prefix.packing import pack
from pallas_kernels.validation import integers, not_empty

ROWS, LEAST_SHARERS = 64, 4
"""Queries of one KV head that a product on Hopper takes at once, and sequences packed whatever that gives."""


def shared_prefix(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array | None,
    prefix_table: jax.Array,
    prefix_lengths: jax.Array,
    group: jax.Array,
    block_table: jax.Array,
    lengths: jax.Array,
    *,
    layer: jax.Array,
    prefix_positions: jax.Array | None = None,
    positions: jax.Array | None = None,
    q_positions: jax.Array | None = None,
    window: jax.Array | int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    value_dim: int | None = None,
    k_scale: jax.Array | None = None,
    k_min: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    v_min: jax.Array | None = None,
    sharers: int | None = None,
    largest: int | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of q over its group's prefix and over its own pages (ChunkAttention, Ye et al. 2024, 2402.15220).

    In the first phase the queries of all sequences of a group are rows of one product with the prefix's pages; in the
    second each reads its own pages; the two are merged by their log-sum-exps. Both phases are `paged_attention`, so
    every backend of that serves here. A group of n sequences reads its prefix ceil(n / sharers) times instead of n
    times, more often where the T * H / K * sharers rows of a KV head exceed what a kernel takes at once.

    Args:
      q: [B, T, H, D], rotated. k_pool, v_pool, layer, window, soft_cap, scale, value_dim and the scales: as
        `paged_attention` takes them.
      prefix_table: int32[G, K or 1, Np]; prefix_lengths: int32[G, K or 1], slots in use, 0 for a prefix of nothing.
      group: int32[B], whose prefix each sequence has, -1: none. Any number of sequences may be in a group.
      block_table: int32[B, K or 1, N] and lengths int32[B, K or 1] of what comes after the prefix.
      prefix_positions: int32[G, K or 1, Np * page], where the prefix's tokens stand, -1 skips a slot; None: the slot's
        own index. positions: int32[B, K or 1, N * page], likewise; None: behind the prefix, in order.
      q_positions: int32[B, T], -1 is padding; None: the last T positions.
      sharers: sequences packed into one product; None: as many as fill 64 rows, at least 4, at most `largest`.
      largest: no group has more sequences; None: one may have all.

    Returns:
      out [B, T, H, Dv] in q's dtype; lse float32[B, T, H]. A query that sees nothing gets 0 and -inf.

    Raises:
      ValueError, NotImplementedError: as `paged_attention`.
    """
    checked = _validate(q, k_pool, prefix_table, prefix_lengths, group, block_table, sharers)
    prefix_table, prefix_lengths, group = checked
    if prefix_positions is not None:
        places = (*prefix_lengths.shape, prefix_table.shape[2] * k_pool.shape[3])
        prefix_positions = integers(prefix_positions, places, "prefix_positions")
    lengths = integers(lengths, block_table.shape[:2], "lengths")
    if q_positions is not None:
        q_positions = integers(q_positions, q.shape[:2], "q_positions")
    batch, tokens, heads, width = q.shape
    kv_heads = max(block_table.shape[1], k_pool.shape[2])
    largest = min(largest or batch, batch)
    if sharers is None:
        sharers = max(ROWS * kv_heads // (tokens * heads), LEAST_SHARERS)
    options: dict[str, Any] = dict(
        layer=layer,
        window=window,
        soft_cap=soft_cap,
        scale=scale,
        value_dim=value_dim,
        k_scale=k_scale,
        k_min=k_min,
        v_scale=v_scale,
        v_min=v_min,
        backend=backend,
    )
    shares = group >= 0
    before = jnp.where(shares, jnp.max(prefix_lengths, axis=1)[jnp.maximum(group, 0)], 0)
    if q_positions is None:
        last = before + jnp.max(lengths, axis=1)
        q_positions = last[:, None] - tokens + jnp.arange(tokens)

    tiles = pack(group, prefix_table.shape[0], min(sharers, largest))
    members, chosen = jnp.maximum(tiles.members, 0), tiles.members >= 0
    asked = jnp.where(chosen[..., None], q_positions[members], -1)
    prefix_out, prefix_lse = paged_attention(
        q[members].reshape(members.shape[0], -1, heads, width),
        k_pool,
        v_pool,
        prefix_table[tiles.group],
        jnp.where(chosen[:, :1], prefix_lengths[tiles.group], 0),
        positions=None if prefix_positions is None else prefix_positions[tiles.group],
        q_positions=asked.reshape(members.shape[0], -1),
        **options,
    )

    def unpacked(x: jax.Array, nothing: float) -> jax.Array:
        """[tiles, sharers * T, ...] -> [B, T, ...]."""
        own = x.reshape(*members.shape, tokens, *x.shape[2:])[tiles.tile, tiles.place]
        return jnp.where(shares.reshape(-1, *(1,) * (own.ndim - 1)), own, jnp.asarray(nothing, own.dtype))

    # Without positions a slot's index is its position, and a query stands as far behind its own pages' first slot.
    behind = q_positions if positions is not None else jnp.maximum(q_positions - before[:, None], -1)
    own_out, own_lse = paged_attention(
        q, k_pool, v_pool, block_table, lengths, positions=positions, q_positions=behind, **options
    )
    return merge(jnp.stack([unpacked(prefix_out, 0.0), own_out]), jnp.stack([unpacked(prefix_lse, -jnp.inf), own_lse]))


def _validate(
    q: jax.Array,
    k_pool: jax.Array,
    prefix_table: jax.Array,
    prefix_lengths: jax.Array,
    group: jax.Array,
    block_table: jax.Array,
    sharers: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The prefixes' table and lengths and the groups as int32. What `paged_attention` checks too is left to it."""
    if q.ndim != 4 or k_pool.ndim != 5 or prefix_table.ndim != 3 or block_table.ndim != 3:
        raise ValueError(
            "shared_prefix takes q[B,T,H,D], pools [P,layers,heads,page,D], prefix_table[G,K or 1,Np] and "
            f"block_table[B,K or 1,N]; got {q.shape}, {k_pool.shape}, {prefix_table.shape} and {block_table.shape}"
        )
    if sharers is not None and sharers < 1:
        raise ValueError(f"sharers must be at least 1, got {sharers}")
    not_empty({"q": q, "k_pool": k_pool, "prefix_table": prefix_table, "block_table": block_table})
    # As many rows as block_table has.
    groups, rows = prefix_table.shape[0], block_table.shape[1]
    return (
        integers(prefix_table, (groups, rows, prefix_table.shape[2]), "prefix_table"),
        integers(prefix_lengths, (groups, rows), "prefix_lengths"),
        integers(group, (q.shape[0],), "group"),
    )
