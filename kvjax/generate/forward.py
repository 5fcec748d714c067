"""One token a sequence through the model: the step that decoding, scoring and token-by-token prompts share."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kvjax.attention.paged import PagedAttend
from kvjax.cache.state import Cache
from kvjax.config import ModelConfig
from kvjax.models import Decoder
from kvjax.typing import Params


def forward_token(
    params: Params, cache: Cache, token: jax.Array, active: jax.Array, *, config: ModelConfig, attend: PagedAttend
) -> tuple[jax.Array, Cache]:
    """token int32[B] where active bool[B] -> hidden [B, hidden] and the cache with it; other sequences stay as they are."""
    positions = jnp.where(active, cache.seen, -1)[:, None]
    hidden, cache = Decoder(config, attend).apply({"params": params}, token[:, None], positions, cache)
    return hidden[:, 0], cache


def logits_of(params: Params, hidden: jax.Array, config: ModelConfig) -> jax.Array:
    """[..., hidden] -> float32[..., V]."""
    return Decoder(config, None).apply({"params": params}, hidden, method="logits")


@functools.partial(jax.jit, static_argnames="config")
def head(params: Params, hidden: jax.Array, *, config: ModelConfig) -> jax.Array:
    """`logits_of`, compiled."""
    return logits_of(params, hidden, config)
