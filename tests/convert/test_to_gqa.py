"""Fewer key-value heads: what is exact is equal, what is lost is least along the strongest directions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import kvjax
from kvjax import CacheConfig, ModelConfig
from kvjax.cache.codecs import KVQuant
from kvjax.cache.policies import LMInfinite, StreamingLLM
from kvjax.config import GoldFinch
from kvjax.convert import gqa, svd_merging, to_cla, to_gqa, to_mla
from kvjax.convert.calibration import mean_loss, moments_of
from kvjax.convert.principal import principal, share_of_groups, share_within
from kvjax.errors import CheckpointError, ConfigError
from kvjax.generate.state import layouts_of
from tests.convert.converted import (
    CALIBRATION,
    ROTATED,
    SUMS,
    check_decodes,
    logits,
    small,
    transformers_logits,
    with_attention,
)
from tests.models.cases import MLA

ROOT = Path(__file__).resolve().parent.parent.parent
LAYERS, HEADS, WIDTH = 2, 4, 8


@pytest.mark.parametrize("method", ["mean", "svd"])
def test_as_many_heads_as_there_are_is_the_model_itself(method: Any) -> None:
    model = small()
    same = to_gqa(model, HEADS, method, CALIBRATION)
    assert same.config == model.config
    jax.tree.map(np.testing.assert_array_equal, same.params, model.params)


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_mean_pools_weights_biases_and_whole_norms_of_neighbouring_heads(kv_heads: int) -> None:
    model = small(qkv_bias=True, qk_norm_whole=True)
    pooled = to_gqa(model, kv_heads)
    assert pooled.config.num_kv_heads == kv_heads
    for layer in range(LAYERS):
        old, new = (each.params[f"layers_{layer}"]["attention"] for each in (model, pooled))
        for name, leaf in (("k", "weight"), ("k", "bias"), ("v", "weight"), ("v", "bias"), ("k_norm", "scale")):
            before, after = np.asarray(old[name][leaf]), np.asarray(new[name][leaf])
            size = HEADS // kv_heads
            for head in range(kv_heads):
                members = [before[h * WIDTH : (h + 1) * WIDTH] for h in range(head * size, (head + 1) * size)]
                # One rounding of a mean of float32 numbers of about 1.
                np.testing.assert_allclose(after[head * WIDTH : (head + 1) * WIDTH], sum(members) / size, atol=1e-6)
        for name in ("q", "o", "q_norm"):
            jax.tree.map(np.testing.assert_array_equal, new[name], old[name])


def doubled(scale: float, mix: np.ndarray) -> kvjax.Model:
    """Heads 1 and 3 have `scale` times the keys of heads 0 and 2, and their values times `mix`."""
    model = small(qkv_bias=True)
    for layer in range(LAYERS):
        attention = model.params[f"layers_{layer}"]["attention"]
        parts = {}
        for name, leaf in (("k", "weight"), ("k", "bias"), ("v", "weight"), ("v", "bias")):
            heads = np.asarray(attention[name][leaf]).reshape(HEADS, WIDTH, -1)[::2]
            other = scale * heads if name == "k" else np.einsum("ij,hjx->hix", mix, heads)
            parts[f"{name}_{leaf}"] = np.stack([heads, other], 1).reshape(np.shape(attention[name][leaf]))
        model = with_attention(model, layer, **parts)
    return model


@pytest.mark.parametrize("method", ["mean", "svd"])
def test_identical_heads_pool_losslessly(method: Any) -> None:
    model = doubled(1.0, np.eye(WIDTH))
    pooled, report = gqa.convert(model, 2, method, CALIBRATION)
    np.testing.assert_allclose(logits(pooled), logits(model), atol=SUMS if method == "mean" else ROTATED)
    assert all(layer.keys == pytest.approx(1) and layer.values == pytest.approx(1) for layer in report.layers)


@pytest.mark.parametrize("calibration", [CALIBRATION, None])
def test_svd_loses_nothing_where_a_groups_heads_span_the_room_of_one(calibration: Any) -> None:
    model = doubled(-0.5, np.random.default_rng(0).standard_normal((WIDTH, WIDTH)))
    merged, report = gqa.convert(model, 2, "svd", calibration)
    np.testing.assert_allclose(logits(merged), logits(model), atol=ROTATED)
    assert min(min(layer.keys, layer.values) for layer in report.layers) == pytest.approx(1)
    assert np.abs(logits(to_gqa(model, 2)) - logits(model)).max() > 0.1


def test_projecting_each_head_to_all_its_directions_is_exact() -> None:
    model = small(qk_norm=True)
    merged, energies = svd_merging.merged(model, HEADS, CALIBRATION)
    assert merged.config.merged_keys == HEADS
    np.testing.assert_allclose(logits(merged), logits(model), atol=ROTATED)
    assert all(energy.keys == pytest.approx(1) and energy.values == pytest.approx(1) for energy in energies)


def test_directions_and_energy_are_those_of_a_singular_value_decomposition() -> None:
    keys = np.random.default_rng(0).standard_normal((50, 12)) @ np.diag(np.arange(12.0))
    moment = keys.T @ keys
    singular, right = np.linalg.svd(keys, full_matrices=False)[1:]
    for rank in (1, 5, 12):
        basis = principal(moment, rank)
        # Equal up to the sign of each direction; condition numbers square in the moment.
        np.testing.assert_allclose(np.abs(np.sum(basis * right[:rank].T, 0)), 1, atol=1e-6)
        assert share_within(moment, basis) == pytest.approx((singular[:rank] ** 2).sum() / (singular**2).sum())
    # All directions: nothing is lost of any key.
    np.testing.assert_allclose(keys @ principal(moment) @ principal(moment).T, keys, atol=1e-9)
    two = np.stack([moment, 3 * moment[::-1, ::-1]])
    bases = np.stack([principal(each, 4) for each in two])
    wanted = (share_within(two[0], bases[0]) + 3 * share_within(two[1], bases[1])) / 4
    assert share_of_groups(two, bases) == pytest.approx(wanted)


def test_moments_are_sums_over_rotated_keys() -> None:
    """Of a first layer, whose input needs no attention; RoPE by complex numbers."""
    model = small()
    params = {name: jax.tree.map(np.float64, part) for name, part in model.params.items()}
    x = params["embed"]["embedding"][CALIBRATION]
    x = (
        x
        / np.sqrt((x**2).mean(-1, keepdims=True) + model.config.norm_eps)
        * params["layers_0"]["attention_norm"]["scale"]
    )
    k, v = (x @ params["layers_0"]["attention"][name]["weight"].T for name in ("k", "v"))
    heads = k.reshape(*CALIBRATION.shape, HEADS, 2, WIDTH // 2)
    angle = np.arange(CALIBRATION.shape[1])[:, None] * 100.0 ** (-np.arange(0, WIDTH, 2) / WIDTH)
    turned = (heads[..., 0, :] + 1j * heads[..., 1, :]) * np.exp(1j * angle)[:, None]
    turned = np.concatenate([turned.real, turned.imag], -1).reshape(-1, 2, 2 * WIDTH)
    moments = moments_of(model, CALIBRATION, 2)[0]
    count = CALIBRATION.size
    # Sums of 96 float32 products of about 1.
    np.testing.assert_allclose(moments.keys, np.einsum("xgi,xgj->gij", turned, turned) / count, atol=1e-4)
    v = v.reshape(-1, 2, 2 * WIDTH)
    np.testing.assert_allclose(moments.values, np.einsum("xgi,xgj->gij", v, v) / count, atol=1e-4)
    both = np.concatenate([k.reshape(count, -1), v.reshape(count, -1)], -1)
    np.testing.assert_allclose(moments_of(model, CALIBRATION, None)[0].keys[0], both.T @ both / count, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"qkv_bias": True, "o_bias": True}),
        pytest.param("qwen2", {"qkv_bias": True}, marks=pytest.mark.slow),
        ("qwen3", {"qk_norm": True}),
    ],
)
def test_transformers_reads_a_pooled_model_of_its_own_family(tmp_path: Path, family: str, fields: Any) -> None:
    pooled = to_gqa(small(family=family, **fields), 1)
    kvjax.save(pooled, tmp_path / "out", "safetensors")
    # Two implementations in float32, as in the parity tests.
    np.testing.assert_allclose(transformers_logits(tmp_path / "out"), logits(pooled), atol=ROTATED)


def test_a_merged_model_decodes_is_kept_by_orbax_and_has_no_other_form(tmp_path: Path) -> None:
    merged = to_gqa(small(family="qwen3", qk_norm=True), 2, "svd", CALIBRATION)
    check_decodes(merged)
    kvjax.save(merged, tmp_path / "out")
    again = kvjax.load(tmp_path / "out")
    assert again.config == merged.config
    np.testing.assert_array_equal(logits(again), logits(merged))
    with pytest.raises(CheckpointError, match='merged_keys=4 cannot be written .* format="orbax"'):
        kvjax.save(merged, tmp_path / "hf", "safetensors")


@pytest.mark.parametrize(
    "cache",
    [
        CacheConfig(policy=StreamingLLM(2, 4)),
        CacheConfig(policy=LMInfinite(2, 4)),
        CacheConfig(codec=KVQuant(calibration=None)),
    ],
)
def test_what_turns_queries_or_keys_is_refused_with_merged_keys(cache: CacheConfig) -> None:
    merged = to_gqa(small(), 2, "svd")
    with pytest.raises(ConfigError, match="turns queries or keys .* merges 4 key heads into 2"):
        layouts_of(merged, cache)


@pytest.mark.parametrize("method", ["mean", "svd"])
def test_bytes_fall_with_the_heads(method: Any) -> None:
    _, report = gqa.convert(small(), 1, method)
    assert report.bytes_before == 2 * LAYERS * HEADS * WIDTH * 4
    assert report.bytes_after == report.bytes_before // 4
    assert report.bytes_after == kvjax.plan(to_gqa(small(), 1, method).config).bytes_per_token
    assert [layer.bytes_after for layer in report.layers] == [2 * WIDTH * 4] * LAYERS
    assert report.loss_before is None


def test_calibrated_svd_loses_less_than_mean_pooling_on_text_it_has_not_seen() -> None:
    model = kvjax.load(ROOT / "models" / "demo", dtype="float32")
    text = np.frombuffer((ROOT / "kvjax" / "models" / "rotary.py").read_bytes()[:2048], np.uint8).astype(np.int32)
    calibration, held_out = text.reshape(2, 8, 128)
    (merged, kept), (pooled, averaged) = (gqa.convert(model, 1, m, calibration) for m in ("svd", "mean"))
    assert kept.loss_before is not None
    assert kept.loss_after is not None
    assert averaged.loss_after is not None
    assert kept.loss_before < kept.loss_after < averaged.loss_after
    before, after, mean = (mean_loss(each, held_out) for each in (model, merged, pooled))
    # Over 16 kB of held-out code: 0.94, 1.02 and 3.08 nats per byte.
    assert before < after < before + 0.4
    assert mean > before + 1.0
    for one, other in zip(kept.layers, averaged.layers, strict=True):
        assert one.keys > other.keys
        assert one.values > other.values


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv_heads": 3}, "kv_heads must be 1 to the model's num_kv_heads 4, and divide it, got 3"),
        ({"kv_heads": 8}, "got 8"),
        ({"kv_heads": 0}, "got 0"),
        ({"kv_heads": 2.0}, "got 2.0"),
        ({"kv_heads": 2, "method": "median"}, "method must be one of mean, svd, got 'median'"),
        ({"kv_heads": 2, "calibration": np.zeros(4, int)}, r"calibration must be integer tokens\[N, T\]"),
        ({"kv_heads": 2, "calibration": np.zeros((0, 4), int)}, r"got int64 \(0, 4\)"),
        ({"kv_heads": 2, "calibration": [[1, 2], [3]]}, "rows of one length"),
        ({"kv_heads": 2, "calibration": np.full((2, 4), np.nan)}, "got float64"),
        ({"kv_heads": 2, "calibration": np.full((2, 4), 61)}, "calibration tokens must be 0 to 60, got 61 to 61"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_gqa(small(), **arguments)


GOLDFINCH = ModelConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=4,
    goldfinch=GoldFinch(lower_layers=2),
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MLA, r"has latent attention \(MLA\) already"),
        (small(num_layers=4, owners=(0, 0, 2, 2)).config, r"shares keys and values across layers \(CLA\) already"),
        (GOLDFINCH, "GoldFinch"),
        (small(retention_layers=(0,)).config, "has retention layers"),
        (small(merged_keys=4, num_kv_heads=2).config, "merges its key heads after RoPE already"),
    ],
)
def test_models_without_plain_keys_are_refused_with_what_they_are(config: ModelConfig, message: str) -> None:
    model = dataclasses.replace(small(), config=config)
    for convert in (lambda: to_gqa(model, 1), lambda: to_mla(model, 8, 8), lambda: to_cla(model)):
        with pytest.raises(ConfigError, match=message):
            convert()


def test_damaged_weights_and_stacked_ones_are_refused() -> None:
    model = small()
    broken = with_attention(model, 0, k_weight=np.full((HEADS * WIDTH, 32), np.nan))
    with pytest.raises(ConfigError, match="layer 0 are not finite"):
        to_gqa(broken, 2, "svd", CALIBRATION)
    stacked = dataclasses.replace(model, params=kvjax.models.stack_layers(model.params))
    with pytest.raises(ConfigError, match="unstack_layers"):
        to_gqa(stacked, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"merged_keys": 3, "num_kv_heads": 2}, "merged_keys must be a multiple of num_kv_heads 2"),
        ({"merged_keys": 2, "num_kv_heads": 4}, "got 2"),
        ({"merged_keys": 4, "num_kv_heads": 2, "owners": (0, 0)}, "goes with no owners"),
    ],
)
def test_impossible_merged_keys_are_refused_when_the_config_is_made(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(small().config, **fields)
