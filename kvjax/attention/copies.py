"""Copies of one sequence read the pages they have in common once (ChunkAttention, Ye et al. 2024, 2402.15220)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.attention.sharded import PAGED
from kvjax.partition import partitioned
from pallas_kernels import shared_prefix

LEAST_COPIES, LEAST_SLOTS = 4, 512
"""Below either, two phases and their merge cost more than they save (`scripts/benchmark_forks.py`, on a CPU)."""


def worth_sharing(copies: int, slots: int) -> bool:
    """Whether `copies` sequences of up to `slots` slots read what they have in common in a phase of its own.

    Decided from sizes that are static, never from what is held, so that no length of a prompt compiles anything new.
    """
    return copies >= LEAST_COPIES and slots >= LEAST_SLOTS


def _attend_copies(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array | None,
    block_table: jax.Array,
    lengths: jax.Array,
    *,
    copies: int,
    layer: jax.Array,
    q_positions: jax.Array,
    positions: None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    value_dim: int | None = None,
    k_scale: jax.Array | None = None,
    k_min: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    v_min: jax.Array | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`paged_attention` of slots in order, where `copies` sequences side by side may hold the same first pages.

    Which pages those are is looked up in the table, so that forks, pages copied on write and beams that change places
    need no bookkeeping. A batch that is no multiple of `copies` ends in a smaller group.

    Args:
      q: [B, T, H, D]; block_table int32[B, K or 1, N]; lengths int32[B, K or 1]; all else as `paged_attention`.

    Returns:
      out [B, T, H, Dv] in q's dtype; lse float32[B, T, H].
    """
    del positions  # a slot's own index
    batch, page = q.shape[0], k_pool.shape[3]
    group = jnp.arange(batch) // copies
    common = common_pages(block_table, lengths // page, copies)
    shared = common[group][:, None]
    place = jnp.broadcast_to(jnp.arange(block_table.shape[2]) + shared[..., None], block_table.shape)
    own = jnp.take_along_axis(block_table, jnp.minimum(place, block_table.shape[2] - 1), axis=2)
    return shared_prefix(
        q,
        k_pool,
        v_pool,
        block_table[::copies],
        jnp.broadcast_to(common[:, None] * page, (common.shape[0], block_table.shape[1])),
        group,
        own,
        jnp.maximum(lengths - shared * page, 0),
        layer=layer,
        q_positions=q_positions,
        window=window,
        soft_cap=soft_cap,
        value_dim=value_dim,
        k_scale=k_scale,
        k_min=k_min,
        v_scale=v_scale,
        v_min=v_min,
        largest=copies,
        backend=backend,
    )


# Whole: what sequences have in common each device finds among its own.
attend_copies = partitioned(_attend_copies, PAGED, ("BTH", "BTH"))


def common_pages(block_table: jax.Array, whole: jax.Array, copies: int) -> jax.Array:
    """How many first pages all of each `copies` sequences have in common, in every row: int32[G].

    Where a sequence's own pages begin is a position, the same for all its rows.

    Args:
      block_table: int32[B, K or 1, N], -1 is no page. whole: int32[B, K or 1], pages each sequence has filled.
    """
    batch, _, entries = block_table.shape
    missing = -batch % copies
    # A last group that is short is filled up with its last member.
    members = jnp.minimum(jnp.arange(batch + missing), batch - 1).reshape(-1, copies)
    first = members[:, :1]
    alike = jnp.all((block_table[members] == block_table[first]) & (block_table[first] >= 0), axis=1)
    filled = jnp.arange(entries) < jnp.min(whole[members], axis=1)[..., None]
    return jnp.min(jnp.sum(jnp.cumprod(alike & filled, axis=2), axis=2, dtype=jnp.int32), axis=1)
