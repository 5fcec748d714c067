"""Every policy, codec and page size against the NumPy oracle, and the identities that tie the methods to one another.

Weights, tokens and shapes are those of `tests.cache.tiny`, as are the tolerances and where they come from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import kvjax
from kvjax import CacheConfig
from kvjax.cache.codecs import Dense, Int8
from kvjax.cache.policies import H2O, TOVA, Full, SlidingWindow, StreamingLLM
from kvjax.cache.size import context_bucket, size_groups
from kvjax.cache.state import Cache
from kvjax.generate.prefill import reserve_pages, run_prompts
from kvjax.generate.state import State, layouts_of, make_cache
from tests.cache.tiny import (
    BATCH,
    CHUNK,
    CONFIG,
    LOGITS,
    MARGIN,
    MODEL,
    feed,
    held_everywhere,
    logits_after,
    model_of,
    oracle,
    random_tokens,
)
from tests.oracles import codecs as oracle_codecs
from tests.oracles import decoder
from tests.oracles import policies as oracle_policies
from tests.oracles.weights import random_params

LENGTH = 24
TOKENS = random_tokens(15, BATCH, LENGTH)  # of some seeds tried, one without near ties in what TOVA and H2O choose
PROMPTS = (10, 1, 15, 5)
FORCED = 9
ONE_FLIP = 0.05
"""How far logits may be off once a code of Int8 rounded the other way.

A code is off by one where float32 and float64 fall on two sides of a half, a few times in a hundred thousand codes. All
codes together, each off by up to a half from no coding at all, were seen to move logits by 0.04.
"""

POLICIES = (Full(), SlidingWindow(6), StreamingLLM(2, 5), TOVA(6), H2O(4, 3))
CELLS = [(policy, codec, size) for policy in POLICIES for codec in (Dense(), Int8()) for size in (4, 16)]
CELLS.append((Full(), Dense(), 64))


def rows() -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The ragged batch: prompts, and what is forced behind each."""
    return [
        (tuple(row[:length].tolist()), tuple(row[length : length + FORCED].tolist()))
        for row, length in zip(TOKENS, PROMPTS, strict=True)
    ]


def decoded(cache: CacheConfig, prompt_length: int = 5) -> np.ndarray:
    """float32[B, T, V] of `TOKENS` along the decode path."""
    path: Any = "decode"
    return np.asarray(kvjax.score(MODEL, TOKENS, cache, path, prompt_length=prompt_length, prefill_chunk=CHUNK))


def equal_but_for_flips(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], codec: Any) -> list[bool]:
    """Asserts that sequences agree, and says which do exactly: all, or under Int8 all but one that has seen a flip."""
    worst = [float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True)]
    exact = [error < LOGITS for error in worst]
    if isinstance(codec, Dense):
        assert all(exact), worst
    else:
        assert sum(exact) >= len(exact) - 1, worst
        assert max(worst) < ONE_FLIP, worst
    return exact


def teacher_forced(
    model: kvjax.Model, cache: CacheConfig
) -> tuple[list[np.ndarray], list[list[decoder.Positions]], Cache]:
    """The ragged batch, token by token: per sequence logits [1 + FORCED, V] and what is held after each token."""
    batch = rows()
    state = kvjax.prefill(model, [list(prompt) for prompt, _ in batch], cache, room=FORCED, prefill_chunk=CHUNK)
    live = state.cache
    logits = [logits_after(model, state)]
    kept = [[held_everywhere(live, b, model.config)] for b in range(BATCH)]
    for step in range(FORCED):
        live, block = feed(model, live, [[forced[step]] for _, forced in batch])
        logits.append(block[:, 0])
        for b in range(BATCH):
            kept[b].append(held_everywhere(live, b, model.config))
    return [np.stack([step[b] for step in logits]) for b in range(BATCH)], kept, live


@pytest.mark.parametrize(("policy", "codec", "page_size"), CELLS, ids=str)
def test_logits_and_kept_tokens_are_the_oracles(policy, codec, page_size):
    cache = CacheConfig(page_size=page_size, policy=policy, codec=codec)

    prefilled = kvjax.score(MODEL, TOKENS, cache, "prefill", prefill_chunk=CHUNK)
    whole = [oracle(tuple(row), (), policy, codec).logits for row in TOKENS.tolist()]
    equal_but_for_flips(list(np.asarray(prefilled)), whole, codec)

    split = [oracle(tuple(row[:5]), tuple(row[5:]), policy, codec).logits for row in TOKENS.tolist()]
    equal_but_for_flips(list(decoded(cache)), split, codec)

    results = [oracle(prompt, forced, policy, codec) for prompt, forced in rows()]
    assert min(result.margin for result in results) > MARGIN, "these tokens leave a choice to rounding"
    logits, kept, live = teacher_forced(MODEL, cache)
    exact = equal_but_for_flips(logits, [result.step_logits for result in results], codec)
    for b, result in enumerate(results):
        if exact[b]:
            assert kept[b] == result.kept, f"sequence {b}"
    if isinstance(policy, H2O) and isinstance(codec, Dense):
        check_scores(live, results)


def check_scores(live: Cache, results: Sequence[decoder.Result]) -> None:
    """What H2O has accumulated, per token that is held; within less than half of `MARGIN`."""
    group = live.groups[0]
    for b, result in enumerate(results):
        for layer in range(2):
            for head in range(2):
                row = layer * 2 + head
                position = np.asarray(group.position[row, b])
                score = dict(zip(position.tolist(), np.asarray(group.row_state["score"][row, b]).tolist(), strict=True))
                for place, expected in result.scores[-1][layer][head].items():
                    assert abs(score[place] - expected) < MARGIN / 2.5, (b, layer, head, place)


# Identities


@pytest.mark.parametrize("policy", [SlidingWindow(24), StreamingLLM(4, 20), TOVA(23), H2O(20, 3)], ids=str)
def test_a_budget_of_the_whole_length_equals_full(policy):
    expected = decoded(CacheConfig(page_size=4))
    # Both are float32; StreamingLLM merges two partial results, the others only read in another order.
    np.testing.assert_allclose(decoded(CacheConfig(page_size=4, policy=policy)), expected, rtol=0, atol=5e-5)


def test_streaming_without_sinks_is_a_sliding_window():
    sliding = decoded(CacheConfig(page_size=4, policy=SlidingWindow(6)))
    # The same arithmetic on the same slots: float32 noise at most.
    np.testing.assert_allclose(decoded(CacheConfig(page_size=4, policy=StreamingLLM(0, 6))), sliding, rtol=0, atol=1e-5)


def test_h2o_without_heavy_hitters_fed_from_one_token_is_a_sliding_window_one_wider():
    sliding = decoded(CacheConfig(page_size=4, policy=SlidingWindow(6)), prompt_length=1)
    h2o = decoded(CacheConfig(page_size=4, policy=H2O(0, 5)), prompt_length=1)
    # Slots differ, so sums run in another order: float32 noise.
    np.testing.assert_allclose(h2o, sliding, rtol=0, atol=5e-5)


@pytest.mark.parametrize("codec", [Dense(), Int8()], ids=str)
@pytest.mark.parametrize("policy", [Full(), SlidingWindow(6), StreamingLLM(2, 5)], ids=str)
def test_how_a_prompt_is_split_is_irrelevant_to_policies_that_append_or_slide(policy, codec):
    if isinstance(codec, Int8) and not isinstance(policy, StreamingLLM):
        pytest.skip("one more program per chunk size would show nothing that the others do not")
    cache = CacheConfig(page_size=4, policy=policy, codec=codec)
    expected = np.asarray(kvjax.score(MODEL, TOKENS, cache, "prefill", prefill_chunk=CHUNK))
    for chunk in (4, 64):
        ours = np.asarray(kvjax.score(MODEL, TOKENS, cache, "prefill", prefill_chunk=chunk))
        equal_but_for_flips(list(ours), list(expected), codec)
    equal_but_for_flips(list(decoded(cache, prompt_length=1)), list(expected), codec)


def fresh(prompts: Sequence[Sequence[int]], cache: CacheConfig, permutation_seed: int | None = None) -> State:
    """`kvjax.prefill` into a cache of always `BATCH` sequences, its free pages in another order if a seed is given."""
    layouts = layouts_of(MODEL, cache)
    empty = make_cache(layouts, BATCH, size_groups(layouts, BATCH, LENGTH, None))
    if permutation_seed is not None:
        rng = np.random.default_rng(permutation_seed)
        groups = tuple(
            dataclasses.replace(group, free=rng.permutation(group.num_pages).astype(np.int32)) for group in empty.groups
        )
        empty = dataclasses.replace(empty, groups=groups)
    lengths = np.zeros(BATCH, np.int32)
    lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
    live, shortage = reserve_pages(empty, lengths)
    assert not bool(shortage.any)
    listed = [list(prompt) for prompt in prompts]
    live, last, _ = run_prompts(MODEL, live, listed, context=context_bucket(LENGTH), fresh=True, chunk=CHUNK)
    return State(live, cache, tuple(map(tuple, prompts)), last, 0)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_ragged_batch_equals_each_sequence_alone(policy):
    cache = CacheConfig(page_size=4, policy=policy)
    together = fresh([prompt for prompt, _ in rows()], cache)
    together_cache, together_logits = feed(MODEL, together.cache, [forced for _, forced in rows()])
    for b, (prompt, forced) in enumerate(rows()):
        alone, logits = feed(MODEL, fresh([prompt], cache).cache, [forced])
        # The same program on another row of its arrays: what differs is how products are cut into vector registers.
        np.testing.assert_allclose(logits[0, :FORCED], together_logits[b, :FORCED], rtol=0, atol=1e-5)
        assert held_everywhere(alone, 0) == held_everywhere(together_cache, b)


# Pages


@pytest.mark.parametrize("policy", [Full(), StreamingLLM(2, 5), H2O(4, 3)], ids=str)
def test_any_permutation_of_pages_generates_the_same_tokens(policy):
    cache = CacheConfig(page_size=4, policy=policy)
    prompts = [prompt for prompt, _ in rows()]
    expected, state = kvjax.extend(MODEL, fresh(prompts, cache), max_new_tokens=FORCED)
    for seed in (1, 2):
        out, permuted = kvjax.extend(MODEL, fresh(prompts, cache, seed), max_new_tokens=FORCED)
        # The same program on the same numbers, wherever they lie: equal to the last bit.
        assert out.tokens == expected.tokens
        assert out.logprobs == expected.logprobs
        assert not np.array_equal(permuted.cache.groups[0].table, state.cache.groups[0].table)


def test_page_sizes_give_identical_tokens_and_paged_equals_contiguous():
    prompts = [list(prompt) for prompt, _ in rows()]
    outs = [
        kvjax.generate(MODEL, prompts, FORCED, CacheConfig(page_size=size), prefill_chunk=CHUNK) for size in (4, 16, 64)
    ]
    assert outs[0].tokens == outs[1].tokens == outs[2].tokens
    texts = [prompt + tokens for prompt, tokens in zip(prompts, outs[0].tokens, strict=True)]
    padded = np.zeros((BATCH, max(map(len, texts))), np.int32)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    likeliest = np.asarray(kvjax.score(MODEL, padded)).argmax(-1)
    for row, prompt, tokens in zip(likeliest, prompts, outs[0].tokens, strict=True):
        assert row[len(prompt) - 1 : len(prompt) - 1 + FORCED].tolist() == tokens


# Layers that differ


class DecoderByLayer(decoder.Decoder):
    """The oracle with a policy and a codec of its own for each layer."""

    def __init__(self, params: dict[str, Any], config: kvjax.ModelConfig, choices: Sequence[tuple[Any, Any]]):
        super().__init__(params, config, oracle_policies.Full(), oracle_codecs.Dense())
        self.choices = choices

    def _attention(self, layer: int, *args: Any) -> np.ndarray:
        self.policy, self.codec = self.choices[layer]
        return super()._attention(layer, *args)


def check_by_layer(
    model: kvjax.Model, cache: CacheConfig, choices: Sequence[tuple[Any, Any]], windows: Sequence[int | None]
) -> None:
    """The ragged batch under `cache` equals the oracle under (policy, codec) `choices` per layer.

    windows: per layer, positions beyond which a policy that keeps all may forget, because the layer never looks there.
    """
    params = random_params(model.config, 1)
    paired = [(oracle_policies.counterpart(policy), oracle_codecs.counterpart(codec)) for policy, codec in choices]
    logits, kept, _ = teacher_forced(model, cache)
    codec: Any = next((codec for _, codec in choices if isinstance(codec, Int8)), Dense())
    oracles = []
    expected_kept: list[list[decoder.Positions]] = []
    for prompt, forced in rows():
        model_run = DecoderByLayer(params, model.config, paired)
        steps = [model_run.feed_prompt(prompt)[-1]]
        sets = [model_run.kept()]
        for token in forced:
            steps.append(model_run.feed(token)[0])
            sets.append(model_run.kept())
        assert model_run.margin > MARGIN, "these tokens leave a choice to rounding"
        oracles.append(np.stack(steps))
        expected_kept.append(
            [
                [
                    [
                        tuple(p for p in positions if window is None or p > len(prompt) + step - 1 - window)
                        for positions in heads
                    ]
                    for heads, window in zip(layers, windows, strict=True)
                ]
                for step, layers in enumerate(sets)
            ]
        )
    exact = equal_but_for_flips(logits, oracles, codec)
    for b in range(BATCH):
        if exact[b]:
            assert kept[b] == expected_kept[b], f"sequence {b}"


@pytest.mark.parametrize("policy", [Full(), TOVA(6), H2O(4, 3)], ids=str)
def test_layers_that_the_model_itself_windows(policy):
    config = dataclasses.replace(CONFIG, windows=(4, None))
    cache = CacheConfig(page_size=4, policy=policy)
    state = kvjax.prefill(model_of(config), [list(rows()[0][0])] * BATCH, cache, room=FORCED, prefill_chunk=CHUNK)
    first, second = (group.layout for group in state.cache.groups)
    assert (first.layers, second.layers) == ((0,), (1,))
    if isinstance(policy, Full):
        assert first.policy == SlidingWindow(4), "memory that the layer can never look at is not kept"
    check_by_layer(model_of(config), cache, [(policy, Dense())] * 2, (4 if isinstance(policy, Full) else None, None))


@pytest.mark.parametrize(
    ("first", "second"),
    [((Full(), Dense(), 4), (H2O(4, 3), Int8(), 16)), ((StreamingLLM(2, 5), Dense(), 16), (TOVA(6), Dense(), 4))],
    ids=["full and h2o-int8", "streaming and tova"],
)
def test_layers_may_differ_in_policy_codec_and_page_size(first, second):
    policy, codec, page_size = first
    deep = CacheConfig(policy=second[0], codec=second[1], page_size=second[2])
    cache = CacheConfig(policy=policy, codec=codec, page_size=page_size, overrides=(((1,), deep),))
    check_by_layer(MODEL, cache, [(policy, codec), (second[0], second[1])], (None, None))
