"""Next-token cross-entropy."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def token_losses(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """logits [B, T, V], tokens int32[B, T] -> float32[B, T-1], nats: entry t is how badly token t+1 was predicted."""
    logits = logits[:, :-1].astype(jnp.float32)
    target = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - target


def next_token_loss(logits: jax.Array, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Mean next-token loss, nats per token, float32[].

    Args:
      logits: [B, T, V], of the model that read `tokens`.
      tokens: int32[B, T].
      mask: [B, T], how much predicting each token counts (that of token 0 is never used); None: all count 1. If nothing
        counts the loss is 0.
    """
    losses = token_losses(logits, tokens)
    if mask is None:
        return jnp.mean(losses)
    weight = mask[:, 1:].astype(jnp.float32)
    return jnp.sum(losses * weight) / jnp.maximum(jnp.sum(weight), 1e-6)
