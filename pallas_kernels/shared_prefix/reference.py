"""Attention over a prefix and own pages in plain jnp: the two tables put together, as if nothing were shared."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention import reference


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
    **scales: Any,
) -> tuple[jax.Array, jax.Array]:
    """See `api.shared_prefix`. Each sequence reads all of its prefix itself."""
    tokens, page = q.shape[1], k_pool.shape[3]
    of = jnp.maximum(group, 0)
    held = jnp.where((group >= 0)[:, None], prefix_lengths[of], 0)
    slots = jnp.arange(prefix_table.shape[2] * page)
    first = jnp.broadcast_to(slots, (*held.shape, slots.size)) if prefix_positions is None else prefix_positions[of]
    first = jnp.where(slots < held[..., None], first, -1)
    before = jnp.max(held, axis=1)
    slots = jnp.arange(block_table.shape[2] * page)
    second = jnp.broadcast_to(before[:, None, None] + slots, (*lengths.shape, slots.size))
    second = jnp.where(slots < lengths[..., None], second if positions is None else positions, -1)
    if q_positions is None:
        q_positions = (before + jnp.max(lengths, axis=1))[:, None] - tokens + jnp.arange(tokens)
    where = jnp.concatenate([first, second], axis=2)
    return reference.paged_attention(
        q,
        k_pool,
        v_pool,
        jnp.concatenate([prefix_table[of], block_table], axis=2),
        jnp.full(lengths.shape, where.shape[2], jnp.int32),
        layer=layer,
        positions=where,
        q_positions=q_positions,
        window=window,
        soft_cap=soft_cap,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        value_dim=value_dim,
        **{**dict.fromkeys(("k_scale", "k_min", "v_scale", "v_min")), **scales},
    )
