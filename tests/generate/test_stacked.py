"""Stacked layers: prompts and steps scan over them, and compute what unrolled ones do."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import kvjax
from kvjax import CacheConfig
from kvjax.cache.policies import H2O, StreamingLLM
from kvjax.cache.selects import Quest
from kvjax.models import stack_layers
from tests.models.cases import PLAIN, model_of, random_tokens

SLOW = pytest.mark.slow
LENGTH, PROMPT = 24, 14


@pytest.mark.parametrize(
    "cache",
    [
        CacheConfig(page_size=4, policy=StreamingLLM(2, 6)),
        pytest.param(CacheConfig(page_size=4, policy=H2O(4, 4)), marks=SLOW),
        pytest.param(CacheConfig(page_size=4, select=Quest(2, dense_layers=0)), marks=SLOW),
    ],
    ids=["streaming", "h2o", "quest"],
)
def test_a_scan_over_layers_gives_the_logits_of_unrolled_ones(cache):
    """A prompt chunk by chunk, or layer by layer, and the steps behind it."""
    unrolled = model_of(PLAIN)
    stacked = dataclasses.replace(unrolled, params=stack_layers(unrolled.params))
    tokens = random_tokens(3, 2, LENGTH)
    ours, expected = (
        kvjax.score(model, tokens, cache, "decode", PROMPT, prefill_chunk=8) for model in (stacked, unrolled)
    )
    # The same float32 operations, fused otherwise.
    np.testing.assert_allclose(ours, expected, atol=2e-5)
