"""What must hold between variants, and which configurations contradict themselves.

Weights are random in every leaf. Unless said, two sides are the same float32 network summed in another order, and may
differ by rounding: logits of up to 5 were seen to differ by 1e-5 at most.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest

import kvjax
from kvjax.config import Experts, Latent, ModelConfig, RopeScaling
from kvjax.errors import ConfigError
from tests.models.cases import BASE, CLA, DEEPSEEK_V3, GPT_OSS, MLA, PLAIN, model_of, random_params, random_tokens

TOKENS = random_tokens(2, 2, 12)
NOISE = 3e-5
CACHE = kvjax.CacheConfig(page_size=4)
PATHS = ("forward", "decode")
"""Without a cache, and token by token behind a short prompt, so that prefill takes part as well."""
SOME = ("forward", pytest.param("decode", marks=pytest.mark.slow))

Params = dict[str, Any]


def logits(config: ModelConfig, params: Params, path: Any = "forward", tokens: np.ndarray = TOKENS) -> np.ndarray:
    """float32[B, T, V] along one path."""
    return np.asarray(kvjax.score(model_of(config, params), tokens, CACHE, path, prompt_length=5, prefill_chunk=8))


def close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = NOISE) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


def differ(ours: np.ndarray, theirs: np.ndarray) -> None:
    """By far more than rounding: what tells that an equality beside it is not empty."""
    assert np.abs(ours - theirs).max() > 1e-2


def changed(config: ModelConfig, edit: Any) -> Params:
    """The config's random parameters after `edit(name of the layer, its subtree)` in every layer."""
    params = copy.deepcopy(random_params(config))
    for name in params:
        if name.startswith("layers_"):
            edit(name, params[name])
    return params


# Heads


def test_grouped_queries_equal_as_many_heads_that_repeat_their_group():
    grouped = dataclasses.replace(PLAIN, qkv_bias=True)
    heads, group = grouped.num_heads, grouped.num_heads // grouped.num_kv_heads

    def repeat(name: str, layer: Params) -> None:
        for part in (layer["attention"][kind] for kind in "kv"):
            for leaf, value in part.items():
                by_head = value.reshape(grouped.num_kv_heads, grouped.width, *value.shape[1:])
                part[leaf] = np.repeat(by_head, group, axis=0).reshape(-1, *value.shape[1:])

    repeated = dataclasses.replace(grouped, num_kv_heads=heads)
    for path in PATHS:
        close(logits(repeated, changed(grouped, repeat), path), logits(grouped, random_params(grouped), path))


def test_groups_are_contiguous_heads():
    def swap(name: str, layer: Params) -> None:
        query, out = layer["attention"]["q"], layer["attention"]["o"]
        order = np.array([1, 0, 3, 2]) * 8  # within groups of two heads: which head of a group is which is a name
        columns = (order[:, None] + np.arange(8)).reshape(-1)
        query["weight"], out["weight"] = query["weight"][columns], out["weight"][:, columns]

    close(logits(PLAIN, changed(PLAIN, swap)), logits(PLAIN, random_params(PLAIN)))


# Sharing across layers


def test_layers_that_own_themselves_are_the_plain_model_bit_for_bit():
    config = dataclasses.replace(PLAIN, owners=tuple(range(PLAIN.num_layers)))
    params = random_params(PLAIN)
    for path in PATHS:
        np.testing.assert_array_equal(logits(config, params, path), logits(PLAIN, params, path))
    assert config.kv_spec == PLAIN.kv_spec


def test_a_reader_hears_of_its_owners_keys_and_values_only():
    params = random_params(CLA)
    assert "k" not in params["layers_1"]["attention"]
    assert "v" not in params["layers_3"]["attention"]
    others = copy.deepcopy(params)
    others["layers_0"]["attention"]["v"]["weight"] *= 0
    others["layers_0"]["attention"]["o"]["weight"] *= 0
    # Layer 0 gives nothing either way; what is left of its values is what layer 1 reads.
    silent = copy.deepcopy(params)
    silent["layers_0"]["attention"]["o"]["weight"] *= 0
    differ(logits(CLA, others), logits(CLA, silent))


# Latent attention


def test_absorbed_decoding_equals_the_naive_form():
    """Logits of order one: both forms err by a few float32 roundings, 1e-5 as the paper's identity demands."""

    def calm(name: str, layer: Params) -> None:
        layer["attention"]["q_up"]["weight"] /= 3

    params = changed(MLA, calm)
    params["head"]["weight"] = params["head"]["weight"] / 4
    naive = logits(MLA, params)
    for path in ("prefill", "decode"):
        close(logits(MLA, params, path), naive, 1e-5)


@pytest.mark.parametrize("path", SOME)
def test_permuting_the_rotated_columns_of_queries_and_keys_alike_changes_nothing(path):
    """Neighbours that turn together, moved half a head apart, turn together there: only their names differ."""
    latent = MLA.latent
    assert latent is not None
    apart = np.r_[0 : latent.qk_rope_head_dim : 2, 1 : latent.qk_rope_head_dim : 2]

    def move(name: str, layer: Params) -> None:
        query, key = layer["attention"]["q_up"], layer["attention"]["kv_down"]
        by_head = query["weight"].reshape(MLA.num_heads, latent.qk_head_dim, -1)
        columns = np.r_[0 : latent.qk_nope_head_dim, latent.qk_nope_head_dim + apart]
        query["weight"] = by_head[:, columns].reshape(query["weight"].shape)
        key["weight"] = key["weight"][np.r_[0 : latent.kv_lora_rank, latent.kv_lora_rank + apart]]

    halves = dataclasses.replace(MLA, latent=dataclasses.replace(latent, interleaved=False))
    expected, moved = logits(MLA, random_params(MLA), path), changed(MLA, move)
    close(logits(halves, moved, path), expected)
    differ(logits(MLA, moved, path), expected)


def test_pairing_neighbours_or_halves_differs_by_a_permutation_of_columns():
    apart = np.r_[0:8:2, 1:8:2]

    def move(name: str, layer: Params) -> None:
        for part in (layer["attention"][kind] for kind in "qk"):
            by_head = part["weight"].reshape(-1, 8, 32)
            part["weight"] = by_head[:, apart].reshape(part["weight"].shape)

    neighbours = dataclasses.replace(PLAIN, rope_interleaved=True)
    expected, moved = logits(neighbours, random_params(PLAIN)), changed(PLAIN, move)
    close(logits(PLAIN, moved), expected)
    differ(logits(neighbours, moved), expected)


def test_permuting_the_unrotated_columns_of_queries_and_keys_alike_changes_nothing():
    latent = DEEPSEEK_V3.latent
    assert latent is not None
    order = np.random.default_rng(0).permutation(latent.qk_nope_head_dim)

    def move(name: str, layer: Params) -> None:
        for part, width in (("q", latent.qk_head_dim), ("kv_up", latent.qk_nope_head_dim + latent.v_head_dim)):
            weight = layer["attention"][part]["weight"]
            columns = np.r_[order, latent.qk_nope_head_dim : width]
            by_head = weight.reshape(4, width, -1)
            layer["attention"][part]["weight"] = by_head[:, columns].reshape(weight.shape)

    for path in PATHS:
        close(
            logits(DEEPSEEK_V3, changed(DEEPSEEK_V3, move), path), logits(DEEPSEEK_V3, random_params(DEEPSEEK_V3), path)
        )


# Experts

BIASED = ModelConfig(
    **BASE,
    experts=Experts(count=6, per_token=2, intermediate_size=16, scoring="sigmoid", selection_bias=True),
)


def with_bias(bias: np.ndarray) -> Params:
    """BIASED's parameters with one selection bias in every layer."""

    def put(name: str, layer: Params) -> None:
        layer["mlp"]["router"]["selection_bias"] = bias.astype(np.float32)

    return changed(BIASED, put)


@pytest.mark.slow
def test_a_selection_bias_moves_the_choice_but_not_the_weight():
    favoured = [1, 4]
    bias = np.zeros(6)
    bias[favoured] = 100.0

    def only_favoured(name: str, layer: Params) -> None:
        mlp = layer["mlp"]
        for part in ("experts_gate", "experts_up", "experts_down"):
            mlp[part]["kernel"] = mlp[part]["kernel"][favoured]
        mlp["router"] = {"gate": {"weight": mlp["router"]["gate"]["weight"][favoured]}}

    two = ModelConfig(**BASE, experts=Experts(count=2, per_token=2, intermediate_size=16, scoring="sigmoid"))
    for path in PATHS:
        # Were 100 to enter the weights, sigmoid scores of less than one would be nothing beside it.
        close(logits(BIASED, with_bias(bias), path), logits(two, changed(BIASED, only_favoured), path))
    differ(logits(BIASED, with_bias(bias)), logits(BIASED, with_bias(np.zeros(6))))


def test_the_same_selection_bias_for_all_experts_is_none():
    # A power of two moves no score of (0, 1) by more than 2^-22, and none of these tokens' choices is that close.
    close(logits(BIASED, with_bias(np.full(6, 2.0))), logits(BIASED, with_bias(np.zeros(6))))


@pytest.mark.parametrize("path", SOME)
@pytest.mark.parametrize("config", [DEEPSEEK_V3, GPT_OSS], ids=["deepseek-v3", "gpt-oss"])
def test_a_token_is_the_same_whatever_its_batch_mates(config, path):
    """Another mate sends other tokens to the experts, and so moves everyone's place in their batches.

    Which rows share a matrix product may round differently, no more.
    """
    params = random_params(config)
    others = np.stack([TOKENS[0], random_tokens(9, 12)])
    ours, theirs = logits(config, params, path), logits(config, params, path, others)
    close(ours[0], theirs[0], 1e-5)
    differ(ours[1], theirs[1])


@pytest.mark.parametrize("path", ["forward", pytest.param("prefill", marks=pytest.mark.slow), "decode"])
def test_an_expert_that_nobody_chose_has_no_influence(path):
    """To the last bit, if its weights are finite: on CPU `jax.lax.ragged_dot` multiplies what nobody chose by zeros."""
    bias = np.zeros(6)
    bias[[0, 3]] = -1e9
    params = with_bias(bias)
    others = copy.deepcopy(params)
    for layer in (others["layers_0"], others["layers_1"]):
        for part in ("experts_gate", "experts_up", "experts_down"):
            layer["mlp"][part]["kernel"][[0, 3]] *= -1e6
    np.testing.assert_array_equal(logits(BIASED, others, path), logits(BIASED, params, path))


# Scores


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("windows", [(), (5, None)], ids=["all", "windows"])
def test_a_sink_that_nothing_reaches_is_none(windows, path):
    config = dataclasses.replace(PLAIN, windows=windows)
    sunk = dataclasses.replace(config, attention_sinks=True)

    def bury(name: str, layer: Params) -> None:
        layer["attention"]["sinks"] = np.full(4, -np.inf, np.float32)

    def drop(name: str, layer: Params) -> None:
        del layer["attention"]["sinks"]

    expected = logits(config, changed(sunk, drop), path)
    close(logits(sunk, changed(sunk, bury), path), expected)
    differ(logits(sunk, random_params(sunk), path), expected)


@pytest.mark.parametrize("path", SOME)
def test_a_sink_that_takes_everything_leaves_no_attention(path):
    sunk = dataclasses.replace(PLAIN, attention_sinks=True)

    def drown(name: str, layer: Params) -> None:
        layer["attention"]["sinks"] = np.full(4, 1e4, np.float32)

    def silence(name: str, layer: Params) -> None:
        drown(name, layer)
        layer["attention"]["o"]["weight"] *= 0

    close(logits(sunk, changed(sunk, drown), path), logits(sunk, changed(sunk, silence), path))


@pytest.mark.parametrize("path", SOME)
@pytest.mark.parametrize("name", ["attention_soft_cap", "logit_soft_cap"])
def test_a_soft_cap_far_above_all_scores_is_none(name, path):
    params = random_params(PLAIN)
    expected = logits(PLAIN, params, path)
    close(logits(dataclasses.replace(PLAIN, **{name: 1e9}), params, path), expected)
    differ(logits(dataclasses.replace(PLAIN, **{name: 1.0}), params, path), expected)


@pytest.mark.parametrize(
    "path", ["forward", *(pytest.param(path, marks=pytest.mark.slow) for path in ("prefill", "decode"))]
)
def test_windows_wider_than_the_text_are_none(path):
    params = random_params(PLAIN)
    expected = logits(PLAIN, params, path)
    close(logits(dataclasses.replace(PLAIN, windows=(12, 64)), params, path), expected)
    differ(logits(dataclasses.replace(PLAIN, windows=(11, 64)), params, path), expected)


# Configurations that contradict themselves

LATENT = Latent(kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
FOUR = {**BASE, "num_layers": 4}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"owners": (0, 0, 3, 3)}, r"owners\[2\] is 3; it must be the layer itself or an earlier one"),
        ({"owners": (0, 0, 1, 3)}, r"owners\[2\] is 1; it must be .* one that owns itself"),
        ({"owners": (0, 0)}, "owners has 2 entries for 4 layers"),
        ({"owners": (0, -1, 2, 3)}, r"owners\[1\] is -1"),
        ({"owners": (0, 0, 2, 2), "windows": (6, None, None, None)}, "layer 1 sees None positions and reads layer 0"),
        ({"owners": (0, 0, 2, 2), "latent": LATENT}, "owners with latent attention is not implemented"),
        ({"latent": LATENT, "qk_norm": True}, "drop qk_norm"),
        ({"latent": LATENT, "qk_norm_whole": True}, "drop qk_norm_whole"),
        ({"latent": LATENT, "rotary_fraction": 0.5}, "drop rotary_fraction"),
        ({"latent": LATENT, "rope_interleaved": True}, "drop rope_interleaved"),
        ({"latent": LATENT, "windows": (6, None) * 2, "local_rope_theta": 20.0}, "drop local_rope_theta"),
        ({"latent": LATENT, "attention_sinks": True}, "no sinks: drop attention_sinks"),
        ({"qk_norm": True, "qk_norm_whole": True}, "exclude each other"),
        ({"windows": (6, None)}, "windows has 2 entries for 4 layers"),
        ({"windows": (6, None, 0, None)}, "every window must be None or a positive integer"),
        ({"norm_placement": "both"}, "norm_placement must be one of pre, post, sandwich, got 'both'"),
        ({"activation": "relu"}, "activation must be one of silu, gelu, gelu_tanh, got 'relu'"),
        ({"rotary_fraction": 0.4}, "turn an even number of channels, got 0.4 of 8"),
        ({"rotary_fraction": 1.5}, "rotary_fraction must be in"),
        ({"attention_soft_cap": 0.0}, "attention_soft_cap must be a finite positive number"),
        ({"logit_soft_cap": -1.0}, "logit_soft_cap must be a finite positive number"),
        ({"query_scale": float("inf")}, "query_scale must be a finite positive number"),
        ({"local_rope_theta": -5.0}, "local_rope_theta must be a finite positive number"),
        ({"experts": Experts(4, 2, 16, dense_layers=(4,))}, r"dense_layers names layer 4 of 4"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_contradictory_fields_are_refused_by_name(fields, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**{**FOUR, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": 3}, "groups must divide count 8 and groups_per_token be 1 to groups, got 3"),
        ({"groups": 4, "groups_per_token": 5}, "groups_per_token be 1 to groups, got 4 and 5"),
        ({"groups": 4, "per_token": 3}, "per_token 3 exceeds the 2 experts of the groups chosen"),
        ({"per_token": 9}, "1 <= per_token <= count"),
        ({"count": 0}, "count >= 1"),
        ({"intermediate_size": 0}, "positive intermediate_size"),
        ({"scoring": "tanh"}, "scoring is .* got 'tanh'"),
        ({"group_score": "mean"}, "group_score .* got .* 'mean'"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_contradictory_experts_are_refused_by_name(fields, message):
    with pytest.raises(ConfigError, match=message):
        Experts(**{"count": 8, "per_token": 2, "intermediate_size": 16, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim must be even"),
        ({"kv_lora_rank": 0}, "kv_lora_rank must be a positive integer, got 0"),
        ({"q_lora_rank": -1}, "q_lora_rank must be a positive integer, got -1"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_contradictory_latents_are_refused_by_name(fields, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(LATENT, **fields)


def test_long_rope_without_a_factor_for_each_pair_is_refused():
    scaling = RopeScaling("longrope", factor=2.0, original_max_position_embeddings=64, short_factor=(1.0, 2.0, 3.0))
    with pytest.raises(ConfigError, match="longrope needs 4 factors, one per rotated pair, got 3"):
        logits(dataclasses.replace(PLAIN, rope_scaling=scaling), random_params(PLAIN))
