"""What must hold of every eviction and merging method, on its oracle alone.

All arithmetic is float64 on networks of two to five layers: where a tolerance is not explained, it is 1e-9, several
orders above the accumulated rounding of float64 (about 1e-13 on logits of order one) and below any effect of a
misplaced token.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest

from kvjax.config import ModelConfig
from tests.oracles import decoder, merging, policies
from tests.oracles.codecs import Dense, Int8
from tests.oracles.matrix import matrix_forward
from tests.oracles.merging import DMC, KVMerger
from tests.oracles.page_codecs import KIVI
from tests.oracles.policies import H2O, Entry, Full, LMInfinite, Moment, SlidingWindow
from tests.oracles.prompt_policies import PROFILES, FastGen, PyramidKV, SnapKV, pool
from tests.oracles.pyramid_infer import PyramidInfer
from tests.oracles.scissorhands import Look, Scissorhands, least_flip
from tests.oracles.weights import random_params

TOLERANCE = 1e-9
VOCAB, LENGTH = 61, 24
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "rope_theta": 100.0,  # at these lengths every pair turns noticeably
}
GQA = ModelConfig(**BASE)
DEEP = ModelConfig(**{**BASE, "num_layers": 5})
GATED = ModelConfig(**BASE, qkv_bias=True)
PARAMS: dict[ModelConfig, Any] = {config: random_params(config, seed=1) for config in (GQA, DEEP, GATED)}
TOKENS = np.random.default_rng(0).integers(0, VOCAB, LENGTH).tolist()
IDS = (frozenset(TOKENS[2:4]), frozenset(TOKENS[8:10]))
"""Tokens that pass for special ones and for punctuation."""

SMALL: list[policies.OraclePolicy] = [
    LMInfinite(2, 4),
    Scissorhands(6, 2),
    Scissorhands(8, 3, history=4, drop=2),
    FastGen(0.6, 0.2, 0.2, *IDS),
    FastGen(0.85, 0.2, 0.2, *IDS, sizes="whole", pins="prompt"),
    SnapKV(7, 3, 3),
    PyramidKV(7, 3, 3),
    PyramidInfer(2, exceed=3, keep=0.6),
    KVMerger(3, 3, 0.2),
]


def run(
    split: int, policy: policies.OraclePolicy, codec: Any = None, config: ModelConfig = GQA, params: Any = None
) -> decoder.Result:
    return decoder.run(params or PARAMS[config], config, TOKENS[:split], TOKENS[split:], policy, codec)


@functools.cache
def full(split: int, config: ModelConfig = GQA) -> decoder.Result:
    return run(split, Full(), config=config)


@functools.cache
def weights_of(length: int, config: ModelConfig = GQA) -> np.ndarray:
    """Attention weights [L, H, T, T] of the first tokens, by the other forward."""
    return matrix_forward(PARAMS[config], config, TOKENS[:length])[1]


def grouped(weights: np.ndarray) -> np.ndarray:
    """Sums over the query heads of a group: [L, H, T, T] -> [L, K, T, T]."""
    layers, heads, *rest = weights.shape
    return weights.reshape(layers, 2, heads // 2, *rest).sum(2)


def close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


def same(ours: decoder.Result, theirs: decoder.Result) -> None:
    """Equal logits after the last prompt token and every step, and equal sets attended."""
    close(ours.step_logits, theirs.step_logits)
    assert ours.attended == theirs.attended


def top(scores: np.ndarray, count: int) -> set[int]:
    return set(np.argsort(scores)[len(scores) - count :].tolist())


def moments(policy: policies.OraclePolicy, split: int, config: ModelConfig = GQA) -> list[Moment]:
    """What the policy is asked after the prompt and each step, per layer, and the entries before it answered."""
    asked: list[Moment] = []

    class Spy(type(policy)):  # type: ignore[misc]
        def decide(self, moment: Moment) -> policies.Decision:
            held = [[dataclasses.replace(e) for e in entries] for entries in moment.held]
            asked.append(dataclasses.replace(moment, held=held))
            return super().decide(moment)

    run(split, Spy(**{f.name: getattr(policy, f.name) for f in dataclasses.fields(policy)}), config=config)
    return asked


# All of them


@pytest.mark.parametrize("split", [1, 11, LENGTH])
@pytest.mark.parametrize(
    "policy",
    [
        LMInfinite(4, LENGTH),
        LMInfinite(1, LENGTH - 1),
        Scissorhands(LENGTH - 1, 4),
        Scissorhands(LENGTH - 1, 0, drop=1),
        FastGen(1.1),
        SnapKV(LENGTH, 6),
        PyramidKV(LENGTH, 6),
        PyramidInfer(keep=1.0, exceed=1),
        KVMerger(LENGTH, 0, -2.0),
        KVMerger(0, 0, 2.0),
    ],
    ids=str,
)
def test_a_budget_of_the_whole_length_equals_full(policy, split):
    same(run(split, policy), full(split))


@pytest.mark.parametrize(
    "policy",
    [
        LMInfinite(1, LENGTH - 2),
        Scissorhands(LENGTH - 2, 4, drop=1),
        FastGen(0.3, 0.05, 0.05),
        SnapKV(19, 6),
        PyramidKV(19, 6),
        PyramidInfer(keep=0.8),
    ],
    ids=str,
)
def test_one_less_does_not_equal_full(policy):
    split = 1 if isinstance(policy, LMInfinite | Scissorhands) else 20
    assert np.abs(run(split, policy).step_logits - full(split).step_logits).max() > 1e-6


@pytest.mark.parametrize("split", [1, 7, 15])
@pytest.mark.parametrize("policy", SMALL, ids=str)
def test_evicted_is_gone_and_no_position_repeats(policy, split):
    config = DEEP if isinstance(policy, KVMerger) else GQA
    result = run(split, policy, config=config)
    for step in range(1, LENGTH + 1 - split):
        current = split + step - 1
        for layer in range(config.num_layers):
            for head in range(2):
                before, after = set(result.kept[step - 1][layer][head]), result.kept[step][layer][head]
                during = set(result.attended[step][layer][head])
                assert len(set(after)) == len(after)
                assert current in during <= before | {current}
                assert set(after) <= during


@pytest.mark.parametrize(
    "policy", [p for p in SMALL if not isinstance(p, LMInfinite | PyramidInfer | KVMerger)], ids=str
)
def test_logits_are_those_of_a_matrix_masked_to_what_was_attended(policy):
    split = 15
    result = run(split, policy)
    mask = np.broadcast_to(np.tril(np.ones((LENGTH, LENGTH), bool)), (2, 4, LENGTH, LENGTH)).copy()
    for query in range(split, LENGTH):
        for layer in range(2):
            for head in range(4):
                mask[layer, head, query] = False
                mask[layer, head, query, list(result.attended[query - split + 1][layer][head // 2])] = True
    close(result.logits, matrix_forward(PARAMS[GQA], GQA, TOKENS, mask)[0])


@pytest.mark.parametrize("policy", SMALL, ids=str)
def test_only_what_appends_may_be_coded_in_groups_of_slots(policy):
    if policy.append_only:
        assert isinstance(policy, SnapKV | KVMerger)
        run(15, policy, KIVI(2, 4, 8))
    else:
        with pytest.raises(ValueError, match="may write again"):
            run(15, policy, KIVI(2, 4, 8))


# LMInfinite


@pytest.mark.parametrize("sinks", [1, 3])
@pytest.mark.parametrize("window", [4, 9])
def test_lm_infinite_equals_full_up_to_one_more_than_its_window_and_not_beyond(sinks, window):
    for split in (1, 3, LENGTH):
        difference = np.abs(run(split, LMInfinite(sinks, window)).logits - full(split).logits).max(-1)
        assert difference[: window + 1].max() < TOLERANCE
        assert difference[window + 1] > 1e-6


@pytest.mark.parametrize("window", [1, 2, 6])
def test_lm_infinite_without_sinks_is_a_sliding_window(window):
    for split in (1, 11):
        infinite, sliding = run(split, LMInfinite(0, window)), run(split, SlidingWindow(window))
        same(infinite, sliding)
        assert infinite.kept == sliding.kept


@pytest.mark.parametrize(("sinks", "window"), [(2, 4), (1, 1), (5, 7)])
def test_lm_infinite_is_a_mask_and_a_capped_distance_however_the_prompt_is_split(sinks, window):
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None, :]
    mask = np.broadcast_to((j <= i) & ((j > i - window) | (j < sinks)), (2, 4, LENGTH, LENGTH))
    expected = matrix_forward(PARAMS[GQA], GQA, TOKENS, mask, np.minimum(i - j, window))[0]
    for split in (1, 9, LENGTH):
        close(run(split, LMInfinite(sinks, window)).logits, expected)
    assert np.abs(matrix_forward(PARAMS[GQA], GQA, TOKENS, mask)[0] - expected).max() > 1e-3


@pytest.mark.parametrize("sinks", [2, 0])
def test_lm_infinite_under_a_layers_narrower_window_is_refused_unless_it_is_a_window(sinks):
    config = ModelConfig(**BASE, windows=(4, None))
    if sinks:
        with pytest.raises(ValueError, match="nowhere defined"):
            run(5, LMInfinite(sinks, 4), config=config, params=PARAMS[GQA])
    else:
        same(
            run(5, LMInfinite(0, 6), config=config, params=PARAMS[GQA]),
            run(5, SlidingWindow(6), config=config, params=PARAMS[GQA]),
        )


# Scissorhands


@pytest.mark.parametrize("budget", [1, 2, 6])
def test_scissorhands_of_recent_tokens_alone_dropping_one_is_a_sliding_window_one_wider(budget):
    same(run(1, Scissorhands(budget, budget, drop=1)), run(1, SlidingWindow(budget + 1)))


@pytest.mark.parametrize("split", [1, 5, 15])
@pytest.mark.parametrize(
    ("policy", "drop"), [(Scissorhands(6, 2), 3), (Scissorhands(7, 2), 3), (Scissorhands(8, 3, 4, 2), 2)], ids=str
)
def test_scissorhands_fills_its_budget_and_then_drops_several_at_once(policy, drop, split):
    result, expected = run(split, policy), min(split, policy.budget)
    for kept in result.kept:
        assert {len(positions) for heads in kept for positions in heads} == {expected}
        expected = expected + 1 if expected < policy.budget else policy.budget + 1 - drop
    for step, kept in enumerate(result.kept):
        newest = set(range(max(0, split + step - policy.recent), split + step))
        assert all(newest <= set(positions) for heads in kept for positions in heads)


def passed_over(length: int, history: int) -> np.ndarray:
    """How often each token fell below an even share in the last rows: int[L, K, T]."""
    weights = grouped(weights_of(length)) / 2
    shares = 1 / np.arange(1, length + 1)
    rows = np.arange(length)
    below = (weights < shares[:, None]) & (rows[:, None] >= rows[None, :]) & (rows[:, None] >= length - history)
    return below.sum(2)


def spared(counts: np.ndarray, recent: int, dropped: int) -> tuple[int, ...]:
    """Positions left when the `dropped` most passed over, the older first, go."""
    order = sorted(range(len(counts) - recent), key=lambda p: (-counts[p], p))
    return tuple(sorted(set(range(len(counts))) - set(order[:dropped])))


@pytest.mark.parametrize("history", [1, 5, 400])
def test_scissorhands_keeps_of_a_prompt_what_its_last_rows_passed_over_least(history):
    counts = passed_over(20, history)
    kept = run(20, Scissorhands(7, 3, history)).kept[0]
    assert kept == [[spared(counts[layer, head], 3, 13) for head in range(2)] for layer in range(2)]


def test_scissorhands_counts_the_prompts_rows_while_they_are_recent():
    # Nothing is dropped before the last step, so counts are those of the whole matrix.
    counts = passed_over(LENGTH, 9)
    kept = run(18, Scissorhands(LENGTH - 1, 4, 9, drop=5)).kept[-1]
    assert kept == [[spared(counts[layer, head], 4, 5) for head in range(2)] for layer in range(2)]


def test_the_margin_of_counts_is_the_farthest_comparison_that_must_turn():
    below, above = Look(9, True, 0.1), Look(9, False, 0.2)
    # One against none: the older goes unless both turn; the newer stays as soon as one turns.
    assert least_flip([below], [above], older=True) == 0.2
    assert least_flip([below], [above], older=False) == 0.1
    assert least_flip([below], [below], older=True) == 0.1
    assert least_flip([below], [], older=True) == np.inf


# FastGen


def test_fastgen_that_needs_nothing_keeps_special_tokens_alone():
    policy = FastGen(0.0, special=IDS[0], punctuation=IDS[1])
    result = run(12, policy)
    for step, kept in enumerate(result.kept):
        special = tuple(p for p, token in enumerate(TOKENS[: 12 + step]) if token in IDS[0])
        assert kept == [[special] * 2] * 2
        if step:
            assert result.attended[step] == [[tuple(sorted({*result.kept[step - 1][0][0], 11 + step}))] * 2] * 2


def test_what_fastgen_recovers_is_mass_on_what_it_keeps_and_grows_along_the_list():
    length, policy = 20, FastGen(2.0, 0.2, 0.25, *IDS)
    weights = grouped(weights_of(length)) / 2
    i, j = np.arange(length)[:, None], np.arange(length)[None, :]
    special = np.isin(TOKENS[:length], list(IDS[0]))
    punctuation = special | np.isin(TOKENS[:length], list(IDS[1]))
    for layer, moment in enumerate(moments(policy, length)[:2]):
        for head in range(2):
            heavy = np.isin(np.arange(length), list(top(weights[layer, head].sum(0), 4)))
            masks = [special, punctuation, punctuation | heavy, (punctuation | heavy) | (j > i - 5)]
            expected = [float((weights[layer, head] * (mask | (i == j))).sum() / length) for mask in masks]
            ours = [policy.recovered(moment, head, profile) for profile in PROFILES[:-1]]
            close(np.array(ours), np.array(expected))
            assert sorted(ours) == ours
            assert ours[0] < ours[1] < ours[2] < ours[3] < 1
            for profile, mass in zip(PROFILES, [*ours, 1.1], strict=True):
                # The first that is enough is taken, and enough includes exactly enough.
                assert dataclasses.replace(policy, recovery=mass).choose(moment, head)[0] == profile


@pytest.mark.parametrize(
    ("recovery", "profiles"),
    [
        (0.45, {"punctuation", "frequent"}),
        (0.7, {"frequent"}),
        (0.75, {"frequent", "local"}),
        (0.85, {"local", "full"}),
    ],
)
def test_fastgen_goes_on_keeping_what_its_profile_keeps(recovery, profiles):
    split, policy = 15, FastGen(recovery, 0.2, 0.2, *IDS)
    asked, result = moments(policy, split), run(split, policy)
    chosen = [[policy.choose(moment, head)[0] for head in range(2)] for moment in asked[:2]]
    assert {name for names in chosen for name in names} == profiles, "these tokens show something else"
    for index, moment in enumerate(asked):
        step, layer = divmod(index, 2)
        for head, name in enumerate(chosen[layer]):
            held = {e.position for e in moment.held[head]}
            assert step == 0 or held == set(result.attended[step][layer][head])
            # 0.2 of 15 tokens are 3.
            heavy = {e.position for e in sorted(moment.held[head], key=lambda e: e.score)[-3:]}
            near = {p for p in held if p > split + step - 1 - 3}
            ids = {p for p in held if TOKENS[p] in IDS[0] | IDS[1]}
            expected = {"punctuation": ids, "frequent": ids | heavy, "local": ids | heavy | near, "full": held}[name]
            assert set(result.kept[step][layer][head]) == expected
            assert step or name in ("punctuation", "full") or heavy == top(heavy_columns(split)[layer, head], 3)


def heavy_columns(length: int) -> np.ndarray:
    """Column sums of a prompt's weights: [L, K, T]."""
    return grouped(weights_of(length)).sum(2)


def test_fastgen_with_whole_sizes_holds_after_every_step_what_it_held_after_the_prompt():
    result = run(15, FastGen(0.85, 0.2, 0.2, *IDS, sizes="whole", pins="prompt"))
    assert any(len(positions) < 15 for heads in result.kept[0] for positions in heads)
    for step, kept in enumerate(result.kept):
        for heads, first_heads in zip(kept, result.kept[0], strict=True):
            for ours, first in zip(heads, first_heads, strict=True):
                assert len(ours) == (len(first) if len(first) < 15 else 15 + step)


# SnapKV and PyramidKV


@pytest.mark.parametrize(("window", "kernel"), [(3, 1), (3, 5), (1, 3), (6, 3)])
def test_snapkv_keeps_its_window_and_the_top_of_pooled_column_sums(window, kernel):
    result, sums = run(20, SnapKV(9, window, kernel)), grouped(weights_of(20))[:, :, 20 - window :].sum(2)
    for layer in range(2):
        for head in range(2):
            pooled = np.convolve(sums[layer, head, : 20 - window], np.ones(kernel) / kernel, mode="same")
            expected = top(pooled, 9 - window) | set(range(20 - window, 20))
            assert set(result.kept[0][layer][head]) == expected
            for step in range(5):
                assert set(result.kept[step][layer][head]) == expected | set(range(20, 20 + step))


def test_pooling_over_one_is_nothing_and_beyond_the_ends_are_zeros_that_count():
    weights = {0: 3.0, 1: 1.0, 2: 5.0}
    assert pool(weights, 1) == weights
    assert pool(weights, 3) == pytest.approx({0: 4 / 3, 1: 3.0, 2: 2.0})


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (200, [71, 59, 47, 35, 23, 11]),
        (68, [68, 57, 46, 35, 24, 13]),
        (63, [40] * 6),
        (40, [40] * 6),
        (17, [17] * 6),
    ],
)
def test_pyramidkv_budgets_of_six_layers(length, expected):
    assert PyramidKV(40).budgets(length, 6) == expected
    assert PyramidKV(40).budgets(length, 1) == [min(length, 40)]


def test_pyramidkv_is_snapkv_with_a_budget_per_layer():
    policy = PyramidKV(9, 3, 3)
    budgets = policy.budgets(20, 5)
    assert budgets == [15, 12, 9, 6, 3]
    result = run(20, policy, config=DEEP)
    for layer, budget in enumerate(budgets):
        assert result.kept[0][layer] == run(20, SnapKV(budget, 3, 3), config=DEEP).kept[0][layer]
    assert run(11, policy).kept == run(11, SnapKV(9, 3, 3)).kept, "a prompt below twice the mean"


# PyramidInfer


def test_pyramid_infer_passes_on_what_it_keeps_and_kept_sets_nest_with_depth():
    policy = PyramidInfer(sinks=2, keep=0.5)
    result = run(20, policy, config=DEEP)
    alive, mask = set(range(20)), np.zeros((5, 4, 20, 20), bool)
    for layer in range(5):
        for query in alive:
            mask[layer, :, query, [p for p in alive if p <= query]] = True
        share = 0.25 * (np.cos(np.pi * layer / 5) + 1) + 0.5
        kept = set(result.kept[0][layer][0])
        assert result.kept[0][layer] == [tuple(sorted(kept))] * 2
        assert kept <= alive
        assert {0, 1, 16, 17, 18, 19} <= kept
        assert len(kept) == 6 + np.ceil(share * (len(alive) - 6) - 1e-9)
        alive = kept
    assert len(alive) < 12
    # What is dropped may see anything here: nobody sees it any more.
    mask |= np.eye(20, dtype=bool)
    logits, weights = matrix_forward(PARAMS[DEEP], DEEP, TOKENS[:20], mask)
    close(result.prompt_logits[sorted(alive)], logits[sorted(alive)])
    assert np.isnan(result.prompt_logits[sorted(set(range(20)) - alive)]).all()
    assert np.abs(result.prompt_logits[-1] - full(20, DEEP).prompt_logits[-1]).max() > 1e-3

    before = set(range(20))
    for layer in range(5):
        rows = weights[layer].mean(0)[16:] * np.linspace(1, 1.2, 4)[:, None]
        others = np.array(sorted(before - {0, 1, 16, 17, 18, 19}))
        kept = set(result.kept[0][layer][0])
        count = len(kept) - 6
        assert {int(others[i]) for i in top(rows.sum(0)[others], count)} == kept - {0, 1, 16, 17, 18, 19}
        before = kept


def test_pyramid_infer_thins_what_came_since_the_last_time_by_the_current_row():
    policy = PyramidInfer(exceed=3, keep=0.5)
    split = 12
    result = run(split, policy)
    for layer in range(2):
        share = 0.5 * (0.25 * (np.cos(np.pi * layer / 2) + 1) + 0.5)
        for step in range(1, LENGTH + 1 - split):
            before, after = set(result.kept[step - 1][layer][0]), set(result.kept[step][layer][0])
            current = split + step - 1
            if step % 4:
                assert after == before | {current}
            else:
                came = set(range(current - 3, current + 1))
                assert current in after
                assert len(after & came) == np.ceil(share * 4)
                assert after - came == before - came, "what stayed once stays"


@pytest.mark.parametrize(("share", "count", "expected"), [(0.2, 35, 7), (0.1, 30, 3), (0.3, 11, 4), (0.2, 1, 1)])
def test_shares_are_rounded_up_as_they_are_written(share, count, expected):
    assert policies.ceiling(share, count) == expected


# KVMerger


def test_kvmerger_holds_one_entry_per_run_and_leaves_the_first_two_layers_and_the_last():
    policy = KVMerger(3, 3, 0.3)
    result = run(20, policy, config=DEEP)
    merged = 0
    for layer, moment in enumerate(moments(policy, 20, DEEP)[:5]):
        for head, entries in enumerate(moment.held):
            kept = result.kept[0][layer][head]
            if layer in (0, 1, 4):
                assert kept == tuple(range(20))
                continue
            score = np.array([e.score for e in entries])
            heavy, runs = top(score[:17], 3), []
            for p in range(17):
                linked = p and p not in heavy and p - 1 not in heavy
                if linked and merging.cosine(entries[p - 1].key, entries[p].key) > 0.3:
                    runs[-1].append(p)
                elif p not in heavy:
                    runs.append([p])
            assert len(kept) == 20 - sum(len(members) - 1 for members in runs)
            assert set(kept) == heavy | {17, 18, 19} | {max(members, key=lambda p: score[p]) for members in runs}
            merged += 20 - len(kept)
    assert merged > 6, "these tokens show nothing"
    assert result.kept[-1][2][0] == (*result.kept[0][2][0], 20, 21, 22, 23), "generated tokens all stay"


def entries(keys: np.ndarray, values: np.ndarray | None = None) -> list[Entry]:
    return [Entry(p, k, v) for p, (k, v) in enumerate(zip(keys, keys if values is None else values, strict=True))]


def test_a_pair_merges_by_one_to_the_root_of_e():
    # With one other token the variance is its own squared distance.
    rng = np.random.default_rng(2)
    keys, values = rng.standard_normal((2, 2, 8))
    key, value = merging.blend(entries(keys, values), 1)
    share = 1 / (1 + np.exp(-0.5))
    close(key, share * keys[1] + (1 - share) * keys[0])
    close(value, share * values[1] + (1 - share) * values[0])


def test_identical_tokens_merge_to_themselves_and_weights_sum_to_one():
    rng = np.random.default_rng(3)
    twin = rng.standard_normal(8)
    key, value = merging.blend(entries(np.stack([twin] * 3)), 1)
    close(key, twin)
    close(value, twin)
    # Values that are all one stay so, whatever the keys.
    _, value = merging.blend(entries(rng.standard_normal((4, 8)), np.ones((4, 8))), 2)
    close(value, np.ones(8))


def test_what_is_attended_after_the_prompt_is_the_blend():
    policy = KVMerger(2, 2, -2.0)
    state = decoder.Decoder(PARAMS[DEEP], DEEP, policy, Dense())
    state.feed_prompt(TOKENS[:12])
    before = moments(policy, 12, DEEP)[2].held[0]
    heavy = top(np.array([e.score for e in before[:10]]), 2)
    first = next(p for p in range(10) if p not in heavy)
    last = next(p for p in range(first, 11) if p in heavy or p == 10)
    members = before[first:last]
    pivot = max(members, key=lambda e: e.score).position
    (entry,) = (e for e in state.cache[2][0] if e.position == pivot)
    key, value = merging.blend(members, pivot) if len(members) > 1 else (members[0].key, members[0].value)
    close(entry.key, key)
    close(entry.value, value)
    coded = decoder.Decoder(PARAMS[DEEP], DEEP, policy, Int8())
    coded.feed_prompt(TOKENS[:12])
    for kept in coded.cache[2][0]:
        # A merged entry is stored like any other: coding what is coded moves it by the scale's own rounding at most.
        close(Int8().roundtrip(kept.key), kept.key, 1e-6)


# DMC


def gated(bias: float | None, spread: float = 6.0) -> dict[str, Any]:
    """Parameters whose keys' last channel is `bias` (None: scattered about where decisions change)."""
    params = {**PARAMS[GATED]}
    rng = np.random.default_rng(4)
    for layer in range(2):
        attention = {**params[f"layers_{layer}"]["attention"]}
        weight, offset = (attention["k"][name].copy() for name in ("weight", "bias"))
        weight[7::8] = 0.0 if bias is not None else spread * rng.standard_normal(weight[7::8].shape) / 32**0.5
        offset[7::8] = 5.0 if bias is None else bias
        attention["k"] = {"weight": weight, "bias": offset}
        # Importances all over (0, 1), not all next to 1.
        query = {name: attention["q"][name].copy() for name in ("weight", "bias")}
        query["bias"][7::8] -= 5.0
        attention["q"] = query
        params[f"layers_{layer}"] = {**params[f"layers_{layer}"], "attention": attention}
    return params


def without_neurons(params: dict[str, Any]) -> dict[str, Any]:
    params = {**params}
    for layer in range(2):
        attention = {**params[f"layers_{layer}"]["attention"]}
        for name in "qk":
            attention[name] = {leaf: value.copy() for leaf, value in attention[name].items()}
            attention[name]["weight"][7::8] = 0.0
            attention[name]["bias"][7::8] = 0.0
        params[f"layers_{layer}"] = {**params[f"layers_{layer}"], "attention": attention}
    return params


@pytest.mark.parametrize("split", [1, 11, LENGTH])
def test_dmc_that_always_appends_is_full_without_its_two_neurons(split):
    params = gated(-100.0)
    dmc = run(split, DMC(), config=GATED, params=params)
    same(dmc, run(split, Full(), config=GATED, params=without_neurons(params)))
    assert dmc.kept[-1] == [[tuple(range(LENGTH))] * 2] * 2
    # The neurons do matter to who does not know of them.
    assert np.abs(dmc.logits - run(split, Full(), config=GATED, params=params).logits).max() > 1e-3


@pytest.mark.parametrize("split", [1, 11, LENGTH])
def test_dmc_that_always_merges_holds_one_slot_the_mean_by_importance(split):
    params = gated(100.0)
    state = decoder.Decoder(params, GATED, DMC(), Dense())
    state.feed_prompt(TOKENS[:split])
    for count, token in enumerate(TOKENS[split:], split + 1):
        state.feed(token)
        assert state.kept() == [[(count - 1,)] * 2] * 2
    check_blends(state, params)


@pytest.mark.parametrize("split", [2, 11, LENGTH])
def test_dmc_makes_of_a_prompt_what_it_makes_of_it_token_by_token(split):
    params = gated(None)
    expected, ours = run(1, DMC(), config=GATED, params=params), run(split, DMC(), config=GATED, params=params)
    close(ours.logits, expected.logits)
    assert ours.kept == expected.kept[split - 1 :]
    assert ours.attended == expected.attended[split - 1 :]
    assert 2 < len(ours.kept[-1][0][0]) < LENGTH - 2, "these weights show nothing"
    state = decoder.Decoder(params, GATED, DMC(), Dense())
    state.feed_prompt(TOKENS)
    check_blends(state, params)


def check_blends(state: decoder.Decoder, params: dict[str, Any]) -> None:
    """The first layer's entries are the sums over runs that each token ends, computed without any recursion."""
    params = decoder.to_float64(params)
    weights = params["layers_0"]
    x = decoder.rms_norm(params["embed"]["embedding"][TOKENS], weights["attention_norm"]["scale"], GATED.norm_eps)
    query, key, value = (decoder.dense(x, weights["attention"][name]).reshape(LENGTH, -1, 8) for name in "qkv")
    for head in range(2):
        alpha, omega, _ = merging.decisions(key[:, head], query[:, 2 * head : 2 * head + 2])
        assert 0.001 < omega.min() < 0.1 < 0.9 < omega.max() < 0.999
        bare = key[:, head].copy()
        bare[:, -1] = 0.0
        keys = merging.partial_sums(alpha, omega, bare)[-1]
        values = merging.partial_sums(alpha, omega, value[:, head])[-1]
        held = state.cache[0][head]
        assert [e.position for e in held] == [p for p, _ in keys]
        for entry, (position, k), (_, v) in zip(held, keys, values, strict=True):
            close(entry.key, decoder.rotate(k[None], [position], GATED.rope_theta)[0])
            close(entry.value, v)


def test_dmc_decides_at_one_half_to_append_and_always_for_the_first_token():
    key = np.zeros((3, 8))
    key[:, -1] = [9.0, 5.0, 5.1]
    query = np.zeros((3, 2, 8))
    query[:, 0, -1] = -10.0
    alpha, omega, margin = merging.decisions(key, query)
    assert alpha.tolist() == [True, False, True]
    close(omega, np.full(3, 0.5))
    assert margin == 0.0
    assert [[p for p, _ in held] for held in merging.partial_sums(alpha, omega, key)] == [[0], [0, 1], [0, 2]]


def test_dmc_under_layers_that_share_is_refused():
    config = dataclasses.replace(GATED, owners=(0, 0))
    with pytest.raises(ValueError, match="nowhere defined"):
        run(5, DMC(), config=config, params=PARAMS[GATED])


# Reading kvjax's own configurations


@pytest.mark.parametrize("policy", [*SMALL, DMC(), H2O(3, 2)], ids=str)
def test_counterparts_are_found_by_name_and_take_the_same_arguments(policy):
    fields = [f for f in dataclasses.fields(policy) if not f.metadata.get("choice")]
    theirs = dataclasses.make_dataclass(type(policy).__name__, [f.name for f in fields], frozen=True)
    choices = {f.name: getattr(policy, f.name) for f in dataclasses.fields(policy) if f.metadata.get("choice")}
    assert policies.counterpart(theirs(*(getattr(policy, f.name) for f in fields)), **choices) == policy
