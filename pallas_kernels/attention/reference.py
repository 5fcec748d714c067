"""Dense attention in plain jnp: the definition of right, and the path on CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.softmax import column_weights, softmax_attention, visible


def unsupported(**call: object) -> str | None:
    """Serves every call."""
    return None


def _mask(
    q: jax.Array,
    k: jax.Array,
    causal: bool,
    window: jax.Array | int | None,
    lengths: jax.Array | None,
    segment_ids: jax.Array | None,
    positions: jax.Array | None,
    q_positions: jax.Array | None,
) -> jax.Array:
    """bool[B or 1, 1, 1, T, S]."""
    slots = jnp.arange(k.shape[1])[None]
    keys = slots if positions is None else positions
    # Queries line up with the last keys, so that T < S continues a text.
    queries = jnp.arange(q.shape[1])[None] + (k.shape[1] - q.shape[1]) if q_positions is None else q_positions
    if causal:
        mask = visible(keys, queries, window)
    else:
        mask = (keys[:, None, :] >= 0) & (queries[:, :, None] >= 0)
    if lengths is not None:
        mask = mask & (slots < lengths[:, None])[:, None, :]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return mask[:, None, None]


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    window: jax.Array | int | None,
    soft_cap: float | None,
    lengths: jax.Array | None,
    segment_ids: jax.Array | None,
    positions: jax.Array | None,
    q_positions: jax.Array | None,
    scale: float,
    deterministic: bool,
) -> tuple[jax.Array, jax.Array]:
    """See `api.attention`."""
    mask = _mask(q, k, causal, window, lengths, segment_ids, positions, q_positions)
    keys, values = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    if lengths is not None or positions is not None:
        # Padding may hold anything, NaN too: a weight of 0 does not silence one, nor, going back, does a slope of 0.
        seen = jnp.any(mask, axis=3)[..., None]  # [B, 1, 1, S, 1]
        keys, values = (jnp.where(seen[:, 0], x, 0) for x in (keys, values))
    return softmax_attention(q, keys, values, mask, scale, soft_cap)


def attention_weights(
    q: jax.Array,
    k: jax.Array,
    *,
    lse: jax.Array,
    row_weights: jax.Array,
    window: jax.Array | int | None,
    soft_cap: float | None,
    positions: jax.Array | None,
    q_positions: jax.Array | None,
    scale: float,
) -> jax.Array:
    """See `api.attention_weights`."""
    mask = _mask(q, k, True, window, None, None, positions, q_positions)
    return column_weights(q, jnp.swapaxes(k, 1, 2), mask, lse, row_weights, scale, soft_cap)
