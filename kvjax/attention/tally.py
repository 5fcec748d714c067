"""A prompt's attention for policies that need its rows one by one, not their sum."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.cache.policies.optional import Rows, add_rows, counts_rows
from kvjax.cache.policies.protocol import Policy, RowState
from pallas_kernels.softmax import heads_grouped, probabilities, scores, visible

ROWS = 8
"""Rows made at a time: of each, weights of all heads over the whole prompt."""


def tallied(
    policy: Policy,
    tally: RowState,
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array,
    queries: jax.Array,
    keys: jax.Array,
    lengths: jax.Array,
    window: int | None,
    soft_cap: float | None,
) -> RowState:
    """The tally with a chunk's rows in it.

    Args:
      q: [B, T, H, D] and k: [B, S, K, D], rotated, at queries int32[B, T] and keys int32[B, S] (-1: padding).
      lse: float32[B, T, H], of the whole row.
      lengths: int32[B], prompt lengths.
    """
    chunk, kv_heads = q.shape[1], k.shape[2]
    heads, width = q.shape[2] // kv_heads, q.shape[3]
    some = min(ROWS, chunk)
    blocks = -(-chunk // some)
    by_head = jnp.swapaxes(k, 1, 2)

    def block(tally: RowState, start: jax.Array) -> tuple[RowState, None]:
        # The last block may begin early: rows that an earlier one has had are padding in it.
        first = jnp.minimum(start, chunk - some)

        def cut(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, first, some, axis=1)

        again = first + jnp.arange(some) < start
        where = jnp.where(again, -1, cut(queries))

        def add(tally: RowState) -> RowState:
            seen = visible(keys, where, window)
            masked = jnp.where(seen[:, None, None], scores(cut(q), by_head, width**-0.5, soft_cap), -jnp.inf)
            weights = jnp.sum(probabilities(masked, heads_grouped(cut(lse), kv_heads)), axis=2)
            return add_rows(policy, tally, Rows(jnp.moveaxis(weights, 1, 0), seen, where, keys, lengths, heads))

        wanted = jnp.any(counts_rows(policy, where, lengths))
        return jax.lax.cond(wanted, add, lambda same: same, tally), None

    return jax.lax.scan(block, tally, jnp.arange(blocks) * some)[0]
