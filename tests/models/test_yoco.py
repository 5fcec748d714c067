"""A decoder-decoder (YOCO) against its float64 oracle: every path, prompts that stop early, what its cache weighs."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.cache.pages import take
from kvjax.config import ModelConfig, RopeScaling
from kvjax.errors import ConfigError
from kvjax.model import Model
from tests.oracles import yoco
from tests.oracles.decoder import to_float64

WINDOW = 5
SHAPE: dict[str, Any] = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    rope_theta=100.0,
    norm_eps=1e-5,
    rope_scaling=RopeScaling(kind="inclusive"),
    rope_interleaved=True,
    embedding_scale=32**0.5,
    cross_from=2,
)
KINDS = {"retention": dict(retention_layers=(0, 1)), "window": dict(windows=(WINDOW, WINDOW, None, None))}
CLOSE = 5e-5
"""Logits reach 6 and were seen to be off by 4e-6 in float32, through sums over at most 48 channels and 23 tokens."""
CHUNK = 8
PROMPTS = [3, 20, 9]


@functools.cache
def pair(kind: str) -> tuple[Model, yoco.Shape]:
    """The same random weights in kvjax, and what the oracle must know beside them."""
    config = ModelConfig(**SHAPE, **KINDS[kind])
    shape = yoco.Shape(4, 4, 4, WINDOW if kind == "window" else None, 100.0, 1e-5)
    params = yoco.random_params(shape, 61, 32, 48, 2, 2 if kind == "window" else None)
    return Model(config, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)), shape


def oracle(kind: str, tokens: list[int]) -> np.ndarray:
    """float64[T, V]."""
    model, shape = pair(kind)
    return yoco.forward(to_float64(model.params), shape, tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_every_path_equals_the_oracle(kind: str) -> None:
    model, _ = pair(kind)
    tokens = np.random.default_rng(0).integers(0, 61, (2, 23))
    expected = np.stack([oracle(kind, row.tolist()) for row in tokens])
    for options in (
        dict(path="forward"),
        dict(path="prefill", prefill_chunk=CHUNK),
        dict(path="decode", prompt_length=9, prefill_chunk=CHUNK),
    ):
        np.testing.assert_allclose(kvjax.score(model, tokens, **options), expected, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_stops_early_is_followed_by_the_same_tokens(kind: str) -> None:
    model, _ = pair(kind)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 61, length).tolist() for length in PROMPTS]
    out = kvjax.generate(model, prompts, max_new_tokens=5, prefill_chunk=CHUNK)
    for prompt, tokens, logprobs in zip(prompts, out.tokens, out.logprobs, strict=True):
        text = list(prompt)
        for token, logprob in zip(tokens, logprobs, strict=True):
            logits = oracle(kind, text)[-1]
            assert token == logits.argmax()
            np.testing.assert_allclose(logprob, logits[token] - np.logaddexp.reduce(logits), rtol=0, atol=CLOSE)
            text.append(token)


@pytest.mark.slow
def test_a_second_turn_and_a_fork_remember_what_the_retention_layers_do() -> None:
    model, _ = pair("retention")
    rng = np.random.default_rng(2)
    first, second = rng.integers(0, 61, 11).tolist(), rng.integers(0, 61, 10).tolist()
    state = kvjax.prefill(model, [first], prefill_chunk=CHUNK)
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(state.cache.recurrent))
    forked = kvjax.fork(state, 2)
    out, forked = kvjax.extend(model, forked, [second, second[:4]], max_new_tokens=3, prefill_chunk=CHUNK)
    alone = kvjax.generate(model, [first + second, first + second[:4]], max_new_tokens=3, prefill_chunk=CHUNK)
    assert out.tokens == alone.tokens
    emptied = take(forked.cache, jnp.array([-1, 1]))
    for before, after in zip(jax.tree.leaves(forked.cache.recurrent), jax.tree.leaves(emptied.recurrent), strict=True):
        assert not after[0].any()
        np.testing.assert_array_equal(after[1], before[1])


def test_only_one_layer_of_keys_and_values_is_held_and_the_states_never_grow() -> None:
    model, _ = pair("retention")
    # One pair for the whole model: K and V of 2 heads of width 8, in float32.
    per_token = 2 * 2 * 8 * 4
    states = 2 * 4 * 8 * 8 * 4
    for context in (64, 512):
        plan = kvjax.plan(model.config, context=context)
        assert plan.bytes_per_token == per_token
        assert plan.total_bytes == per_token * context
        assert plan.recurrent_bytes == states
    state = kvjax.prefill(model, [[1, 2, 3]], prefill_chunk=CHUNK)
    group = state.cache.groups[0]
    assert len(state.cache.groups) == 1
    assert group.pool_bytes == per_token * group.layout.page_size * group.num_pages
    assert state.cache.recurrent_bytes == states * state.cache.batch


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_window_over_the_shared_pair_holds_no_more_than_the_window(kind: str) -> None:
    model, _ = pair(kind)
    cache = kvjax.CacheConfig(policy=kvjax.policies.SlidingWindow(7), page_size=4)
    prompt = np.random.default_rng(3).integers(0, 61, 30).tolist()
    state = kvjax.prefill(model, [prompt], cache, prefill_chunk=CHUNK)
    assert all(int(group.length.max()) <= 7 for group in state.cache.groups)
    wide = kvjax.prefill(model, [prompt], cache, prefill_chunk=30)
    one, other = (kvjax.extend(model, s, max_new_tokens=4)[0] for s in (state, wide))
    assert one.tokens == other.tokens
    np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=CLOSE)


def test_policies_that_weigh_the_prompt_are_refused() -> None:
    model, _ = pair("retention")
    cache = kvjax.CacheConfig(policy=kvjax.policies.H2O(4, 4))
    with pytest.raises(ConfigError, match="see only a prompt's last token"):
        kvjax.generate(model, [[1, 2]], max_new_tokens=1, cache=cache)


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(cross_from=4), "cross_from must be 1 to 3"),
        (dict(retention_layers=(2,)), "retention_layers names layer 2"),
        (dict(owners=(0, 1, 2, 3), retention_layers=(0,)), None),
        (dict(owners=(0, 0, 2, 2)), "contradicts cross_from"),
        (dict(windows=(None, None, 4, None)), "neither latent attention nor windows"),
    ],
)
def test_contradictory_configs_are_refused(change: dict, reason: str | None) -> None:
    with pytest.raises(ConfigError, match=reason):
        ModelConfig(**{**SHAPE, **change})
