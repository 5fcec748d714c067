"""Latent attention from plain attention: turning keys among themselves changes nothing, what is dropped is least."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import kvjax
from kvjax import Model, RopeScaling
from kvjax.convert import mla, to_mla
from kvjax.convert.calibration import moments_of
from kvjax.convert.mla import Sizes, channel_pairs, gather
from kvjax.errors import CheckpointError, ConfigError
from kvjax.models.rotary import inverse_frequencies
from tests.convert.converted import CALIBRATION, ROTATED, check_decodes, logits, small, transformers_logits
from tests.models.cases import GEMMA_2, YARN, model_of

WIDTH = 8
LLAMA3 = RopeScaling("llama3", factor=4.0, original_max_position_embeddings=32)


def random_moment(heads: int) -> np.ndarray:
    """Of keys side by side, some directions far stronger than others."""
    rng = np.random.default_rng(1)
    keys = rng.standard_normal((200, heads * WIDTH)) @ rng.standard_normal((heads * WIDTH, heads * WIDTH))
    return keys.T @ keys / 200


def turned_by(x: np.ndarray, first: np.ndarray, second: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """RoPE with channels first[i], second[i] as pair i: float64[..., n]."""
    out = x.copy()
    out[..., first] = x[..., first] * np.cos(angles) - x[..., second] * np.sin(angles)
    out[..., second] = x[..., second] * np.cos(angles) + x[..., first] * np.sin(angles)
    return out


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotating_keys_frequency_by_frequency_changes_no_score(interleaved: bool) -> None:
    heads, half = 3, WIDTH // 2
    slots = tuple(range(half)) * heads
    pairs = channel_pairs(WIDTH, interleaved)
    turned, rest = gather(random_moment(heads), heads, pairs, Sizes(1, heads * WIDTH, slots, 1))
    assert len(rest) == 0
    np.testing.assert_allclose(turned @ turned.T, np.eye(heads * WIDTH), atol=1e-12)
    rng = np.random.default_rng(2)
    q, k = rng.standard_normal((2, heads, WIDTH))
    frequencies = 100.0 ** (-np.arange(half) / half)
    even = np.arange(0, heads * WIDTH, 2)
    for position in (0, 1, 17):
        for head in range(heads):
            rotated = turned_by(k, pairs[:, 0], pairs[:, 1], position * frequencies)
            wanted = (q[head] * rotated[head]).sum()
            query = np.zeros((heads, WIDTH))
            query[head] = q[head]
            keys = turned_by(turned @ k.reshape(-1), even, even + 1, position * frequencies[list(slots)])
            # Both in float64, on sums of a few dozen products.
            assert (turned @ query.reshape(-1)) @ keys == pytest.approx(wanted, abs=1e-10)


@pytest.mark.parametrize(("rope", "fold"), [(8, 1), (4, 2), (4, 1), (4, 4), (2, 4), (16, 1), (16, 2)])
def test_the_strongest_of_each_frequency_stay_turned(rope: int, fold: int) -> None:
    heads, moment = 3, random_moment(3)
    step = max(1, WIDTH // rope)
    slots = tuple(range(0, WIDTH // 2, step)) * max(1, rope // WIDTH)
    pairs = channel_pairs(WIDTH, False)
    turned, rest = gather(moment, heads, pairs, Sizes(1, rope, slots, fold))
    whole = np.concatenate([turned, rest])
    np.testing.assert_allclose(whole @ whole.T, np.eye(heads * WIDTH), atol=1e-12)
    energy = np.einsum("ri,ij,rj->r", turned, moment, turned).reshape(-1, 2).sum(1)
    for first in range(0, WIDTH // 2, fold):
        mine = [slot for slot, frequency in enumerate(slots) if first <= frequency < first + fold]
        index = [(np.arange(heads)[:, None] * WIDTH + pairs[first : first + fold, part]).reshape(-1) for part in (0, 1)]
        best = np.linalg.eigvalsh(sum(moment[np.ix_(i, i)] for i in index))[::-1]
        np.testing.assert_allclose(energy[mine], best[: len(mine)], rtol=1e-9)


EXACT: dict[str, dict[str, Any]] = {
    "gqa": {"num_kv_heads": 2},
    "mqa": {"num_kv_heads": 1, "query_scale": 0.5, "attention_soft_cap": 3.0},
    "biases and pairs side by side": {"qkv_bias": True, "num_kv_heads": 2, "rope_interleaved": True},
    "yarn and windows": {"rope_scaling": YARN, "num_kv_heads": 2, "windows": (5, None)},
}


@pytest.mark.parametrize("case", [c if "and" in c else pytest.param(c, marks=pytest.mark.slow) for c in EXACT])
def test_full_rank_with_rope_on_all_heads_is_the_model(case: str) -> None:
    model = small(**EXACT[case])
    heads = model.config.num_kv_heads
    after, report = mla.convert(model, heads * WIDTH, heads * WIDTH, CALIBRATION)
    np.testing.assert_allclose(logits(after), logits(model), atol=ROTATED)
    assert after.config.attention_kind == "MLA"
    assert report.loss_after == pytest.approx(report.loss_before, abs=1e-5)
    assert all(min(layer.keys, layer.values, layer.rope) == pytest.approx(1) for layer in report.layers)


def expanded(model: Model, layer: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys without position and values [H, D] that a converted layer makes of inputs [n, hidden]."""
    latent, attention = model.config.latent, model.params[f"layers_{layer}"]["attention"]
    assert latent is not None
    made = x @ np.float64(attention["kv_down"]["weight"]).T[:, : latent.kv_lora_rank]
    both = (made @ np.float64(attention["kv_up"]["weight"]).T).reshape(len(x), -1, 2 * WIDTH)
    return both[..., :WIDTH], both[..., WIDTH:]


def test_the_latent_keeps_the_strongest_directions_of_balanced_keys_and_values() -> None:
    """Against NumPy's singular values of weights [keys without position / ratio | values], inputs taken as white."""
    model = small(num_kv_heads=2)
    ones = {**model.params["layers_0"], "attention_norm": {"scale": np.ones(32, np.float32)}}
    model = dataclasses.replace(model, params={**model.params, "layers_0": ones})
    k, v = (np.float64(model.params["layers_0"]["attention"][name]["weight"]).T for name in ("k", "v"))
    moment = moments_of(model, None, None)[0].keys[0]
    np.testing.assert_allclose(moment, np.block([[k.T @ k, k.T @ v], [v.T @ k, v.T @ v]]), atol=1e-9)
    sizes = Sizes(6, 8, tuple(range(4)), 1)
    _, rest = gather(moment[:16, :16], 2, channel_pairs(WIDTH, False), sizes)
    nope = k @ rest.T
    ratio = np.linalg.norm(nope, axis=0).mean() / np.linalg.norm(v, axis=0).mean()
    joint = np.concatenate([nope / ratio, v], axis=1)
    left, singular, right = np.linalg.svd(joint, full_matrices=False)
    best = (left[:, :6] * singular[:6]) @ right[:6]
    after, report = mla.convert(model, 6, 8)
    keys, values = expanded(after, 0, np.eye(32))
    for head in range(4):
        wanted = ratio * best[:, : len(rest)] @ rest[:, head // 2 * WIDTH : (head // 2 + 1) * WIDTH]
        # Weights of about 0.2, rounded to float32 twice.
        np.testing.assert_allclose(keys[:, head], wanted, atol=1e-5)
        np.testing.assert_allclose(values[:, head], best[:, len(rest) :].reshape(32, 2, WIDTH)[:, head // 2], atol=1e-5)
    lost = (joint - best) ** 2
    assert report.layers[0].values == pytest.approx(1 - lost[:, len(rest) :].sum() / (v**2).sum())
    assert report.layers[0].keys == pytest.approx(1 - ratio**2 * lost[:, : len(rest)].sum() / (k**2).sum())
    assert 0.5 < report.layers[0].rope < 1


@pytest.mark.parametrize("scaling", [RopeScaling(), LLAMA3, RopeScaling("linear", 3.0), YARN])
@pytest.mark.parametrize("rope", [4, 8, 16])
def test_rotated_channels_turn_by_every_few_of_the_frequencies(scaling: RopeScaling, rope: int) -> None:
    config = small(rope_scaling=scaling).config
    target = mla.latent_config(config, 8, rope)
    whole, factor = inverse_frequencies(WIDTH, config.rope_theta, scaling)
    found, after = inverse_frequencies(target.rotary_width, target.rope_theta, target.rope_scaling)
    # A divisor per pair is rounded to float32 once more.
    np.testing.assert_allclose(found, np.tile(whole[:: max(1, WIDTH // rope)], max(1, rope // WIDTH)), rtol=1e-6)
    assert after == pytest.approx(factor)


@pytest.mark.slow
def test_a_lossy_model_decodes_absorbed_and_is_kept_by_orbax(tmp_path: Path) -> None:
    after = to_mla(small(qkv_bias=True), 12, 4, CALIBRATION)
    check_decodes(after)
    assert np.abs(logits(after) - logits(small(qkv_bias=True))).max() > 0.1
    kvjax.save(after, tmp_path / "out")
    again = kvjax.load(tmp_path / "out")
    assert again.config == after.config
    np.testing.assert_array_equal(logits(again), logits(after))


@pytest.mark.parametrize(
    ("fields", "rope", "family"),
    [
        ({"rope_scaling": LLAMA3}, 4, "deepseek_v3"),
        ({"family": "qwen2", "qkv_bias": True, "num_kv_heads": 2}, 16, "deepseek_v3"),
        ({"mlp_bias": True, "o_bias": True, "qkv_bias": True}, 8, "deepseek_v2"),
    ],
    ids=["llama", "qwen2-all-heads", "biases"],
)
def test_transformers_reads_the_deepseek_directory(tmp_path: Path, fields: Any, rope: int, family: str) -> None:
    after = to_mla(small(**fields), 12, rope, CALIBRATION)
    kvjax.save(after, tmp_path / "out", "safetensors")
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (document["model_type"], document["kv_lora_rank"], document["qk_rope_head_dim"]) == (family, 12, rope)
    # The norm is off by less than float32 rounds; two implementations in float32, as in the parity tests.
    np.testing.assert_allclose(transformers_logits(tmp_path / "out"), logits(after), atol=ROTATED)
    np.testing.assert_allclose(logits(kvjax.load(tmp_path / "out")), logits(after), atol=ROTATED)


def test_a_bfloat16_directory_holds_the_latent_as_exactly_as_the_model_itself(tmp_path: Path) -> None:
    model = small()
    half = dataclasses.replace(model, params=jax.tree.map(lambda x: x.astype("bfloat16"), model.params))
    after = to_mla(half, 24, 8)
    kvjax.save(after, tmp_path / "out", "safetensors")
    again = kvjax.load(tmp_path / "out", dtype="auto")
    ours, theirs = (each.params["layers_0"]["attention"]["kv_down"]["weight"][:24] for each in (after, again))
    np.testing.assert_array_equal(np.float64(theirs) * 2.0**32, np.float64(ours))


def test_what_no_deepseek_file_can_say_is_refused(tmp_path: Path) -> None:
    model = small()
    half = dataclasses.replace(model, params=jax.tree.map(lambda x: x.astype("float16"), model.params))
    with pytest.raises(CheckpointError, match="not in float16"):
        kvjax.save(to_mla(half, 8, 8), tmp_path / "out", "safetensors")
    with pytest.raises(CheckpointError, match="attention_soft_cap"):
        kvjax.save(to_mla(small(attention_soft_cap=3.0), 8, 8), tmp_path / "out", "safetensors")


def test_bytes_fall_to_the_latent_and_the_rotated_channels() -> None:
    _, report = mla.convert(small(), 12, 4)
    assert report.bytes_before == 2 * 2 * 4 * WIDTH * 4
    assert report.bytes_after == 2 * (12 + 4) * 4
    assert report.bytes_after == kvjax.plan(to_mla(small(), 12, 4).config).bytes_per_token


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 3), "rope_head_dim must be an even divisor of head_dim 8, or a multiple of it up to 32 .* got 3"),
        ((8, 6), "got 6"),
        ((8, 12), "got 12"),
        ((8, 40), "got 40"),
        ((8, 0), "got 0"),
        ((61, 4), r"kv_lora_rank must be 1 to 2 \* num_kv_heads \* head_dim - rope_head_dim = 60, got 61"),
        ((0, 4), "got 0"),
        ((8, 4, None, 3), "freq_fold must be None or a divisor of the 4 frequencies, got 3"),
        ((8, 4, np.zeros((2, 0), int)), "calibration must be"),
        ((8, 4, np.full((2, 3), -1)), "calibration tokens must be 0 to 60, got -1 to -1"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_mla(small(), *arguments)


@pytest.mark.parametrize(
    "fields",
    [{"qk_norm": True}, {"qk_norm_whole": True}, {"attention_sinks": True}, {"rotary_fraction": 0.5}],
)
def test_attention_that_the_layout_cannot_say_is_refused_with_the_reason(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        to_mla(small(**fields), 8, 8)


def test_layers_that_soften_scores_and_norm_what_they_give_convert_too() -> None:
    model = model_of(GEMMA_2)
    np.testing.assert_allclose(logits(to_mla(model, 16, 16)), logits(model), atol=ROTATED)
