"""The encoder of a decoder's context, chunk by chunk (CEPE, Yen et al. 2024, 2402.16617)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from kvjax.config import ModelConfig
from kvjax.models.layers import norm_of
from kvjax.models.transformer import Layer


class Encoder(nn.Module):
    """A bidirectional transformer over chunks, each by itself: tokens, positions int32[N, T] -> [N, T, E], normed.

    Attributes:
      config: its own (`ModelConfig.encoder` of the decoder it serves).
      attend: without a cache and not causal; positions start from 0 in each chunk, -1 is padding.
    """

    config: ModelConfig
    attend: Any

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        c = self.config
        x = nn.Embed(c.vocab_size, c.hidden_size, name="embed")(tokens)
        if c.embedding_scale != 1:
            x = x * jnp.asarray(c.embedding_scale, x.dtype)
        for index in range(c.num_layers):
            (x, _), _ = Layer(c, self.attend, c.kind(index), name=f"layers_{index}")((x, None), index, positions)
        normed: jax.Array = norm_of(c, "norm")(x)
        return normed
