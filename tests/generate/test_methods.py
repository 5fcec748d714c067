"""Every policy, codec and page size against the NumPy oracle, and the identities that tie the methods to one another.

Weights, caches and shapes are those of `tests.cache.tiny`, as are the tolerances and where they come from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import kvjax
from kvjax import CacheConfig
from kvjax.cache.policies import H2O, TOVA, Full, SlidingWindow, StreamingLLM
from kvjax.cache.size import context_bucket, size_groups
from kvjax.cache.state import Cache
from kvjax.generate.decode import take_sequences
from kvjax.generate.prefill import reserve_pages, run_prompts
from kvjax.generate.state import State, layouts_of, make_cache
from tests.cache.tiny import (
    BATCH,
    CHUNK,
    CONFIG,
    DENSE,
    HEAVY,
    INT8,
    LOGITS,
    LOOK,
    MARGIN,
    MIXED,
    MODEL,
    MORE_MIXED,
    STREAM,
    UNIFORM,
    WINDOW,
    Choice,
    Pair,
    cache_of,
    feed,
    held_everywhere,
    logits_after,
    matrix,
    model_of,
    oracle,
    random_tokens,
)
from tests.oracles import decoder
from tests.oracles.allocator import check_references

LENGTH = 24
TOKENS = random_tokens(45, BATCH, LENGTH)  # of some seeds tried, the one with the widest margins in what is kept
PROMPTS = (10, 1, 15, 5)
FORCED = 9
ONE_FLIP = 0.02
"""How far logits may be off once a code of Int8 rounded the other way.

A code is off by one where float32 and float64 fall on two sides of a half, a few times in a hundred thousand codes. All
codes of a text together, each off by up to a half from no coding at all, were seen to move logits by 0.02 to 0.06.
"""
RAGGED = [
    (tuple(row[:length].tolist()), tuple(row[length : length + FORCED].tolist()))
    for row, length in zip(TOKENS, PROMPTS, strict=True)
]
"""Prompts, and the tokens forced behind each."""


def decoded(cache: CacheConfig, prompt_length: int = 5) -> np.ndarray:
    """float32[B, T, V] of `TOKENS` along the decode path."""
    return np.asarray(kvjax.score(MODEL, TOKENS, cache, "decode", prompt_length=prompt_length, prefill_chunk=CHUNK))


def equal_but_for_flips(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], coded: bool) -> list[bool]:
    """Asserts that sequences agree, and says which do exactly: all, or if `coded` all but one that has seen a flip."""
    worst = [float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True)]
    exact = [error < LOGITS for error in worst]
    assert sum(exact) >= len(exact) - coded, worst
    assert max(worst) < (ONE_FLIP if coded else LOGITS), worst
    return exact


def teacher_forced(model: kvjax.Model, cache: CacheConfig) -> tuple[list[np.ndarray], list[list[Any]], Cache]:
    """The ragged batch, token by token: per sequence logits [1 + FORCED, V] and what is held after each token."""
    state = kvjax.prefill(model, [list(prompt) for prompt, _ in RAGGED], cache, room=FORCED, prefill_chunk=CHUNK)
    live = state.cache
    logits = [logits_after(model, state)]
    kept = [[held_everywhere(live, b, model.config)] for b in range(BATCH)]
    for step in range(FORCED):
        live, block = feed(model, live, [[forced[step]] for _, forced in RAGGED])
        logits.append(block[:, 0])
        for b in range(BATCH):
            kept[b].append(held_everywhere(live, b, model.config))
    return [np.stack([step[b] for step in logits]) for b in range(BATCH)], kept, live


def check_steps(model: kvjax.Model, pair: Pair, windows: tuple[int | None, ...] = (None, None)) -> Cache:
    """The ragged batch has the oracle's logits, and holds after each token what the oracle holds.

    Args:
      windows: per layer, how far back a cache must hold tokens that its policy never drops.
    """
    results = [oracle(prompt, forced, pair, model.config) for prompt, forced in RAGGED]
    assert min(result.margin for result in results) > MARGIN, "these tokens leave a choice to rounding"
    logits, kept, live = teacher_forced(model, cache_of(pair))
    exact = equal_but_for_flips(logits, [result.step_logits for result in results], any(c.codec == INT8 for c in pair))
    for b, result in enumerate(results):
        for step, layers in enumerate(result.kept):
            newest = PROMPTS[b] + step - 1
            expected = [
                [tuple(p for p in positions if window is None or p > newest - window) for positions in heads]
                for heads, window in zip(layers, windows, strict=True)
            ]
            assert kept[b][step] == expected or not exact[b], f"sequence {b}, step {step}"
    return live


@pytest.mark.parametrize("pair", matrix([*UNIFORM.values(), *MIXED], MORE_MIXED))
def test_logits_and_kept_tokens_are_the_oracles(pair):
    coded = any(choice.codec == INT8 for choice in pair)
    prefilled = kvjax.score(MODEL, TOKENS, cache_of(pair), "prefill", prefill_chunk=CHUNK)
    whole = [oracle(tuple(row), (), pair).logits for row in TOKENS.tolist()]
    equal_but_for_flips(list(np.asarray(prefilled)), whole, coded)

    split = [oracle(tuple(row[:5]), tuple(row[5:]), pair).logits for row in TOKENS.tolist()]
    equal_but_for_flips(list(decoded(cache_of(pair))), split, coded)

    live = check_steps(MODEL, pair)
    if pair == UNIFORM[HEAVY]:
        check_scores(live, [oracle(prompt, forced, pair) for prompt, forced in RAGGED])


def check_scores(live: Cache, results: Sequence[decoder.Result]) -> None:
    """What H2O has accumulated per token that is held, within less than half of `MARGIN`."""
    position, score = np.asarray(live.groups[0].position), np.asarray(live.groups[0].row_state["score"])
    for b, result in enumerate(results):
        for row in range(4):
            scores = dict(zip(position[row, b].tolist(), score[row, b].tolist(), strict=True))
            for place, expected in result.scores[-1][row // 2][row % 2].items():
                assert abs(scores[place] - expected) < MARGIN / 2.5, (b, row, place)


# Identities


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy", [SlidingWindow(LENGTH), StreamingLLM(4, LENGTH - 4), TOVA(LENGTH - 1), H2O(LENGTH - 4, 3)], ids=str
)
def test_a_budget_of_the_whole_length_equals_full(policy):
    expected = decoded(CacheConfig(page_size=4))
    # Both are float32; StreamingLLM merges two partial results, the others only read in another order.
    np.testing.assert_allclose(decoded(CacheConfig(page_size=4, policy=policy)), expected, rtol=0, atol=5e-5)


def test_streaming_without_sinks_is_a_sliding_window():
    sliding = decoded(CacheConfig(page_size=16, policy=SlidingWindow(6)))
    streaming = decoded(CacheConfig(page_size=16, policy=StreamingLLM(0, 6)))
    # The same arithmetic on the same slots: float32 noise at most.
    np.testing.assert_allclose(streaming, sliding, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_h2o_without_heavy_hitters_fed_from_one_token_is_a_sliding_window_one_wider():
    sliding = decoded(CacheConfig(page_size=16, policy=SlidingWindow(6)), prompt_length=1)
    h2o = decoded(CacheConfig(page_size=16, policy=H2O(0, 5)), prompt_length=1)
    # Slots differ, so sums run in another order: float32 noise.
    np.testing.assert_allclose(h2o, sliding, rtol=0, atol=5e-5)


@pytest.mark.parametrize("chunk", [4, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("pair", matrix([UNIFORM[STREAM]], [UNIFORM[Full()], UNIFORM[WINDOW], MIXED[0]]))
def test_how_a_prompt_is_split_is_irrelevant_to_policies_that_append_or_slide(pair, chunk):
    coded = any(choice.codec == INT8 for choice in pair)
    expected = list(np.asarray(kvjax.score(MODEL, TOKENS, cache_of(pair), "prefill", prefill_chunk=CHUNK)))
    ours = kvjax.score(MODEL, TOKENS, cache_of(pair), "prefill", prefill_chunk=chunk)
    equal_but_for_flips(list(np.asarray(ours)), expected, coded)
    equal_but_for_flips(list(decoded(cache_of(pair), prompt_length=1)), expected, coded)


def fresh(prompts: Sequence[Sequence[int]], cache: CacheConfig, permutation_seed: int | None = None) -> State:
    """`kvjax.prefill` into a cache of always `BATCH` sequences, its free pages in another order if a seed is given."""
    layouts = layouts_of(MODEL, cache)
    live = make_cache(layouts, BATCH, size_groups(layouts, BATCH, LENGTH, None))
    if permutation_seed is not None:
        rng = np.random.default_rng(permutation_seed)
        groups = tuple(
            dataclasses.replace(group, free=rng.permutation(group.num_pages).astype(np.int32)) for group in live.groups
        )
        live = dataclasses.replace(live, groups=groups)
    lengths = np.zeros(BATCH, np.int32)
    lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
    live, _ = reserve_pages(live, lengths)
    listed = [list(prompt) for prompt in prompts]
    live, last, _ = run_prompts(MODEL, live, listed, context=context_bucket(LENGTH), fresh=True, chunk=CHUNK)
    return State(live, cache, tuple(map(tuple, prompts)), last, 0)


@pytest.mark.parametrize("pair", matrix(UNIFORM.values()))
def test_a_ragged_batch_equals_each_sequence_alone(pair):
    cache = cache_of(pair)
    together, expected = feed(MODEL, fresh([p for p, _ in RAGGED], cache).cache, [forced for _, forced in RAGGED])
    for b, (prompt, forced) in enumerate(RAGGED):
        alone, logits = feed(MODEL, fresh([prompt], cache).cache, [forced])
        # The same program on another row of its arrays: what differs is how products are cut into vector registers.
        np.testing.assert_allclose(logits[0, :FORCED], expected[b, :FORCED], rtol=0, atol=1e-5)
        assert held_everywhere(alone, 0) == held_everywhere(together, b)


# Sharing


@pytest.mark.parametrize("pair", matrix([*UNIFORM.values(), *MIXED], MORE_MIXED))
def test_forks_that_diverge_equal_runs_that_never_shared_a_page(pair):
    (first, first_tokens), _, (second, second_tokens), _ = RAGGED
    more = random_tokens(3, BATCH, 9).tolist()
    state = fresh([first, second], cache_of(pair))
    cache, _ = feed(MODEL, state.cache, [first_tokens[:3], second_tokens[:3], [], []])
    cache = take_sequences(cache, np.array([0, 0, 1, 1], np.int32))
    cache, _ = feed(MODEL, cache, [row[:5] for row in more])
    # Again, in another order; the fourth is dropped while it still shares the second prompt's pages.
    sources = [2, 0, 1, 1]
    cache = take_sequences(cache, np.array(sources, np.int32))
    cache, shared = feed(MODEL, cache, [row[5:] for row in more])
    for group in cache.groups:
        assert int(group.copied) > 0
        entries = np.asarray(group.table)
        check_references(
            entries[entries >= 0].tolist(), np.asarray(group.refs).tolist(), np.asarray(group.free)[: int(group.top)]
        )

    prompts = [first if source < 2 else second for source in sources]
    texts = [
        [*(first_tokens if source < 2 else second_tokens)[:3], *more[source][:5], *more[b][5:]]
        for b, source in enumerate(sources)
    ]
    alone_cache, alone = feed(MODEL, fresh(prompts, cache_of(pair)).cache, texts)
    coded = any(choice.codec == INT8 for choice in pair)
    exact = equal_but_for_flips(list(shared[:, :4]), list(alone[:, 8:12]), coded)
    for b in range(BATCH):
        assert held_everywhere(cache, b) == held_everywhere(alone_cache, b) or not exact[b]


# Pages


@pytest.mark.parametrize("pair", matrix([UNIFORM[Full()], UNIFORM[HEAVY]], [UNIFORM[STREAM]]))
def test_any_permutation_of_pages_generates_the_same_tokens(pair):
    cache = cache_of(pair)
    prompts = [prompt for prompt, _ in RAGGED]
    expected, state = kvjax.extend(MODEL, fresh(prompts, cache), max_new_tokens=FORCED)
    for seed in (1, 2):
        out, permuted = kvjax.extend(MODEL, fresh(prompts, cache, seed), max_new_tokens=FORCED)
        # The same program on the same numbers, wherever they lie: equal to the last bit.
        assert out.tokens == expected.tokens
        assert out.logprobs == expected.logprobs
        assert not np.array_equal(permuted.cache.groups[0].table, state.cache.groups[0].table)


@pytest.mark.parametrize("page_size", [pytest.param(16, marks=pytest.mark.slow), 64])
def test_page_sizes_generate_identical_tokens(page_size):
    prompts = [list(prompt) for prompt, _ in RAGGED]
    small, large = (
        kvjax.generate(MODEL, prompts, FORCED, CacheConfig(page_size=size), prefill_chunk=CHUNK)
        for size in (4, page_size)
    )
    assert small.tokens == large.tokens
    np.testing.assert_allclose(small.logprobs, large.logprobs, rtol=0, atol=1e-5)  # sums over more slots: float32 noise


def test_paged_equals_contiguous_token_for_token():
    prompts = [list(prompt) for prompt, _ in RAGGED]
    out = kvjax.generate(MODEL, prompts, FORCED, CacheConfig(page_size=4), prefill_chunk=CHUNK)
    texts = [prompt + tokens for prompt, tokens in zip(prompts, out.tokens, strict=True)]
    padded = np.zeros((BATCH, 32), np.int32)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    likeliest = np.asarray(kvjax.score(MODEL, padded)).argmax(-1)
    for row, prompt, tokens in zip(likeliest, prompts, out.tokens, strict=True):
        assert row[len(prompt) - 1 : len(prompt) - 1 + FORCED].tolist() == tokens


# Layers that the model itself windows


@pytest.mark.parametrize("policy", [Full(), *(pytest.param(p, marks=pytest.mark.slow) for p in (LOOK, HEAVY))], ids=str)
def test_a_layer_with_a_window_of_its_own_sees_no_further(policy):
    model = model_of(dataclasses.replace(CONFIG, windows=(8, None)))
    choice = Choice(policy, DENSE, 4)
    first, second = (
        group.layout for group in check_steps(model, (choice, choice), (8 if policy == Full() else None, None)).groups
    )
    assert (first.layers, second.layers) == ((0,), (1,))
    if policy == Full():
        assert first.policy == SlidingWindow(8), "what the layer can never look at again is not kept"
        assert first.pages_per_row(LENGTH) == 2
