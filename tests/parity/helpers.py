"""Logits of both sides for the same tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

import kvjax
from kvjax.model import Model
from tests.parity.cases import BATCH, LENGTH, VOCAB


def random_tokens(seed: int = 0) -> np.ndarray:
    """int32[BATCH, LENGTH] over the whole vocabulary."""
    return np.random.default_rng(seed).integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)


def forward_logits(model: Model, tokens: np.ndarray) -> np.ndarray:
    """float32[B, T, V] of the training path: plain causal attention, no cache."""
    return np.asarray(kvjax.score(model, tokens, path="forward"))


def transformers_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """float32[B, T, V] of a transformers model."""
    import torch

    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits.numpy())
