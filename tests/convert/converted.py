"""Small models to convert, and what to compare of them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import kvjax
from kvjax import CacheConfig, Model, ModelConfig
from kvjax.cache.codecs import Int8
from kvjax.cache.policies import H2O
from tests.models.cases import BASE, VOCAB, model_of, random_tokens

TOKENS = random_tokens(3, 2, 12)
CALIBRATION = random_tokens(4, 6, 16)

SUMS = 2e-5
"""Logits of up to 5 from equal weights, summed in another order: float32 layers were seen to differ by 5e-6."""
ROTATED = 1e-4
"""Likewise where weights were multiplied by orthogonal matrices in float64 and rounded once: seen 2e-5."""


def small(**fields: Any) -> Model:
    """`BASE` with four key-value heads and other fields changed, every weight drawn."""
    return model_of(ModelConfig(**{**BASE, "num_kv_heads": 4, "max_position_embeddings": 64, **fields}))


def logits(model: Model, **options: Any) -> np.ndarray:
    """float32[B, T, V] for `TOKENS`."""
    return np.asarray(kvjax.score(model, TOKENS, **options))


def with_attention(model: Model, layer: int, **parts: Any) -> Model:
    """Some projections of a layer replaced; keys are `name_leaf`, such as k_weight."""
    attention = dict(model.params[f"layers_{layer}"]["attention"])
    for name, value in parts.items():
        module, leaf = name.rsplit("_", 1)
        attention[module] = {**attention[module], leaf: jax.numpy.asarray(value, jax.numpy.float32)}
    layers = {**model.params, f"layers_{layer}": {**model.params[f"layers_{layer}"], "attention": attention}}
    return dataclasses.replace(model, params=layers)


def transformers_logits(path: Path) -> np.ndarray:
    """What transformers makes of `TOKENS` with the directory as it lies."""
    torch = pytest.importorskip("torch", reason="compares with transformers: pip install kvjax[parity]")
    transformers = pytest.importorskip("transformers", reason="compares with transformers: pip install kvjax[parity]")
    theirs, about = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not about["missing_keys"]
    assert not about["unexpected_keys"]
    with torch.no_grad():
        return np.asarray(theirs(torch.from_numpy(TOKENS), use_cache=False).logits.numpy())


def check_decodes(model: Model) -> None:
    """The paged cache computes what the forward pass does, and serves evicting, quantised generation.

    Two float32 paths through the same weights: seen to differ by 1e-5.
    """
    np.testing.assert_allclose(logits(model, path="decode", prompt_length=5), logits(model), atol=1e-4)
    cache = CacheConfig(policy=H2O(3, 3), codec=Int8())
    out = kvjax.generate(model, [[5, 6, 7, 8, 9, 10, 11, 12], [13]], max_new_tokens=6, cache=cache)
    assert [len(tokens) for tokens in out.tokens] == [6, 6]
    assert all(0 <= token < VOCAB for tokens in out.tokens for token in tokens)
    assert all(math.isfinite(value) for values in out.logprobs for value in values)
    assert out.stats.kv_bytes_per_token == kvjax.plan(model.config, cache, dtype="float32").bytes_per_token
