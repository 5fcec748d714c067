"""RandomEviction keeps a uniform sample, its own for each sequence, layer and head; what is gone stays gone."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import CacheConfig, Policy
from kvjax.errors import ConfigError
from kvjax.evaluate.random_eviction import RandomEviction
from tests.cache.tiny import MODEL, feed, held_everywhere, random_tokens

BUDGET = 6
CACHE = CacheConfig(policy=RandomEviction(BUDGET), page_size=4)


def test_it_is_a_policy() -> None:
    assert isinstance(RandomEviction(3), Policy)
    assert hash(RandomEviction(3)) == hash(RandomEviction(3))


def test_every_token_is_as_likely_to_stay() -> None:
    tokens, batch, rng = 40, 3000, np.random.default_rng(0)
    policy = RandomEviction(10)
    weights = jnp.asarray(rng.dirichlet(np.ones(tokens), (1, batch)).astype(np.float32))
    state = policy.observe(policy.row_state(1, batch, tokens), weights, jnp.ones(batch, bool))
    kept = np.asarray(policy.keep(state, jnp.broadcast_to(jnp.arange(tokens), weights.shape)))
    assert np.all(kept.sum(-1) == 10)
    # Of 3000 draws each token is kept in 750 on average, with a deviation of 24; five of those, for 40 tokens.
    counts = kept[0].sum(0)
    assert np.all(np.abs(counts - 750) < 5 * np.sqrt(3000 * 0.25 * 0.75))
    # Whether a token stays has nothing to do with its weight.
    light, heavy = (np.asarray(weights[0])[kept[0] == side].mean() for side in (False, True))
    assert light == pytest.approx(heavy, rel=0.02)


def test_a_lot_is_drawn_once() -> None:
    policy = RandomEviction(2)
    blank, on = policy.row_state(1, 1, 3), jnp.ones(1, bool)
    first = policy.observe(blank, jnp.asarray([[[0.2, 0.5, 0.0]]]), on)
    second = policy.observe(first, jnp.asarray([[[0.7, 0.1, 0.2]]]), on)
    np.testing.assert_array_equal(second["score"][..., :2], first["score"][..., :2])
    assert float(first["score"][0, 0, 2]) == 0
    assert float(second["score"][0, 0, 2]) > 0
    off = policy.observe(blank, jnp.asarray([[[0.2, 0.5, 0.3]]]), ~on)
    assert not np.any(np.asarray(off["score"]))


def test_through_the_cache_a_budget_is_held_that_differs_everywhere_and_never_regains_what_it_lost() -> None:
    prompts = random_tokens(0, 2, 15).tolist()
    cache = kvjax.prefill(MODEL, prompts, CACHE, room=16).cache
    seen = 15
    before = [held_everywhere(cache, row) for row in range(2)]
    assert all(len(head) == BUDGET for sequence in before for layer in sequence for head in layer)
    sets = {head for sequence in before for layer in sequence for head in layer}
    assert len(sets) > 4  # of the 8 of two sequences, layers and heads
    for step in range(8):
        cache, _ = feed(MODEL, cache, random_tokens(step + 1, 2, 1).tolist())
        after = [held_everywhere(cache, row) for row in range(2)]
        for old_layers, new_layers in zip(before, after, strict=True):
            for old_heads, new_heads in zip(old_layers, new_layers, strict=True):
                for old, new in zip(old_heads, new_heads, strict=True):
                    assert len(new) == BUDGET
                    assert set(new) <= {*old, seen}
        before, seen = after, seen + 1


def test_another_seed_keeps_others_and_the_same_seed_the_same() -> None:
    prompts = random_tokens(0, 1, 15).tolist()

    def kept(seed: int) -> object:
        config = CacheConfig(policy=RandomEviction(BUDGET, seed), page_size=4)
        return held_everywhere(kvjax.prefill(MODEL, prompts, config).cache, 0)

    assert kept(0) == kept(0)
    assert kept(0) != kept(1)


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"RandomEviction\.budget"):
        RandomEviction(0)
    with pytest.raises(ConfigError, match=r"RandomEviction\.seed"):
        RandomEviction(4, seed=0.5)  # type: ignore[arg-type]
