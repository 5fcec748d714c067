"""Every variant computes what the float64 NumPy oracle computes, without a cache and on both paths with one."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import kvjax
from kvjax.config import ModelConfig
from kvjax.model import parameter_shapes
from tests.models.cases import CASES, DEEPSEEK_V3, GPT_OSS, PLAIN, model_of, random_params, random_tokens
from tests.oracles import decoder, variants
from tests.oracles.matrix import matrix_forward
from tests.oracles.weights import random_params as plain_params

TOKENS = random_tokens(1, 2, 20)
CACHE = kvjax.CacheConfig(page_size=4)
CHUNK = 8
"""Tokens per prefill chunk: three chunks, and windows narrower than one."""

FLOAT32 = 5e-5
"""Absolute tolerance on logits of up to 5: a few layers in float32 were seen to be off by 4e-6 at most.

What must be noticed, a norm, a bias or a sink lost, moves logits by 9e-2 and more, and by 5e-3 in a test below.
"""
ROUTING = 1e-4
"""Scores of experts this far apart are ordered alike in float32, where they err by about 1e-6."""

FLOAT64 = 1e-9
"""Two float64 renderings of one network: far above their rounding (1e-13), far below any misplaced number."""


def expected(config: ModelConfig) -> np.ndarray:
    """float64[B, T, V] of the oracle, whose experts must be chosen clearly."""
    results = [variants.forward(random_params(config), config, row) for row in TOKENS.tolist()]
    assert min(result.routing for result in results) > ROUTING, "these tokens leave a choice of experts to rounding"
    return np.stack([result.logits for result in results])


LONGER = ("deepseek-v2-experts", "gemma-3", "phi-3", "cla-windows")
"""Cases whose traits the others have singly; only `make test-all` compiles them."""


@pytest.mark.parametrize(
    "config", [pytest.param(CASES[n], id=n, marks=pytest.mark.slow if n in LONGER else ()) for n in CASES]
)
def test_forward_prefill_and_decode_equal_the_oracle(config):
    model, wanted = model_of(config), expected(config)
    for path in ("forward", "prefill", "decode"):
        ours = kvjax.score(model, TOKENS, CACHE, path, prompt_length=6, prefill_chunk=CHUNK)
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=FLOAT32, err_msg=path)


# The oracle itself


@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_the_oracle_with_a_cache_equals_the_one_without(config):
    params, tokens = random_params(config), TOKENS[0].tolist()
    for split in (1, 9):
        result = decoder.run(params, config, tokens[:split], tokens[split:])
        np.testing.assert_allclose(result.logits, variants.forward(params, config, tokens).logits, rtol=0, atol=FLOAT64)


def test_the_oracle_equals_a_second_rendering_of_the_plain_network():
    config = dataclasses.replace(PLAIN, windows=(4, None))
    params, tokens = plain_params(config), TOKENS[0].tolist()
    np.testing.assert_allclose(
        variants.forward(params, config, tokens).logits, matrix_forward(params, config, tokens)[0], rtol=0, atol=FLOAT64
    )


@pytest.mark.parametrize("name", CASES)
def test_no_parameter_is_without_effect(name):
    """Each parameter but one set to what it starts at: a model that loses it would be another model."""
    config = CASES[name]
    params, tokens = random_params(config), TOKENS[0].tolist()
    wanted = variants.forward(params, config, tokens).logits
    assert jax.tree.structure(params) == jax.tree.structure(parameter_shapes(config))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        blank = np.full_like(leaf, 1.0 if path[-1].key == "scale" and not config.norm_unit_offset else 0.0)
        other = jax.tree_util.tree_map_with_path(lambda p, x, at=path, new=blank: new if p == at else x, params)
        off = np.abs(variants.forward(other, config, tokens).logits - wanted).max()
        assert off > 100 * FLOAT32, (jax.tree_util.keystr(path), off)


def test_choices_of_experts_are_felt():
    """Groups, normalisation, the factor and the clamp each change the logits: none of them is idle in these cases."""
    tokens = TOKENS[0].tolist()
    for config, changes in (
        (DEEPSEEK_V3, {"groups": 1, "groups_per_token": 1}),
        (DEEPSEEK_V3, {"group_score": "max"}),
        (DEEPSEEK_V3, {"normalize": False}),
        (DEEPSEEK_V3, {"scaling_factor": 1.0}),
        (DEEPSEEK_V3, {"scoring": "softmax"}),
        (GPT_OSS, {"limit": 7.0}),
        (GPT_OSS, {"limit": None}),
    ):
        other = dataclasses.replace(config, experts=dataclasses.replace(config.experts, **changes))
        params = random_params(config)
        off = np.abs(
            variants.forward(params, other, tokens).logits - variants.forward(params, config, tokens).logits
        ).max()
        assert off > 100 * FLOAT32, (changes, off)
