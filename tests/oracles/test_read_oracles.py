"""What must hold of every select and every codec, on its oracle alone.

Arithmetic is float64: where a tolerance is not explained, it is 1e-9, as in `test_method_oracles`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest

from kvjax.config import ModelConfig
from tests.oracles import codecs, decoder, page_codecs, policies, selects
from tests.oracles.codecs import FP8, Dense, Int4, Int8
from tests.oracles.page_codecs import KIVI, KVQuant, levels_of
from tests.oracles.policies import H2O, TOVA, Entry, Full, LMInfinite, SlidingWindow, StreamingLLM
from tests.oracles.prompt_policies import SnapKV
from tests.oracles.selects import Quest, SparQ
from tests.oracles.weights import random_params

TOLERANCE = 1e-9
VOCAB, LENGTH = 61, 24
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "rope_theta": 100.0,
}
GQA = ModelConfig(**BASE)
PARAMS = random_params(GQA, seed=1)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, LENGTH).tolist()


def run(
    split: int, policy: policies.OraclePolicy = Full(), codec: Any = None, select: Any = None, params: Any = None
) -> decoder.Result:
    return decoder.run(params or PARAMS, GQA, TOKENS[:split], TOKENS[split:], policy, codec, select)


@functools.cache
def full(split: int) -> decoder.Result:
    return run(split)


@functools.cache
def latent() -> tuple[ModelConfig, Any]:
    """A model whose KV heads hold one latent."""
    from tests.models.cases import MLA
    from tests.models.cases import random_params as params_of

    return MLA, params_of(MLA)


def close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


def random_entries(rng: np.random.Generator, count: int, first: int = 0) -> list[Entry]:
    """Entries in shuffled order, as a row whose slots are used again holds them."""
    slots = rng.permutation(count)
    return [Entry(first + p, *rng.standard_normal((2, 8)), slot=int(slots[p])) for p in range(count)]


# Quest


@pytest.mark.parametrize("split", [1, 11])
@pytest.mark.parametrize("select", [Quest(6, 4, 0), Quest(24, 1, 0), Quest(2, 16, 1), SparQ(3, LENGTH, 1)], ids=str)
def test_reading_as_much_as_there_is_equals_full(select, split):
    result = run(split, select=select)
    close(result.logits, full(split).logits)
    assert result.attended == full(split).attended


@pytest.mark.parametrize("select", [Quest(5, 4, 0), Quest(23, 1, 0), SparQ(8, 23, 1)], ids=str)
def test_reading_one_less_does_not(select):
    difference = np.abs(run(1, select=select).logits - full(1).logits).max(-1)
    assert difference[:20].max() < TOLERANCE
    assert difference[-1] > 1e-6


def test_a_bound_is_no_less_than_any_product_in_its_page():
    rng = np.random.default_rng(1)
    for _ in range(50):
        keys, query = rng.standard_normal((5, 8)), rng.standard_normal((1, 8))
        assert selects.bound(keys, query) >= (keys @ query[0]).max() - 1e-12
        # Of one key it is the product, up to the order of the sum.
        close(np.array(selects.bound(keys[:1], query)), keys[0] @ query[0], 1e-12)


@pytest.mark.parametrize("pages", [1, 3, 9])
def test_pages_of_one_token_are_exact_top_k_and_the_current_one(pages):
    rng = np.random.default_rng(2)
    for _ in range(20):
        entries, queries = random_entries(rng, 15, first=7), rng.standard_normal((2, 8))
        products = (np.stack([e.key for e in entries]) @ queries.T).sum(1)
        best = np.argsort(products[:-1])[len(products) - pages :]
        selection = Quest(pages, 1).choose(entries, queries, 1.0)
        assert selection.chosen == sorted([*best.tolist(), 14])


def test_quest_reads_whole_pages_of_slots_the_current_tokens_among_them():
    rng = np.random.default_rng(3)
    for _ in range(20):
        entries, queries = random_entries(rng, 14), rng.standard_normal((2, 8))
        selection = Quest(2, 4).choose(entries, queries, 1.0)
        pages = {entries[i].slot // 4 for i in selection.chosen}
        assert len(pages) == 2
        assert entries[13].slot // 4 in pages
        assert selection.chosen == [i for i, e in enumerate(entries) if e.slot // 4 in pages]


def test_quest_reads_all_in_the_first_layers_and_a_prompt_whole():
    result = run(11, select=Quest(2, 4))
    close(result.prompt_logits, full(11).prompt_logits)
    for step in range(1, LENGTH + 1 - 11):
        held = tuple(range(11 + step))
        assert result.attended[step][:2] == [[held] * 2] * 2
        for positions in result.attended[step][2]:
            assert len({p // 4 for p in positions}) == 2
            assert set(positions) == {p for p in held if p // 4 in {q // 4 for q in positions}}
            assert held[-1] in positions
        assert result.kept[step] == [[held] * 2] * 3, "what is not read is not gone"
    assert any(heads[2][0] != heads[2][1] for heads in result.attended[1:]), "each KV head reads its own"


def test_a_new_token_takes_the_slot_of_the_one_that_left():
    for policy, held in ((H2O(3, 3), 7), (TOVA(6), 7), (SlidingWindow(6), 6)):
        state = decoder.Decoder(PARAMS, GQA, policy, Dense())
        state.feed_prompt(TOKENS[:11])
        for token in TOKENS[11:]:
            before = {e.position: e.slot for e in state.cache[1][0]}
            state.feed(token)
            after = {e.position: e.slot for e in state.cache[1][0]}
            assert all(after[p] == before[p] for p in after if p in before)
            assert len(set(after.values())) == len(after)
            assert max(after.values()) < held
    # Ten tokens of a prompt stay without gaps, and in order.
    state = decoder.Decoder(PARAMS, GQA, SnapKV(6, 2, 1), Dense())
    state.feed_prompt(TOKENS[:11])
    assert [e.slot for e in state.cache[0][0]] == list(range(6))


@pytest.mark.parametrize("policy", [LMInfinite(2, 4), StreamingLLM(2, 4)], ids=str)
def test_selecting_at_in_cache_positions_is_refused(policy):
    with pytest.raises(ValueError, match="nowhere defined"):
        run(5, policy, select=Quest(2, 4))


@pytest.mark.parametrize("select", [Quest(6, 4, 0), SparQ(5, LENGTH, 2)], ids=str)
def test_reading_all_of_a_latent_equals_full(select):
    config, params = latent()
    expected = decoder.run(params, config, TOKENS[:9], TOKENS[9:])
    close(decoder.run(params, config, TOKENS[:9], TOKENS[9:], select=select).logits, expected.logits)


def test_absorbed_queries_score_what_expanded_keys_score():
    config, params = latent()
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    class Spy(Quest):
        def choose(self, entries: Any, queries: np.ndarray, scale: float) -> selects.Selection:
            scores = queries @ np.stack([e.key for e in entries]).T * scale
            seen.append((scores, entries))
            return super().choose(entries, queries, scale)

    state = decoder.Decoder(params, config, Full(), Dense(), Spy(9, 4, 0))
    state.feed_prompt(TOKENS[:9])
    before = [[e.score for e in state.cache[layer][0]] for layer in range(2)]
    state.feed(TOKENS[9])
    for layer, (scores, _) in enumerate(seen):
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights = (weights / weights.sum(1, keepdims=True)).sum(0)
        gained = [e.score - s for e, s in zip(state.cache[layer][0], [*before[layer], 0.0], strict=True)]
        close(np.array(gained), weights)


# SparQ


def softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def test_with_all_channels_and_one_query_head_sparq_reads_the_exact_top_and_knows_their_mass():
    rng = np.random.default_rng(4)
    for _ in range(20):
        entries, query = random_entries(rng, 15), rng.standard_normal((1, 8))
        logits = np.stack([e.key for e in entries]) @ query[0] * 8**-0.5
        chosen, share, _ = SparQ(8, 5, 1).choose(entries, query, 8**-0.5)
        assert chosen == sorted([*np.argsort(logits[:-1])[-4:].tolist(), 14])
        assert share is not None
        close(share, softmax(logits)[chosen].sum(keepdims=True))


def test_sparq_scores_by_the_greatest_channels_of_its_group_each_head_at_its_own_temperature():
    rng = np.random.default_rng(5)
    entries, queries = random_entries(rng, 15), rng.standard_normal((2, 8)) * np.array([[1.0], [3.0]])
    channels = np.argsort(np.abs(queries).sum(0))[-3:]
    keys = np.stack([e.key for e in entries])
    temperature = np.sqrt(8 * np.abs(queries[:, channels]).sum(1) / np.abs(queries).sum(1))
    logits = queries[:, channels] @ keys[:, channels].T / temperature[:, None]
    chosen, share, _ = SparQ(3, 6, 2).choose(entries, queries, 8**-0.5)
    assert chosen == sorted([*np.argsort(logits.sum(0)[:-2])[-4:].tolist(), 13, 14])
    assert share is not None
    close(share, softmax(logits)[:, chosen].sum(1))


def test_what_sparq_leaves_out_counts_as_the_mean_value():
    # One layer whose step is computed by hand from its entries.
    config = ModelConfig(**{**BASE, "num_layers": 1})
    select = SparQ(8, 5, 2)
    state = decoder.Decoder(PARAMS, config, Full(), Dense(), select)
    state.feed_prompt(TOKENS[:-1])
    logits = state.feed(TOKENS[-1])[0]
    params = decoder.to_float64(PARAMS)
    weights = params["layers_0"]
    embedded = params["embed"]["embedding"][TOKENS[-1]]
    x = decoder.rms_norm(embedded, weights["attention_norm"]["scale"], config.norm_eps)
    queries = decoder.rotate((weights["attention"]["q"]["weight"] @ x).reshape(4, 8), [LENGTH - 1] * 4, 100.0)
    out = []
    for h, query in enumerate(queries):
        entries = state.cache[0][h // 2]
        chosen, share, _ = select.choose(entries, queries[h // 2 * 2 : h // 2 * 2 + 2], 8**-0.5)
        assert share is not None
        assert 0.1 < share[h % 2] < 0.99
        keys, values = (np.stack([getattr(e, name) for e in entries]) for name in ("key", "value"))
        mixed = softmax(keys[chosen] @ query * 8**-0.5) @ values[chosen]
        out.append(share[h % 2] * mixed + (1 - share[h % 2]) * values.mean(0))
    x = embedded + weights["attention"]["o"]["weight"] @ np.concatenate(out)
    normed = decoder.rms_norm(x, weights["mlp_norm"]["scale"], config.norm_eps)
    gate, up = (weights["mlp"][name]["weight"] @ normed for name in ("gate", "up"))
    x = x + weights["mlp"]["down"]["weight"] @ (gate / (1 + np.exp(-gate)) * up)
    x = decoder.rms_norm(x, params["norm"]["scale"], config.norm_eps)
    close(logits, params["head"]["weight"] @ x)


def test_sparq_reads_its_slots_and_the_newest_among_them():
    result = run(11, select=SparQ(3, 6, 2))
    close(result.prompt_logits, full(11).prompt_logits)
    for step in range(1, LENGTH + 1 - 11):
        for heads in result.attended[step]:
            for positions in heads:
                assert len(positions) == 6
                assert {10 + step, 9 + step} <= set(positions)
    assert np.abs(result.logits - full(11).logits).max() > 1e-3


# FP8 and Int4


def test_fp8_errs_by_half_of_its_last_bit_and_keeps_zero_and_the_largest():
    x = np.random.default_rng(5).standard_normal((200, 8)) * np.logspace(-6, 6, 200)[:, None]
    x[7] = 0
    codec = FP8()
    codes, scale = codec.codes(x)
    read = codec.roundtrip(x)
    assert np.isfinite(read).all()
    assert not read[7].any()
    # Three bits behind the leading one: half a bit is 2^-4 of the number, or below 2^-6 half of the step 2^-9; quotient
    # and product are rounded to float32 besides, 2^-24 each.
    bound = np.maximum(np.abs(x) * 2.0**-4, scale * 2.0**-10) * (1 + 1e-5) + np.abs(x) * 2.0**-22
    assert np.all(np.abs(read - x) <= bound)
    assert np.all(np.abs(codes.astype(np.float64)).max(-1)[x.any(-1)] == 448)


def test_fp8_steps_are_those_of_e4m3():
    codes, scale = FP8().codes(np.array([448.0, 17.0, 1.0625, 0.0009765625, 0.0029296875, -430.0]))
    assert scale[0] == 1
    # Halves to even: 17 between 16 and 18, 1.0625 between 1 and 1.125, 2^-10 between 0 and 2^-9.
    assert codes.astype(np.float64).tolist() == [448.0, 16.0, 1.0, 0.0, 0.00390625, -416.0]


@pytest.mark.parametrize("bits", [2, 4])
def test_affine_codes_err_by_half_a_scale_and_the_rounding_of_scale_and_minimum(bits):
    rng = np.random.default_rng(6)
    x = rng.standard_normal((300, 16)) * np.logspace(-2, 3, 300)[:, None] + rng.standard_normal((300, 1))
    codes, scale, _ = codecs.affine_codes(x, bits)
    exact = (x.max(-1, keepdims=True) - x.min(-1, keepdims=True)) / (2**bits - 1)
    # fp16 rounds by 2^-11 of a number, float32 by 2^-24 a few times; the scale's rounding counts up to the top code.
    bound = exact / 2 * (1 + 2.0**-10) + (2**bits - 1) * exact * 2.0**-11 + np.abs(x).max(-1, keepdims=True) * 2.0**-10
    assert np.all(np.abs(codecs.affine(x, bits) - x) <= bound)
    assert codes.min() == 0
    assert codes.max() == 2**bits - 1
    # Without the two roundings it would be half a scale, so half a scale is nearly reached.
    assert np.abs(codecs.affine(x, bits) - x).max() > 0.45 * scale.astype(float).max()


def test_constant_groups_are_exact_but_for_fp16_and_zeros_stay_zero():
    x = np.full((3, 16), 1 / 3)
    assert np.array_equal(codecs.affine(x, 4), np.full((3, 16), float(np.float16(1 / 3))))
    assert not Int4(4).roundtrip(np.zeros((2, 8))).any()
    assert not FP8().roundtrip(np.zeros((2, 8))).any()


def test_int4_groups_do_not_see_one_another():
    x = np.random.default_rng(7).standard_normal((5, 16))
    louder = x.copy()
    louder[:, 8:] *= 100
    assert np.array_equal(Int4(8).roundtrip(x)[:, :8], Int4(8).roundtrip(louder)[:, :8])
    assert not np.array_equal(Int4(16).roundtrip(x)[:, :8], Int4(16).roundtrip(louder)[:, :8])
    assert np.array_equal(Int4(16).roundtrip(x), codecs.affine(x, 4))


@pytest.mark.parametrize("codec", [FP8(), Int4(4), Int8()], ids=str)
def test_where_the_prompt_ends_is_irrelevant_to_codecs_of_single_tokens(codec):
    expected = run(1, codec=codec)
    assert np.abs(expected.logits - full(1).logits).max() > 1e-3
    for split in (7, LENGTH):
        close(run(split, codec=codec).logits, expected.logits)


# KIVI


def test_kivi_is_exact_while_less_than_its_residual_is_held():
    for split in (1, 11):
        result = run(split, codec=KIVI(2, 4, LENGTH + 1))
        assert np.array_equal(result.logits, run(split).logits)
    coded = run(1, codec=KIVI(2, 4, 12))
    # Coding comes after the step that completes the residual.
    assert np.array_equal(coded.logits[:12], run(1).logits[:12])
    assert np.abs(coded.logits[12] - full(1).logits[12]).max() > 1e-4


@pytest.mark.parametrize("split", [1, 11, 23])
def test_kivi_codes_whole_residuals_of_keys_and_all_but_a_residual_of_values(split):
    exact = decoder.Decoder(PARAMS, GQA, Full(), Dense())
    state = decoder.Decoder(PARAMS, GQA, Full(), KIVI(2, 4, 8))
    # A prompt's attention is exact.
    assert np.array_equal(state.feed_prompt(TOKENS[:split]), exact.feed_prompt(TOKENS[:split]))
    for count in range(split, LENGTH + 1):
        for heads in state.cache:
            for entries in heads:
                assert [e.coded[0] for e in entries] == [p < count - count % 8 for p in range(count)]
                assert [e.coded[1] for e in entries] == [p < count - 8 for p in range(count)]
        if count < LENGTH:
            state.feed(TOKENS[count])


def test_kivi_codes_keys_by_channel_over_a_group_of_tokens_and_values_by_token():
    exact = decoder.Decoder(PARAMS, GQA, Full(), Dense())
    state = decoder.Decoder(PARAMS, GQA, Full(), KIVI(2, 4, 8))
    exact.feed_prompt(TOKENS[:20])
    state.feed_prompt(TOKENS[:20])
    for ours, theirs in zip(state.cache[1], exact.cache[1], strict=True):
        for start in range(0, 16, 4):
            keys = np.stack([e.key for e in theirs[start : start + 4]])
            close(np.stack([e.key for e in ours[start : start + 4]]), codecs.affine(keys.T, 2).T)
            assert np.abs(codecs.affine(keys.T, 2).T - codecs.affine(keys, 2)).max() > 1e-3
        for entry, original in zip(ours[:12], theirs[:12], strict=True):
            close(entry.value, codecs.affine(original.value.reshape(2, 4), 2).reshape(8))
        for entry, original in zip(ours[16:], theirs[16:], strict=True):
            assert np.array_equal(entry.key, original.key)
            assert np.array_equal(entry.value, original.value)


def test_kivi_counts_what_a_selected_prompt_holds():
    state = decoder.Decoder(PARAMS, GQA, SnapKV(9, 2, 1), KIVI(2, 4, 8))
    state.feed_prompt(TOKENS[:20])
    for count, token in enumerate(TOKENS[20:], 10):
        assert [e.coded for e in state.cache[0][0]] == [(p < 8, p < count - 9) for p in range(count - 1)]
        state.feed(token)


def test_with_the_value_inside_the_key_the_keys_coding_serves_both():
    config, params = latent()
    state = decoder.Decoder(params, config, Full(), KIVI(2, 4, 8))
    state.feed_prompt(TOKENS[:20])
    for entry in state.cache[0][0]:
        assert np.array_equal(entry.value, entry.key[:16])
        assert entry.coded == ((True, True) if entry.position < 16 else (False, False))


def test_four_bits_are_nearer_than_two():
    far, near = (np.abs(run(1, codec=KIVI(bits, 4, 8)).logits - full(1).logits).max() for bits in (2, 4))
    assert near < far / 2


# Selects beside KIVI


@pytest.mark.parametrize("select", [Quest(6, 4, 0), SparQ(3, LENGTH, 1)], ids=str)
def test_reading_all_that_is_coded_equals_kivi_alone(select):
    alone = run(9, codec=KIVI(2, 4, 8))
    result = run(9, codec=KIVI(2, 4, 8), select=select)
    close(result.logits, alone.logits)
    assert result.attended == alone.attended


@pytest.mark.parametrize("select", [Quest(1, 4, 0), SparQ(3, 3, 2)], ids=str)
def test_beside_kivi_exact_tokens_are_read_and_only_coded_ones_are_chosen(select):
    result = run(9, codec=KIVI(2, 4, 8), select=select)
    for step in range(1, LENGTH + 1 - 9):
        count = 9 + step
        # Before the step's end, so that a residual and the current token are exact.
        tail = set(range(max(0, count - 1 - 8), count))
        for heads in result.attended[step]:
            for positions in heads:
                assert tail <= set(positions)
                coded = set(positions) - tail
                if isinstance(select, SparQ):
                    assert len(coded) == min(3, count - len(tail))
                elif count > len(tail):
                    (page,) = {p // 4 for p in coded}
                    assert coded == {p for p in range(count) if p // 4 == page and p not in tail}
    assert any(heads[0] != heads[1] for step in result.attended for heads in step), "each KV head reads its own"


def test_beside_exact_tokens_a_page_is_bounded_by_keys_whose_values_are_exact_still():
    rng = np.random.default_rng(4)
    entries, queries = random_entries(rng, 12), rng.standard_normal((2, 8))
    for entry in entries:
        entry.slot = entry.position
    # Two pages are coded, of the second only the keys but for one value; it holds the key that matters.
    for entry in entries[:8]:
        entry.coded = (True, entry.position < 5)
        entry.key = entry.key * 0.1
    entries[6].key = 10 * queries.sum(0)
    selection = Quest(1, 4).choose(entries, queries, 1.0, [i for i, e in enumerate(entries) if not e.coded[1]])
    assert selection.chosen == list(range(4, 12))


# KVQuant


@functools.cache
def calibrated(bits: int, outliers: float = 0.1, first: int = 1) -> KVQuant:
    """From the keys and values of the tests' own tokens, all samples weighed alike."""
    keys, values = [], []
    for layer in range(3):
        exact = decoder.Decoder(PARAMS, GQA, Full(), Dense())
        exact.feed_prompt(TOKENS)
        heads = exact.cache[layer]
        keys.append(
            [decoder.rotate(np.stack([e.key for e in entries]), range(0, -LENGTH, -1), 100.0) for entries in heads]
        )
        values.append([np.stack([e.value for e in entries]) for entries in heads])
    keys, values = np.array(keys), np.array(values)  # [L, K, T, D]
    least, greatest = keys.min(2), keys.max(2)

    def levels(samples: np.ndarray) -> np.ndarray:
        return np.stack([levels_of(s.reshape(-1), np.ones(s.size), 2**bits) for s in samples])

    normed = page_codecs.normal(keys, least[:, :, None], greatest[:, :, None])
    spans = page_codecs.normal(values, values.min(-1, keepdims=True), values.max(-1, keepdims=True))
    return KVQuant(least, greatest, levels(normed), levels(spans), outliers, first)


def test_levels_of_few_samples_are_the_samples_and_beat_even_ones_on_many():
    rng = np.random.default_rng(8)
    few = np.array([-0.9, -0.2, 0.1, 0.7])
    close(levels_of(np.repeat(few, 5), np.ones(20), 4), few)
    samples = np.clip(rng.standard_normal(2000) / 3, -1, 1)
    sensitivity = np.exp(-4 * samples)
    ours, even = levels_of(samples, sensitivity, 8), np.linspace(-1, 1, 8)
    errors = [(sensitivity * np.abs(samples[:, None] - grid).min(1) ** 2).sum() for grid in (ours, even)]
    assert errors[0] < 0.7 * errors[1]
    # Levels are dense where an error costs most.
    assert np.median(ours) < np.median(levels_of(samples, np.ones(2000), 8)) - 0.05


def test_kvquant_errs_by_half_a_gap_but_for_outliers_and_first_tokens_which_are_fp16():
    codec = calibrated(3)
    rng = np.random.default_rng(9)
    x = rng.standard_normal((20, 8))
    for part in ("key", "value"):
        read = codec.write(1, 0, part, x, range(20))
        half = x.astype(np.float16)
        assert np.array_equal(read[0], half[0])
        for vector, ours, exact in zip(x[1:], read[1:], half[1:], strict=True):
            # 0.1 of 8 channels is one.
            if part == "key":
                least, greatest, levels = codec.key_least[1, 0], codec.key_greatest[1, 0], codec.key_levels[1]
                apart = int(np.abs(page_codecs.normal(vector, least, greatest)).argmax())
            else:
                apart = int(np.abs(vector).argmax())
                rest = np.delete(vector, apart)
                least, greatest, levels = rest.min(), rest.max(), codec.value_levels[1]
            assert ours[apart] == exact[apart]
            normed = page_codecs.normal(vector, least, greatest)
            error = np.abs(ours - vector) / ((greatest - least) / 2)
            nearest = np.abs(normed[:, None] - levels).min(1)
            close(np.delete(error, apart), np.delete(nearest, apart))


def test_kvquant_codes_the_same_key_alike_wherever_it_stands():
    state = decoder.Decoder(PARAMS, GQA, Full(), calibrated(3, first=0))
    state.feed_prompt([5] * 6)
    bare = [decoder.rotate(e.key[None], [-e.position], 100.0)[0] for e in state.cache[0][0]]
    for other in bare[1:]:
        close(other, bare[0])
    coded_late = [Int4(8).roundtrip(e.key) for e in state.cache[0][0]]
    assert np.abs(decoder.rotate(coded_late[3][None], [-3], 100.0)[0] - bare[0]).max() > 1e-3


def test_kvquant_comes_near_full_as_levels_grow_and_reaches_it_when_every_channel_is_apart():
    errors = [np.abs(run(9, codec=calibrated(bits)).logits - full(9).logits).max() for bits in (2, 4)]
    assert errors[1] < errors[0] / 2
    # fp16 rounds keys and values by 2^-11 of them, which three layers raise to some hundredths at most.
    assert np.abs(run(9, codec=calibrated(2, first=LENGTH)).logits - full(9).logits).max() < 0.02


# Reading kvjax's own configurations


@pytest.mark.parametrize("codec", [FP8(), Int4(8), KIVI(4, 8, 16)], ids=str)
def test_codecs_are_found_by_name_and_take_the_same_arguments(codec):
    theirs = dataclasses.make_dataclass(type(codec).__name__, [f.name for f in dataclasses.fields(codec)], frozen=True)
    assert codecs.counterpart(theirs(*dataclasses.astuple(codec))) == codec


def test_selects_are_found_by_name():
    quest = dataclasses.make_dataclass("Quest", ["pages", "dense_layers"])
    sparq = dataclasses.make_dataclass("SparQ", ["rank", "slots", "local"])
    assert selects.counterpart(quest(3, 1), 16) == Quest(3, 16, 1)
    assert selects.counterpart(sparq(3, 8, 2), 16) == SparQ(3, 8, 2)
    assert selects.counterpart(None, 16) is None
    with pytest.raises(ValueError, match="no oracle of the select"):
        selects.counterpart(object(), 16)
