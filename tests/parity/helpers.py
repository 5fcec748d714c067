"""Logits of both sides for the same tokens."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.attention.dense import DenseAttend
from kvjax.model import Model
from kvjax.models import Decoder
from tests.parity.cases import BATCH, LENGTH, VOCAB


def random_tokens(seed: int = 0) -> np.ndarray:
    """int32[BATCH, LENGTH] over the whole vocabulary."""
    return np.random.default_rng(seed).integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)


def forward_logits(model: Model, tokens: np.ndarray) -> np.ndarray:
    """float32[B, T, V] of the training path: plain causal attention, no cache."""
    module = Decoder(model.config, DenseAttend(windows=model.config.windows))

    @jax.jit
    def run(params: Any, tokens: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = module.apply({"params": params}, tokens, positions, None)
        return module.apply({"params": params}, hidden, method="logits")

    return np.asarray(run(model.params, jnp.asarray(tokens)))


def transformers_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """float32[B, T, V] of a transformers model."""
    import torch

    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits.numpy())
