"""Cross-attention to what a context encoder gave (CEPE, Yen et al. 2024, 2402.16617)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from kvjax.config import ModelConfig
from kvjax.models.linear import Linear, Weight


class CrossAttention(nn.Module):
    """What a layer reads of its sequence's context: x [B, T, hidden], normed -> [B, T, hidden], or None without one.

    Queries come from x; keys and values from what the encoder gave, by kernels that `attend` is handed, which alone
    knows where that is held and whether keys and values are made of it or absorbed. No bias, no rotation: a sequence
    without context adds exactly 0.
    """

    config: ModelConfig
    attend: Any

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array, cache: Any) -> jax.Array | None:
        c = self.config
        assert c.encoder is not None
        q = Linear(c.num_heads * c.width, use_bias=False, name="q")(x).reshape(*x.shape[:2], c.num_heads, c.width)
        to_k, to_v = (
            Weight((c.num_kv_heads * c.width, c.encoder.hidden_size), name=name)().reshape(c.num_kv_heads, c.width, -1)
            for name in ("k", "v")
        )
        out = self.attend.cross(cache, q, to_k, to_v, positions)
        if out is None:
            if not self.is_initializing():
                return None
            out = jnp.zeros_like(q)  # every parameter must be met
        added: jax.Array = Linear(c.hidden_size, use_bias=False, name="o")(out.reshape(*x.shape[:2], -1))
        return added
