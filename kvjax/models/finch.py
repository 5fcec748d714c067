"""The memory of RWKV-6 heads (Peng et al. 2024, 2404.05892) as GoldFinch's lower layers have it, without bonus."""

from __future__ import annotations

import jax
import jax.numpy as jnp

BLOCK = 16
"""Tokens computed in parallel; blocks follow one another through the memory."""

STRONGEST = -30.0
"""Logarithms of decays are cut here: float32 does not notice e^-30, and differences of larger sums would be coarse."""


def remember(
    r: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, real: jax.Array, memory: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """out_t = r_t S_(t-1), S_t = diag(e^log_decay_t) S_(t-1) + k_t^T v_t, per head, in float32.

    A token does not read what it writes itself. Within a block each pair of tokens has its decay as the exponential of
    a difference, which is never positive: factors of their own for both would overflow where decay is strong.

    Args:
      r, k, v: [B, T, H, D]. log_decay: float32[B, T, H, D], at most 0, of each channel of k.
      real: bool[B, T]; other tokens neither decay nor enter the memory, and their out is of no use.
      memory: float32[B, H, D, D], keys by values.

    Returns:
      out float32[B, T, H, D] and the memory after the last token.
    """
    length = r.shape[1]
    size = min(BLOCK, length)
    log_decay = jnp.where(real[..., None, None], jnp.maximum(log_decay, STRONGEST), 0.0)
    k = jnp.where(real[..., None, None], k, 0)
    earlier = jnp.tril(jnp.ones((size, size), bool), -1)[:, :, None, None]

    def blocks(x: jax.Array) -> jax.Array:
        """[B, T, H, D] -> [blocks, B, size, H, D]; zeros, which change nothing, fill the last."""
        x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -length % size), (0, 0), (0, 0)))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(memory: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        r, k, v, log_decay = inputs
        after = jnp.cumsum(log_decay, axis=1)
        before = after - log_decay
        between = before[:, :, None] - after[:, None]  # [B, t, s, H, D]
        # Masked before the exponential: from the diagonal on it could overflow.
        decay = jnp.exp(jnp.where(earlier, between, -jnp.inf))
        scores = jnp.einsum("bthd,btshd,bshd->bhts", r, decay, k)
        out = jnp.einsum("bhts,bshe->bthe", scores, v) + jnp.einsum("bthd,bhde->bthe", r * jnp.exp(before), memory)
        left = jnp.exp(after[:, -1:] - after)
        memory = memory * jnp.exp(after[:, -1])[..., None] + jnp.einsum("bshd,bshe->bhde", k * left, v)
        return memory, out

    memory, out = jax.lax.scan(one, memory, tuple(map(blocks, (r, k, v, log_decay))))
    return jnp.moveaxis(out, 0, 1).reshape(r.shape[0], -1, *r.shape[2:])[:, :length], memory
