"""The renderings of YOCO, GoldFinch and CEPE hold their papers' equalities, each in two forms that share little code.

All arithmetic is float64. Where a tolerance is not explained it is 1e-9: rounding accumulates to about 1e-13 on logits
of order one, and a misplaced token, decay or chunk shifts them by more than 1e-3.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from kvjax.config import ModelConfig
from tests.oracles import cepe, goldfinch, yoco
from tests.oracles.blocks import attend, frequencies, merge, partial, rotate_halves, rotate_neighbours
from tests.oracles.decoder import rotate
from tests.oracles.matrix import matrix_forward

TOLERANCE = 1e-9
VOCAB = 61
TOKENS = np.random.default_rng(0).integers(0, VOCAB, 23).tolist()


def close(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def differ(ours: np.ndarray, theirs: np.ndarray) -> None:
    """By far more than rounding: what an equality beside it rests on is really there."""
    assert np.max(np.abs(ours - theirs)) > 1e-3


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


# What they share


def test_attention_merged_over_parts_is_attention_over_all():
    q, k, v = normal(5, 4, 8), normal(9, 2, 8, seed=1), normal(9, 2, 6, seed=2)
    visible = normal(5, 9, seed=3) > 0
    visible[0, :4] = False  # a part in which a row sees nothing
    visible[1] = False  # a row that sees nothing at all
    parts = [partial(q, k[s], v[s], visible[:, s]) for s in (slice(0, 4), slice(4, 8), slice(8, 9))]
    whole = attend(q, k, v, visible)
    close(merge(parts), whole)
    np.testing.assert_array_equal(whole[1], 0)


def test_attention_is_the_softmax_average_of_the_head_of_its_group():
    q, k, v = normal(3, 4, 8), normal(7, 2, 8, seed=1), normal(7, 2, 6, seed=2)
    visible = np.tril(np.ones((3, 7), bool), 4)
    for t, h in np.ndindex(3, 4):
        weights = np.exp(k[: t + 5, h // 2] @ q[t, h] / np.sqrt(8))
        close(attend(q, k, v, visible)[t, h], weights @ v[: t + 5, h // 2] / weights.sum())


def test_pairs_turn_as_in_the_decoder_oracle_whatever_channels_they_are():
    x, positions = normal(5, 1, 8), [0, 3, 4, 11, 2]
    halves = rotate(x[:, 0], positions, 100.0)
    close(rotate_halves(x, positions, frequencies(8, 100.0))[:, 0], halves)
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    close(rotate_neighbours(x[..., order], positions, frequencies(8, 100.0))[:, 0], halves[:, order])


# YOCO

WINDOW = yoco.Shape(num_layers=4, num_heads=4, self_heads=2, window=5, rope_theta=100.0)
RETENTION = dataclasses.replace(WINDOW, window=None)
YOCO = pytest.mark.parametrize("shape", [WINDOW, RETENTION], ids=["window", "retention"])


def yoco_params(shape: yoco.Shape, **changes: Any) -> yoco.Weights:
    return yoco.random_params(shape, **({"vocab": VOCAB, "hidden": 32, "wide": 48, "kv_heads": 2} | changes))


def retention_inputs(tokens: int, seed: int = 0) -> yoco.Retention:
    decay = -np.random.default_rng(seed + 3).uniform(0.0, 2.0, (tokens, 2))
    q, k, v = (normal(tokens, 2, 8, seed=seed + i) for i in range(3))
    return yoco.Retention(q, k, v, decay)


@pytest.mark.parametrize("size", [1, 3, 8, 256])
def test_retention_in_parallel_step_by_step_and_in_chunks_agree(size):
    given, state = retention_inputs(19), np.zeros((2, 8, 8))
    stepped, last = yoco.retention_recurrent(given, state)
    close(yoco.retention_parallel(given), stepped)
    chunks = []
    for start in range(0, 19, size):
        out, state = yoco.retention_chunk(given.tokens(start, start + size), state)
        chunks.append(out)
    close(np.concatenate(chunks), stepped)
    close(state, last)


def test_padding_at_the_end_of_a_chunk_leaves_retention_as_it_is():
    given, state = retention_inputs(11), normal(2, 8, 8, seed=9)
    out, padded = yoco.retention_chunk(given, state, np.arange(11) < 6)
    expected, last = yoco.retention_recurrent(given.tokens(0, 6), state)
    close(out[:6], expected)
    close(padded, last)
    _, nothing = yoco.retention_chunk(given, state, np.zeros(11, bool))
    close(nothing, state)


def test_retention_decays_by_the_sixteenth_root_of_a_logistic_gate():
    x, weights = normal(7, 5), {"decay": {"weight": 20 * normal(2, 5, seed=1)}}
    gate = 1 / (1 + np.exp(-x @ weights["decay"]["weight"].T))
    close(np.exp(yoco.log_decay(x, weights)) ** 16, gate)


def test_yoco_frequencies_reach_from_one_to_one_over_theta():
    turns = yoco.rope_frequencies(16, 10000.0)
    close(turns[[0, -1]], np.array([1.0, 1e-4]))
    close(turns[1:] / turns[:-1], np.full(7, 10000.0 ** (-1 / 7)))


@YOCO
@pytest.mark.parametrize("chunk", [1, 4, 23])
def test_early_exit_gives_the_logits_of_a_full_prefill(shape, chunk):
    params = yoco_params(shape)
    whole = yoco.forward(params, shape, TOKENS)
    for split in (1, 9, 22):
        logits, cache = yoco.prefill(params, shape, TOKENS[:split], chunk)
        close(logits, whole[split - 1])
        for position in range(split, len(TOKENS)):
            logits, cache = yoco.step(params, shape, cache, TOKENS[position])
            close(logits, whole[position])


@YOCO
def test_yoco_has_two_turns_of_a_prompt_like_one(shape):
    params = yoco_params(shape)
    _, cache = yoco.prefill(params, shape, TOKENS[:10], 4)
    logits, _ = yoco.prefill(params, shape, TOKENS[10:], 3, cache)
    close(logits, yoco.forward(params, shape, TOKENS)[-1])


@YOCO
def test_yoco_looks_back_only_and_everywhere(shape):
    params = yoco_params(shape)
    whole = yoco.forward(params, shape, TOKENS)
    later, first = [*TOKENS[:-1], (TOKENS[-1] + 1) % VOCAB], [(TOKENS[0] + 1) % VOCAB, *TOKENS[1:]]
    close(yoco.forward(params, shape, later)[:-1], whole[:-1])
    # Beyond any stack of windows: through the global keys and values.
    differ(yoco.forward(params, shape, first)[-1], whole[-1])


@pytest.mark.parametrize("layers", [2, 4, 8])
@pytest.mark.parametrize("base", [WINDOW, RETENTION], ids=["window", "retention"])
def test_yoco_bytes_grow_by_one_key_and_value_per_token_whatever_the_layers(base, layers):
    shape = dataclasses.replace(base, num_layers=layers)
    params = yoco_params(shape)
    caches = [yoco.prefill(params, shape, TOKENS[:n], 4)[1] for n in (10, 11, 23)]
    kv_heads, width, float64 = 2, 8, 8
    for cache, tokens in zip(caches, (10, 11, 23), strict=True):
        assert cache.global_bytes == tokens * 2 * kv_heads * width * float64
        assert cache.state_bytes == caches[0].state_bytes  # 10 tokens fill the window
    per_layer = 2 * 16 * 16 if base.window is None else 2 * base.window * 32
    assert caches[0].state_bytes == layers // 2 * per_layer * float64


def test_the_self_decoder_sees_as_far_as_its_windows_stacked():
    params = yoco_params(WINDOW)

    def last(tokens: list[int]) -> np.ndarray:
        return yoco.self_decoder(params, WINDOW, yoco.empty_cache(params, WINDOW), tokens)[0][-1]

    first = len(TOKENS) - 1 - 2 * (WINDOW.window - 1)  # two layers, each looking back at four
    for changed, seen in ((first, True), (first - 1, False)):
        others = [*TOKENS[:changed], (TOKENS[changed] + 1) % VOCAB, *TOKENS[changed + 1 :]]
        (differ if seen else close)(last(others), last(TOKENS))


def test_yoco_window_may_share_keys_and_values_among_heads():
    params = yoco_params(WINDOW, self_kv_heads=1)
    logits, _ = yoco.prefill(params, WINDOW, TOKENS, 4)
    close(logits, yoco.forward(params, WINDOW, TOKENS)[-1])


# GoldFinch

GOLDFINCH = goldfinch.Shape(num_layers=6, head_dim=8)
ROTATED = dataclasses.replace(GOLDFINCH, rope_theta=100.0)
SHAPES = pytest.mark.parametrize("shape", [GOLDFINCH, ROTATED], ids=["plain", "rope"])


def goldfinch_params(shape: goldfinch.Shape) -> goldfinch.Weights:
    return goldfinch.random_params(shape, VOCAB, hidden=32, wide=48)


def memory_inputs(tokens: int) -> goldfinch.Memory:
    decay = -np.random.default_rng(3).uniform(0.0, 2.0, (tokens, 2, 8))
    return goldfinch.Memory(*(normal(tokens, 2, 8, seed=i) for i in range(3)), decay)


def test_memory_written_out_is_the_recurrence():
    given = memory_inputs(17)
    stepped, last = goldfinch.memory_recurrent(given, np.zeros((2, 8, 8)))
    close(goldfinch.memory_whole(given), stepped)
    np.testing.assert_array_equal(stepped[0], 0)  # a token does not read what it writes itself
    first = goldfinch.Memory(*(part[:9] for part in given))
    rest = goldfinch.Memory(*(part[9:] for part in given))
    _, state = goldfinch.memory_recurrent(first, np.zeros((2, 8, 8)))
    out, state = goldfinch.memory_recurrent(rest, state)
    close(out, stepped[9:])
    close(state, last)


def test_padding_at_the_end_of_a_chunk_leaves_the_memory_as_it_is():
    given, state = memory_inputs(9), normal(2, 8, 8, seed=9)
    _, padded = goldfinch.memory_recurrent(given, state, np.arange(9) < 5)
    _, last = goldfinch.memory_recurrent(goldfinch.Memory(*(part[:5] for part in given)), state)
    close(padded, last)


@SHAPES
def test_goldfinch_token_by_token_is_the_whole_sequence(shape):
    params = goldfinch_params(shape)
    whole, state = goldfinch.forward(params, shape, TOKENS), goldfinch.empty_state(params, shape)
    for token, expected in zip(TOKENS, whole, strict=True):
        logits, state = goldfinch.step(params, shape, state, token)
        close(logits, expected)


def test_recomputed_keys_are_the_stored_ones():
    params = goldfinch_params(GOLDFINCH)
    rebuilt, stored = (goldfinch.empty_state(params, GOLDFINCH, store_keys=store) for store in (False, True))
    for token in TOKENS[:9]:
        ours, rebuilt = goldfinch.step(params, GOLDFINCH, rebuilt, token)
        theirs, stored = goldfinch.step(params, GOLDFINCH, stored, token)
        close(ours, theirs)
    x0 = goldfinch.embed(params, rebuilt.tokens)
    close(goldfinch.key_cache(params, x0, rebuilt.compressed), stored.keys)


@SHAPES
@pytest.mark.parametrize("chunk", [1, 5, 23])
def test_goldfinch_prefill_needs_few_tokens_in_the_upper_layers(shape, chunk):
    params = goldfinch_params(shape)
    whole = goldfinch.forward(params, shape, TOKENS)
    for split in (1, 4, 20):
        logits, state = goldfinch.prefill(params, shape, TOKENS[:split], chunk)
        close(logits, whole[split - 1])
        for position in range(split, 23):
            logits, state = goldfinch.step(params, shape, state, TOKENS[position])
            close(logits, whole[position])


@pytest.mark.parametrize("more", [1, 3, 5, 12])
def test_goldfinch_has_two_turns_of_a_prompt_like_one(more):
    params = goldfinch_params(GOLDFINCH)
    _, state = goldfinch.prefill(params, GOLDFINCH, TOKENS[:10], 4)
    logits, _ = goldfinch.prefill(params, GOLDFINCH, TOKENS[10 : 10 + more], 3, state)
    close(logits, goldfinch.forward(params, GOLDFINCH, TOKENS[: 10 + more])[-1])


def test_goldfinch_prefill_needs_every_one_of_these_tokens():
    params = goldfinch_params(GOLDFINCH)
    assert GOLDFINCH.reach == 5
    logits, _ = goldfinch.prefill(params, GOLDFINCH, TOKENS, 8, reach=4)
    assert np.max(np.abs(logits - goldfinch.forward(params, GOLDFINCH, TOKENS)[-1])) > 1e-6


@SHAPES
def test_goldfinch_looks_back_only_and_everywhere(shape):
    params = goldfinch_params(shape)
    whole = goldfinch.forward(params, shape, TOKENS)
    later, first = [*TOKENS[:-1], (TOKENS[-1] + 1) % VOCAB], [(TOKENS[0] + 1) % VOCAB, *TOKENS[1:]]
    close(goldfinch.forward(params, shape, later)[:-1], whole[:-1])
    differ(goldfinch.forward(params, shape, first)[-1], whole[-1])


def test_goldfinch_bytes_grow_by_an_id_and_a_sixteenth_whatever_the_layers():
    hidden, float64, int32 = 32, 8, 4
    for layers in (3, 6, 9):
        shape = dataclasses.replace(GOLDFINCH, num_layers=layers)
        params = goldfinch_params(shape)
        states = [goldfinch.prefill(params, shape, TOKENS[:n], 8)[1] for n in (7, 8)]
        assert states[1].token_bytes - states[0].token_bytes == int32 + hidden // 16 * float64
        assert states[0].recurrent_bytes == states[1].recurrent_bytes
        assert states[0].recurrent_bytes == (2 * layers // 3 * hidden * 8 + layers * 2 * hidden) * float64


@pytest.mark.parametrize("layers, hidden, published", [(24, 2048, 756), (80, 8192, 2550)])
def test_goldfinch_saves_what_the_paper_says(layers, hidden, published):
    one = goldfinch.State(np.zeros(1, np.int32), np.zeros((1, hidden // 16), np.float16), None, [], [])
    keys_and_values = np.zeros((layers, 2, hidden), np.float16)
    assert keys_and_values.nbytes // one.token_bytes == published


# CEPE

LLAMA = cepe.Shape(num_layers=3, num_heads=4, rope_theta=100.0)
ENCODER = cepe.Shape(num_layers=2, num_heads=2, rope_theta=100.0)
CHUNKS = [TOKENS[:6], TOKENS[6:8], TOKENS[8:13]]
PROMPT = TOKENS[13:]
KEEP = ("computed", "stored", "absorbed")


def cepe_params(**changes: Any) -> cepe.Weights:
    sizes = {"vocab": VOCAB, "hidden": 32, "wide": 48, "kv_heads": 2, "encoder_hidden": 16}
    return cepe.random_params(LLAMA, ENCODER, **(sizes | changes))


def encoded(params: cepe.Weights, chunks: list[list[int]] = CHUNKS) -> list[np.ndarray]:
    return [cepe.encode(params["encoder"], ENCODER, chunk) for chunk in chunks]


def padded(fill: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(chunk) for chunk in CHUNKS])
    return np.array([chunk + [fill] * (6 - len(chunk)) for chunk in CHUNKS]), lengths


@pytest.mark.parametrize("fill", [0, 60])
def test_chunks_encoded_together_are_chunks_encoded_alone(fill):
    params = cepe_params()
    chunks, lengths = padded(fill)
    together = cepe.encode_together(params["encoder"], ENCODER, chunks, lengths)
    for ours, length, alone in zip(together, lengths, encoded(params), strict=True):
        close(ours[:length], alone)


def test_the_encoder_looks_both_ways_within_a_chunk():
    params = cepe_params()["encoder"]
    whole = cepe.encode(params, ENCODER, TOKENS[:6])
    differ(cepe.encode(params, ENCODER, [*TOKENS[:5], 60])[0], whole[0])
    differ(cepe.encode(params, ENCODER, [60, *TOKENS[1:6]])[-1], whole[-1])


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("crossed", [None, 2])
def test_cepe_chunk_by_chunk_is_all_chunks_at_once(keep, crossed):
    params = cepe_params(crossed=crossed)
    chunks, lengths = padded(fill=7)
    context = cepe.encode_together(params["encoder"], ENCODER, chunks, lengths)
    real = (np.arange(6) < lengths[:, None]).reshape(-1)
    whole = cepe.forward(params, LLAMA, PROMPT, context.reshape(len(real), -1), real)
    cache = cepe.start(params, LLAMA, encoded(params), keep)
    for token, expected in zip(PROMPT, whole, strict=True):
        logits, cache = cepe.step(params, LLAMA, cache, token)
        close(logits, expected)


def test_permuting_whole_chunks_changes_nothing():
    params = cepe_params()
    one, two, three = encoded(params)
    whole = cepe.forward(params, LLAMA, PROMPT, np.concatenate([one, two, three]))
    close(cepe.forward(params, LLAMA, PROMPT, np.concatenate([three, one, two])), whole)
    # Chunks cut elsewhere are other chunks, and tokens within one have an order.
    moved = [TOKENS[:5], TOKENS[5:8], TOKENS[8:13]]
    differ(cepe.forward(params, LLAMA, PROMPT, np.concatenate(encoded(params, moved))), whole)
    turned = [TOKENS[5::-1], *CHUNKS[1:]]
    differ(cepe.forward(params, LLAMA, PROMPT, np.concatenate(encoded(params, turned))), whole)


def test_zeroed_cross_attention_output_is_the_base_model():
    params = cepe_params()
    base = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        rope_theta=100.0,
        norm_eps=1e-5,
    )
    context = np.concatenate(encoded(params))
    differ(cepe.forward(params, LLAMA, PROMPT, context), matrix_forward(params, base, PROMPT)[0])
    for i in range(3):
        params[f"layers_{i}"]["cross_attention"]["o"]["weight"] *= 0
    close(cepe.forward(params, LLAMA, PROMPT, context), matrix_forward(params, base, PROMPT)[0])
    close(cepe.forward(params, LLAMA, PROMPT, None), matrix_forward(params, base, PROMPT)[0])


def test_cepe_keeps_one_vector_per_context_token_whatever_the_layers():
    context_tokens, float64 = 13, 8
    for crossed in (1, 3):
        params = cepe_params(crossed=crossed)
        sizes = {k: cepe.start(params, LLAMA, encoded(params), k).context_bytes for k in KEEP}
        assert sizes["computed"] == sizes["absorbed"] == context_tokens * 16 * float64
        assert sizes["stored"] == context_tokens * crossed * 2 * 2 * 8 * float64
