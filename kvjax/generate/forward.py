"""One token a sequence through the model: the step that decoding, scoring and token-by-token prompts share."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.attention.paged import PagedAttend
from kvjax.attention.protocol import Attend
from kvjax.cache.state import Cache
from kvjax.config import ModelConfig
from kvjax.models import Decoder
from kvjax.models.rotary import rotary
from kvjax.typing import Params, Rotate


def apply(
    config: ModelConfig, attend: Attend | None, params: Params, *arguments: Any, method: str | None = None
) -> Any:
    """The decoder, or one of its methods: unrolled on per-layer parameters, scanned on stacked ones."""
    if isinstance(attend, PagedAttend):
        attend = dataclasses.replace(attend, rotate=rotate_of(config))
    module = Decoder(config, attend, scan="layers" in params)
    return module.apply({"params": params}, *arguments, method=method)


def rotate_of(config: ModelConfig) -> Rotate:
    """The `rotate` of every layer that a select may read: those with a RoPE of their own read their window instead."""

    def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
        return rotary(config)(x, positions)  # not made before it is needed: not every model has one

    return rotate


def layer_of(params: Params, layer: int) -> Params:
    """One layer's parameters, whether or not they are stacked."""
    return _picked(params["layers"], np.int32(layer)) if "layers" in params else params[f"layers_{layer}"]


@jax.jit
def _picked(stacked: Params, layer: jax.Array) -> Params:
    picked: Params = jax.tree.map(lambda leaf: leaf[layer], stacked)
    return picked


def forward_token(
    params: Params, cache: Cache, token: jax.Array, active: jax.Array, *, config: ModelConfig, attend: PagedAttend
) -> tuple[jax.Array, Cache]:
    """token int32[B] where active bool[B] -> hidden [B, hidden] and the cache with it; others stay as they are."""
    positions = jnp.where(active, cache.seen, -1)[:, None]
    hidden, cache = apply(config, attend, params, token[:, None], positions, cache)
    return hidden[:, 0], cache


def logits_of(params: Params, hidden: jax.Array, config: ModelConfig) -> jax.Array:
    """[..., hidden] -> float32[..., V]."""
    logits: jax.Array = apply(config, None, params, hidden, method="logits")
    return logits


@functools.partial(jax.jit, static_argnames="config")
def head(params: Params, hidden: jax.Array, *, config: ModelConfig) -> jax.Array:
    """`logits_of`, compiled."""
    return logits_of(params, hidden, config)
