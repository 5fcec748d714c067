"""RMSNorm and the SwiGLU feed-forward block."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from kvjax.config import ModelConfig


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32 whatever the input (Zhang and Sennrich 2019, 1910.07467)."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * scale


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, 2002.05202). [B, T, hidden] -> the same."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, bias = self.config.intermediate_size, self.config.mlp_bias
        gate = nn.Dense(width, use_bias=bias, name="gate")(x)
        up = nn.Dense(width, use_bias=bias, name="up")(x)
        return nn.Dense(self.config.hidden_size, use_bias=bias, name="down")(nn.silu(gate) * up)
