"""The oracles hold the identities of the methods they model, and agree with two forwards that share no code with them.

All arithmetic is float64 on a two-layer network: where a tolerance is not explained, it is 1e-9, several orders above
the accumulated rounding of float64 (about 1e-13 on logits of order one) and below any effect of a misplaced token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvjax.config import ModelConfig
from tests.oracles import codecs, decoder, policies
from tests.oracles.codecs import Dense, Int8
from tests.oracles.matrix import matrix_forward
from tests.oracles.policies import H2O, TOVA, Full, SlidingWindow, StreamingLLM
from tests.oracles.weights import random_params

TOLERANCE = 1e-9
VOCAB = 61
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
ARCHITECTURES = {
    "gqa": GQA,
    "mha": ModelConfig(**{**BASE, "num_kv_heads": 4}),
    "mqa": ModelConfig(**{**BASE, "num_kv_heads": 1}),
    "biases": ModelConfig(**BASE, qkv_bias=True, o_bias=True, mlp_bias=True),
    "qk_norm": ModelConfig(**BASE, qk_norm=True),
    "tied": ModelConfig(**BASE, tie_word_embeddings=True),
    "wide_heads": ModelConfig(**{**BASE, "head_dim": 16}),
    "windows": ModelConfig(**BASE, windows=(4, None)),
}
PARAMS = random_params(GQA, seed=1)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, 24).tolist()
SMALL: list[policies.OraclePolicy] = [
    SlidingWindow(6),
    StreamingLLM(2, 4),
    StreamingLLM(4, 1),
    TOVA(6),
    TOVA(1),
    H2O(3, 3),
    H2O(6, 0),
    H2O(0, 6),
]


def run(split: int, policy: policies.OraclePolicy, codec: codecs.OracleCodec | None = None) -> decoder.Result:
    return decoder.run(PARAMS, GQA, TOKENS[:split], TOKENS[split:], policy, codec)


def close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


def same(ours: decoder.Result, theirs: decoder.Result) -> None:
    """Equal logits after the last prompt token and every step, and equal sets attended."""
    close(ours.step_logits, theirs.step_logits)
    assert ours.attended == theirs.attended


# The network


@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_random_params_have_the_tree_of_kvjax(config):
    import jax

    from kvjax.model import parameter_shapes

    expected = jax.tree.map(lambda leaf: leaf.shape, parameter_shapes(config))
    assert jax.tree.map(lambda leaf: leaf.shape, random_params(config)) == dict(expected)


@pytest.mark.parametrize("split", [1, 10, 24])
@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_decoder_equals_full_matrix_forward(config, split):
    params = random_params(config, seed=2)
    result = decoder.run(params, config, TOKENS[:split], TOKENS[split:])
    close(result.logits, matrix_forward(params, config, TOKENS)[0])
    assert result.prompt_logits.shape == (split, VOCAB)
    assert len(result.step_logits) == len(result.kept) == 25 - split


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_decoder_equals_transformers(family):
    torch = pytest.importorskip("torch", reason="torch is not installed (extra `parity`)")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `parity`)")
    traits: dict[str, dict[str, Any]] = {
        "llama": {},
        "qwen2": {"qkv_bias": True, "tie_word_embeddings": True},
        "qwen3": {"qk_norm": True},
        "mistral": {"windows": (5, 5)},
    }
    config = ModelConfig(**BASE, **traits[family])
    params = random_params(config, seed=3)
    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}
    theirs = getattr(transformers, f"{names[family]}Config")(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        sliding_window=config.windows[0],
        attn_implementation="eager",
        pad_token_id=None,
    )
    model = getattr(transformers, f"{names[family]}ForCausalLM")(theirs).double().eval()
    state = {"model.embed_tokens.weight": params["embed"]["embedding"], "model.norm.weight": params["norm"]["scale"]}
    if not config.tie_word_embeddings:
        state["lm_head.weight"] = params["head"]["weight"]
    for i in range(2):
        part, to = params[f"layers_{i}"], f"model.layers.{i}"
        state[f"{to}.input_layernorm.weight"] = part["attention_norm"]["scale"]
        state[f"{to}.post_attention_layernorm.weight"] = part["mlp_norm"]["scale"]
        for folder, kind in (("attention", "self_attn"), ("mlp", "mlp")):
            for name, leaves in part[folder].items():
                proper = name if name.endswith("_norm") else f"{name}_proj"
                for leaf, value in leaves.items():
                    state[f"{to}.{kind}.{proper}.{'bias' if leaf == 'bias' else 'weight'}"] = value
    loaded = model.load_state_dict(
        {name: torch.from_numpy(np.array(w)).double() for name, w in state.items()}, strict=False
    )
    assert not loaded.unexpected_keys
    assert set(loaded.missing_keys) <= {"lm_head.weight"}
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    # transformers normalises, rotates and takes the softmax in float32 (2^-24 relative) even in a float64 model.
    close(decoder.run(params, config, TOKENS[:12], TOKENS[12:]).logits, expected, 5e-5)


# Identities between policies


@pytest.mark.parametrize("split", [1, 11, 24])
@pytest.mark.parametrize(
    "policy",
    [SlidingWindow(24), StreamingLLM(4, 20), StreamingLLM(0, 24), TOVA(23), H2O(20, 3), H2O(0, 23), H2O(23, 0)],
    ids=str,
)
def test_budget_of_the_whole_length_equals_full(policy, split):
    same(run(split, policy), run(split, Full()))


@pytest.mark.parametrize(
    "policy", [SlidingWindow(23), StreamingLLM(4, 19), TOVA(22), H2O(20, 2), H2O(0, 22), H2O(22, 0)], ids=str
)
def test_one_less_than_the_whole_length_does_not_equal_full(policy):
    assert np.abs(run(1, policy).logits - run(1, Full()).logits).max() > 1e-6


@pytest.mark.parametrize("split", [1, 11, 24])
@pytest.mark.parametrize("window", [1, 2, 6])
def test_streaming_without_sinks_is_a_sliding_window(window, split):
    streaming, sliding = run(split, StreamingLLM(0, window)), run(split, SlidingWindow(window))
    same(streaming, sliding)
    assert streaming.kept == sliding.kept


@pytest.mark.parametrize("recent", [1, 2, 6])
def test_h2o_without_heavy_hitters_fed_token_by_token_is_a_sliding_window_one_wider(recent):
    h2o, sliding = run(1, H2O(0, recent)), run(1, SlidingWindow(recent + 1))
    same(h2o, sliding)
    # H2O decides after the step, the window before the next one.
    assert len(h2o.kept[-1][0][0]) == recent
    assert len(sliding.kept[-1][0][0]) == recent + 1


@pytest.mark.parametrize("codec", [Dense(), Dense("bfloat16"), Int8()], ids=str)
@pytest.mark.parametrize("policy", [Full(), SlidingWindow(5), StreamingLLM(2, 4)], ids=str)
def test_where_the_prompt_ends_is_irrelevant_to_masks(policy, codec):
    expected = run(1, policy, codec)
    for split in (2, 6, 7, 15, 24):
        result = run(split, policy, codec)
        close(result.logits, expected.logits)
        assert result.kept == expected.kept[split - 1 :]
        assert result.attended == expected.attended[split - 1 :]


def test_sliding_window_is_a_masked_matrix():
    i, j = np.arange(24)[:, None], np.arange(24)[None, :]
    mask = np.broadcast_to((j <= i) & (j > i - 5), (2, 4, 24, 24))
    for split in (1, 9, 24):
        close(run(split, SlidingWindow(5)).logits, matrix_forward(PARAMS, GQA, TOKENS, mask)[0])


@pytest.mark.parametrize(("sinks", "window"), [(2, 4), (1, 1), (4, 7), (3, 1)])
def test_in_cache_positions_are_window_distances_and_a_capped_distance_to_sinks(sinks, window):
    i, j = np.arange(24)[:, None], np.arange(24)[None, :]
    inside = (j <= i) & (j > i - window)
    mask = np.broadcast_to(inside | ((j <= i) & (j < sinks)), (2, 4, 24, 24))
    distance = np.where(inside, i - j, np.minimum(i, sinks + window - 1) - j)
    expected = matrix_forward(PARAMS, GQA, TOKENS, mask, distance)[0]
    for split in (1, 9, 24):
        close(run(split, StreamingLLM(sinks, window)).logits, expected)
    # The distances matter: the same mask at original positions is another model.
    assert np.abs(matrix_forward(PARAMS, GQA, TOKENS, mask)[0] - expected).max() > 1e-3


# What is held and attended


def sizes(policy: policies.OraclePolicy) -> tuple[int, int]:
    """Most tokens held after a step, and most attended during one."""
    match policy:
        case SlidingWindow(window):
            return window, window
        case StreamingLLM(sinks, window):
            return sinks + window, sinks + window
        case TOVA(budget):
            return budget, budget + 1
        case H2O(heavy, recent):
            return heavy + recent, heavy + recent + 1
    raise ValueError(f"{policy} has no budget")


@pytest.mark.parametrize("split", [1, 6, 7, 15])
@pytest.mark.parametrize("policy", SMALL, ids=str)
def test_sizes_fill_the_budget_and_never_exceed_it(policy, split):
    held, attended = sizes(policy)
    result = run(split, policy)
    for step in range(25 - split):
        seen = split + step
        for layer in range(2):
            for head in range(2):
                assert len(result.kept[step][layer][head]) == min(held, seen)
                if step:
                    assert len(result.attended[step][layer][head]) == min(attended, seen)


@pytest.mark.parametrize("split", [1, 6, 15])
@pytest.mark.parametrize("policy", SMALL, ids=str)
def test_evicted_is_gone(policy, split):
    result = run(split, policy)
    for step in range(1, 25 - split):
        current = split + step - 1
        for layer in range(2):
            for head in range(2):
                before = set(result.kept[step - 1][layer][head])
                during, after = set(result.attended[step][layer][head]), set(result.kept[step][layer][head])
                assert current in during
                assert during <= before | {current}
                assert after <= during


@pytest.mark.parametrize("split", [1, 6, 15, 24])
@pytest.mark.parametrize("policy", [p for p in SMALL if not isinstance(p, StreamingLLM)], ids=str)
def test_logits_are_those_of_a_matrix_masked_to_what_was_attended(policy, split):
    result = run(split, policy)
    mask = np.zeros((2, 4, 24, 24), bool)
    for query in range(24):
        for layer in range(2):
            for head in range(4):
                if query >= split:
                    mask[layer, head, query, list(result.attended[query - split + 1][layer][head // 2])] = True
                else:
                    mask[layer, head, query] = [policy.visible(query, key) for key in range(24)]
    close(result.logits, matrix_forward(PARAMS, GQA, TOKENS, mask)[0])


def test_tova_keeps_what_the_last_prompt_row_weighs_most_in_the_mean_of_all_heads():
    kept = run(20, TOVA(6)).kept[0]
    _, weights = matrix_forward(PARAMS, GQA, TOKENS[:20])
    for layer in range(2):
        top = np.argsort(weights[layer, :, -1].mean(0))[-6:]
        assert kept[layer] == [tuple(sorted(top))] * 2


def test_tova_drops_the_least_of_the_row_and_its_heads_agree():
    # 20 prompt tokens and a budget of 20: the first step holds 21 and nothing was dropped before.
    result = run(20, TOVA(20))
    _, weights = matrix_forward(PARAMS, GQA, TOKENS[:21])
    for layer in range(2):
        dropped = int(np.argmin(weights[layer, :, -1].mean(0)))
        assert result.kept[1][layer] == [tuple(p for p in range(21) if p != dropped)] * 2
    assert all(heads[0] == heads[1] for kept in run(3, TOVA(5)).kept for heads in kept)


def test_tova_can_drop_the_newest_token():
    result = run(1, TOVA(2))
    newest_kept = [step in result.kept[step][layer][0] for step in range(2, 24) for layer in range(2)]
    assert any(newest_kept)
    assert not all(newest_kept)


def test_h2o_keeps_the_recent_and_the_heaviest_column_sums_of_each_kv_head():
    result = run(20, H2O(4, 3))
    _, weights = matrix_forward(PARAMS, GQA, TOKENS[:20])
    columns = weights.sum(2).reshape(2, 2, 2, 20).sum(2)
    for layer in range(2):
        for head in range(2):
            heavy = np.argsort(columns[layer, head, :17])[-4:]
            kept = tuple(sorted([*heavy, 17, 18, 19]))
            assert result.kept[0][layer][head] == kept
            close(np.array([result.scores[0][layer][head][p] for p in kept]), columns[layer, head, list(kept)])
    assert any(heads[0] != heads[1] for heads in result.kept[0])


def test_h2o_scores_accumulate_over_steps_from_the_own_weight_on():
    # Nothing is dropped before the last step, so scores are the column sums of the whole matrix.
    result = run(10, H2O(10, 13))
    _, weights = matrix_forward(PARAMS, GQA, TOKENS)
    columns = weights.sum(2).reshape(2, 2, 2, 24).sum(2)
    for layer in range(2):
        for head in range(2):
            dropped = int(np.argmin(columns[layer, head, :11]))
            scores = result.scores[-1][layer][head]
            assert sorted(scores) == [p for p in range(24) if p != dropped]
            close(np.array([scores[p] for p in sorted(scores)]), np.delete(columns[layer, head], dropped))


def test_ties_keep_the_newer_token():
    assert policies.top({3: 1.0, 7: 1.0, 5: 1.0, 9: 0.5}, 2) == ({7, 5}, 0.0)
    # Without queries every row is uniform up to rounding of the softmax, which is exact for equal logits.
    zeroed = {f"layers_{i}": {**PARAMS[f"layers_{i}"]} for i in range(2)}
    for layer in zeroed.values():
        layer["attention"] = {**layer["attention"], "q": {"weight": np.zeros((32, 32))}}
    params = {**PARAMS, **zeroed}
    tova = decoder.run(params, GQA, TOKENS[:9], TOKENS[9:], TOVA(5))
    assert tova.margin == 0.0
    assert tova.kept == [[[tuple(range(end - 5, end))] * 2] * 2 for end in range(9, 25)]


# Layers with a window of their own


@pytest.mark.parametrize("policy", [Full(), TOVA(8), H2O(5, 3)], ids=str)
def test_a_layer_with_a_window_attends_inside_it_only(policy):
    config = ARCHITECTURES["windows"]
    result = decoder.run(PARAMS, config, TOKENS[:12], TOKENS[12:], policy)
    for step in range(1, 13):
        current = 12 + step - 1
        for head in range(2):
            assert all(current - 4 < p <= current for p in result.attended[step][0][head])
    assert any(min(result.attended[step][1][0]) <= 12 + step - 5 for step in range(1, 13))
    close(result.prompt_logits, matrix_forward(PARAMS, config, TOKENS[:12])[0])


def test_what_a_window_hides_scores_nothing_and_goes_first():
    config = ModelConfig(**BASE, windows=(4, 4))
    result = decoder.run(PARAMS, config, TOKENS[:12], TOKENS[12:], TOVA(8))
    # Budget above the window: hidden tokens tie at zero, the newer of them fill the rest.
    assert all(set(range(12 + s - 4, 12 + s)) <= set(result.kept[s][layer][0]) for s in range(13) for layer in range(2))
    assert result.kept[0] == [[tuple(range(4, 12))] * 2] * 2
    close(result.logits, matrix_forward(PARAMS, config, TOKENS)[0])


# Codecs


def test_int8_errs_by_at_most_half_a_scale_and_keeps_zero():
    x = np.random.default_rng(5).standard_normal((50, 8)) * np.logspace(-6, 6, 50)[:, None]
    x[7] = 0
    codec = Int8()
    codes, scale = codec.codes(x)
    # Quotient, product and x itself are float32, relative 2^-24 each, of at most 127 scales: 3 * 127 * 2^-24 = 2.3e-5.
    assert np.all(np.abs(codec.roundtrip(x) - x) <= scale * (0.5 + 5e-5))
    assert not codec.roundtrip(x)[7].any()
    assert np.all(np.abs(codes).max(-1)[x.any(-1)] == 127)


def test_int8_rounds_half_to_even():
    codes, scale = Int8().codes(np.array([127.0, 0.5, 1.5, 2.5, -0.5, -1.5]))
    assert scale[0] == 1
    assert codes.tolist() == [127, 0, 2, 2, 0, -2]


def test_recoding_a_decoded_int8_vector_changes_no_code():
    codec, x = Int8(), np.random.default_rng(6).standard_normal((200, 8))
    assert np.array_equal(codec.codes(codec.roundtrip(x))[0], codec.codes(x)[0])


def test_int8_codes_the_rotated_key():
    # The same vector at another position is another vector to the codec: rotating after decoding would not notice.
    key = np.random.default_rng(7).standard_normal((1, 8))
    late = Int8().roundtrip(decoder.rotate(key, [13], 100.0))
    assert np.abs(late - decoder.rotate(Int8().roundtrip(key), [13], 100.0)).max() > 1e-4
    instance = decoder.Decoder(PARAMS, GQA, Full(), Int8())
    instance.feed_prompt(TOKENS)
    stored = np.stack([entry.key for heads in instance.cache for entries in heads for entry in entries])
    # Coding what is coded changes no code, so it changes no value by more than the scale's own float32 rounding.
    close(Int8().roundtrip(stored), stored, 1e-6)


def test_int8_is_near_exact_and_bfloat16_nearer_than_int8():
    exact, half, byte = run(10, Full()), run(10, Full(), Dense("bfloat16")), run(10, Full(), Int8())
    off_half, off_byte = (np.abs(other.logits - exact.logits).max() for other in (half, byte))
    # Two roundings of relative size 2^-9 and 1/254 on keys and values, times a few in the logits.
    assert 0 < off_half < off_byte < 0.5


# Reading kvjax's own configurations


def test_counterparts_take_the_arguments_of_what_they_model():
    from kvjax.cache import codecs as real_codecs
    from kvjax.cache import policies as real_policies

    pairs = [
        (real_policies.Full(), Full()),
        (real_policies.SlidingWindow(window=7), SlidingWindow(7)),
        (real_policies.StreamingLLM(sinks=2, window=7), StreamingLLM(2, 7)),
        (real_policies.TOVA(budget=5), TOVA(5)),
        (real_policies.H2O(heavy=3, recent=4), H2O(3, 4)),
    ]
    assert all(policies.counterpart(real) == oracle for real, oracle in pairs)
    assert codecs.counterpart(real_codecs.Int8()) == Int8()
    assert codecs.counterpart(real_codecs.Dense()) == Dense()
    with pytest.raises(ValueError, match="there is no oracle"):
        policies.counterpart(object())


@pytest.mark.parametrize(
    "config", [ModelConfig(**BASE, windows=(4, None)), ModelConfig(**{**BASE, "num_layers": 1}, windows=(4,))]
)
def test_in_cache_positions_under_a_layers_window_are_refused(config):
    with pytest.raises(ValueError, match="nowhere defined"):
        decoder.run(random_params(config), config, TOKENS, (), StreamingLLM(2, 4))
