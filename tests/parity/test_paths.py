"""Prefill and decoding through the paged cache compute what transformers computes.

Tolerance 2e-4, as on the training path; windows here are shorter than the sequence, so rings wrap within it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import kvjax
from kvjax.model import Model
from tests.parity.cases import CASES, Case
from tests.parity.helpers import random_tokens, transformers_logits

TOLERANCE = 2e-4
CACHE = kvjax.CacheConfig(page_size=4)
QUICK = {
    *("llama-gqa", "llama-rope-yarn", "qwen2", "mistral-window", "qwen3-moe", "gemma3", "phi3-longrope", "olmo2"),
    *("deepseek-v3-yarn", "gpt-oss"),
}
"""One of each that changes how a cache is read or written; the other configurations are `slow` here.

They differ in what all paths share, and the forward path runs them all.
"""
EVERY = [pytest.param(case, marks=() if case.name in QUICK else pytest.mark.slow) for case in CASES]


def test_the_quick_configurations_exist() -> None:
    assert QUICK.issubset(case.name for case in CASES)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_prefill_and_decode_logits_equal_transformers(
    case: Case, load_case: Callable[[Case], tuple[Any, Model]]
) -> None:
    theirs, ours = load_case(case)
    tokens = random_tokens()
    expected = transformers_logits(theirs, tokens)
    # Chunks shorter than the sequence, so that later ones read pages that earlier ones wrote.
    prefilled = kvjax.score(ours, tokens, CACHE, path="prefill", prefill_chunk=16)
    np.testing.assert_allclose(prefilled, expected, atol=TOLERANCE, rtol=0)
    decoded = kvjax.score(ours, tokens, CACHE, path="decode", prompt_length=5, prefill_chunk=16)
    np.testing.assert_allclose(decoded, expected, atol=TOLERANCE, rtol=0)
