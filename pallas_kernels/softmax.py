"""The arithmetic both reference operations share: masked scores and a softmax that may see nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def visible(positions: jax.Array, q_positions: jax.Array, window: jax.Array | int | None) -> jax.Array:
    """positions int32[..., S], q_positions int32[..., T] -> bool[..., T, S].

    A slot is visible iff 0 <= position <= q_position and q_position - position < window. A query at -1 sees none.
    """
    distance = q_positions[..., :, None] - positions[..., None, :]
    mask = (positions[..., None, :] >= 0) & (distance >= 0)
    return mask if window is None else mask & (distance < window)


def scores(q: jax.Array, k: jax.Array, scale: float, soft_cap: float | None) -> jax.Array:
    """q [B, T, H, D], k [B, K, S, D] -> float32[B, K, G, T, S], scaled; query head h reads KV head h // G."""
    batch, tokens, heads, width = q.shape
    kv_heads, slots = k.shape[1:3]
    # Plain batched matrices: given more axes, the compiler transposes the keys, the larger side, for every product.
    rows = jnp.moveaxis(q.reshape(batch, tokens, kv_heads, -1, width), 1, 3).reshape(batch, kv_heads, -1, width)
    result = scale * jnp.einsum("bkmd,bksd->bkms", rows, k, preferred_element_type=jnp.float32)
    result = result.reshape(batch, kv_heads, heads // kv_heads, tokens, slots)
    return result if soft_cap is None else soft_cap * jnp.tanh(result / soft_cap)


def weighted(weights: jax.Array, v: jax.Array) -> jax.Array:
    """weights [B, K, G, T, S], v [B, K, S, Dv] -> float32[B, K, G, T, Dv]."""
    batch, kv_heads, group, tokens, slots = weights.shape
    rows = weights.astype(v.dtype).reshape(batch, kv_heads, group * tokens, slots)
    out = jnp.einsum("bkms,bksd->bkmd", rows, v, preferred_element_type=jnp.float32)
    return out.reshape(batch, kv_heads, group, tokens, v.shape[-1])


def log_sum_exp(masked: jax.Array) -> jax.Array:
    """Over the last axis; -inf where every score is -inf, never NaN."""
    top = jnp.max(masked, axis=-1, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    total = jnp.sum(jnp.exp(masked - top), axis=-1)
    return jnp.log(total) + top[..., 0]


def probabilities(masked: jax.Array, lse: jax.Array) -> jax.Array:
    """exp(masked - lse), 0 where a row sees nothing."""
    return jnp.exp(masked - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None])


def heads_last(x: jax.Array) -> jax.Array:
    """[B, K, G, T, ...] -> [B, T, H, ...]."""
    batch, kv_heads, group, tokens = x.shape[:4]
    return jnp.moveaxis(x, 3, 1).reshape(batch, tokens, kv_heads * group, *x.shape[4:])


def heads_grouped(x: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, H] -> [B, K, G, T]."""
    batch, tokens, heads = x.shape
    return jnp.moveaxis(x.reshape(batch, tokens, kv_heads, heads // kv_heads), 1, 3)


def softmax_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float, soft_cap: float | None
) -> tuple[jax.Array, jax.Array]:
    """q [B,T,H,D], k [B,K,S,D], v [B,K,S,Dv], mask bool like [B,K,G,T,S] -> out [B,T,H,Dv], lse f32[B,T,H]."""
    masked = jnp.where(mask, scores(q, k, scale, soft_cap), -jnp.inf)
    lse = log_sum_exp(masked)
    out = weighted(probabilities(masked, lse), v)
    return heads_last(out.astype(q.dtype)), heads_last(lse)


def column_weights(
    q: jax.Array,
    k: jax.Array,
    mask: jax.Array,
    lse: jax.Array,
    row_weights: jax.Array,
    scale: float,
    soft_cap: float | None,
) -> jax.Array:
    """Attention mass of each slot, summed over its group and over rows by row_weights f32[B, T] -> f32[B, K, S]."""
    masked = jnp.where(mask, scores(q, k, scale, soft_cap), -jnp.inf)
    weights = probabilities(masked, heads_grouped(lse, k.shape[1]))
    return jnp.einsum("bkgts,bt->bks", weights, row_weights.astype(jnp.float32))
