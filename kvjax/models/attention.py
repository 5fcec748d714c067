"""Self-attention with as many key-value heads as the config says: MHA, GQA (Ainslie et al. 2023, 2305.13245) or MQA."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn

from kvjax.config import ModelConfig
from kvjax.models.layers import RMSNorm
from kvjax.models.rotary import rotary


class Attention(nn.Module):
    """Projects, normalises q and k if asked, and hands them unrotated to `attend`, which decides what is attended.

    `attend(cache, layer, q[B,T,H,D], k[B,T,K,D], v[B,T,K,D], positions, rotate) -> (out[B,T,H,D], cache)`.
    """

    config: ModelConfig
    attend: Any

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, layer: Any, cache: Any) -> tuple[jax.Array, Any]:
        c = self.config
        heads = x.shape[:2]
        q = nn.Dense(c.num_heads * c.width, use_bias=c.qkv_bias, name="q")(x).reshape(*heads, c.num_heads, c.width)
        k = nn.Dense(c.num_kv_heads * c.width, use_bias=c.qkv_bias, name="k")(x)
        v = nn.Dense(c.num_kv_heads * c.width, use_bias=c.qkv_bias, name="v")(x)
        k, v = (y.reshape(*heads, c.num_kv_heads, c.width) for y in (k, v))
        if c.qk_norm:
            q = RMSNorm(c.norm_eps, name="q_norm")(q)
            k = RMSNorm(c.norm_eps, name="k_norm")(k)
        out, cache = self.attend(cache, layer, q, k, v, positions, rotary(c))
        out = out.reshape(*heads, c.num_heads * c.width)
        return nn.Dense(c.hidden_size, use_bias=c.o_bias, name="o")(out), cache
