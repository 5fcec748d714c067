"""Weights of every family arrive in their places, also those that lie in parts of a tensor or in one tensor per expert,
and are written back bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.checkpoint import load, save
from kvjax.convert.families import FAMILIES
from kvjax.convert.hf import load_hf, save_hf
from kvjax.convert.hf_place import Part
from kvjax.convert.tensor_file import StoredTensor
from kvjax.errors import CheckpointError
from kvjax.model import parameter_shapes
from tests.convert.directories import random_tensors, stored_bytes, write_directory
from tests.convert.family_directories import DOCUMENTS, EXPERTS, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, MLP, shapes_of

PER_EXPERT = ("qwen3_moe", "mixtral", "deepseek_v2", "deepseek_v3")


def read(path: Path, dtype: np.dtype | None = None) -> tuple[Any, Any]:
    return load_hf(path, dtype, lambda config: None)


def write(path: Path, name: str, tensors: dict[str, np.ndarray], shards: int = 1, **fields: Any) -> Path:
    document = {**DOCUMENTS[name], **fields}
    return write_directory(path, tensors, shards, hidden_act=..., **document)


def tensors_of(name: str, dtype: str = "float32", **fields: Any) -> dict[str, np.ndarray]:
    return random_tensors(shapes_of({**DOCUMENTS[name], **fields}), dtype)


def test_every_family_has_a_directory_here() -> None:
    assert set(FAMILIES) - set(DOCUMENTS) == {"llama", "qwen2", "qwen3", "mistral"}


@pytest.mark.parametrize(("shards", "dtype"), [(1, "float32"), (3, "bfloat16")])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_loading_and_saving_gives_the_same_names_and_bits(tmp_path: Path, name: str, shards: int, dtype: str) -> None:
    tensors = tensors_of(name, dtype)
    path = write(tmp_path / "in", name, tensors, shards)
    config, params = read(path)
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, parameter_shapes(config))
    out = tmp_path / "out"
    out.mkdir()
    save_hf(config, params, out, max_shard_bytes=20_000)
    assert stored_bytes(out) == stored_bytes(path)
    again, _ = read(out)
    assert dataclasses.replace(again, extra="{}") == dataclasses.replace(config, extra="{}")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_tensors_of_several_blocks_are_whole(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, name, tensors_of(name))
    _, whole = read(path)
    blocks = StoredTensor.blocks
    monkeypatch.setattr(StoredTensor, "blocks", lambda self: blocks(self, 7 * 4 * HIDDEN))  # seven rows to a block
    _, pieces = read(path)
    jax.tree.map(np.testing.assert_array_equal, pieces, whole)


@pytest.mark.parametrize("name", PER_EXPERT)
def test_a_tensor_per_expert_becomes_one_stack(tmp_path: Path, name: str) -> None:
    tensors = tensors_of(name)
    _, params = read(write(tmp_path, name, tensors))
    mlp = params["layers_1"]["mlp"]
    theirs = ("w1", "w3", "w2") if name == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    prefix = "model.layers.1." + ("block_sparse_moe" if name == "mixtral" else "mlp")
    np.testing.assert_array_equal(mlp["router"]["gate"]["weight"], tensors[f"{prefix}.gate.weight"])
    for ours, module in zip(("gate", "up", "down"), theirs, strict=True):
        kernels = mlp[f"experts_{ours}"]["kernel"]
        assert len(kernels) == EXPERTS
        for number, kernel in enumerate(kernels):
            np.testing.assert_array_equal(kernel.T, tensors[f"{prefix}.experts.{number}.{module}.weight"])


def test_rows_of_a_fused_tensor_are_told_apart(tmp_path: Path) -> None:
    tensors = tensors_of("phi3")
    _, params = read(write(tmp_path, "phi3", tensors))
    layer, queries, keys = params["layers_1"], HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    fused = tensors["model.layers.1.self_attn.qkv_proj.weight"]
    np.testing.assert_array_equal(layer["attention"]["q"]["weight"], fused[:queries])
    np.testing.assert_array_equal(layer["attention"]["k"]["weight"], fused[queries : queries + keys])
    np.testing.assert_array_equal(layer["attention"]["v"]["weight"], fused[queries + keys :])
    fused = tensors["model.layers.1.mlp.gate_up_proj.weight"]
    np.testing.assert_array_equal(layer["mlp"]["gate"]["weight"], fused[:MLP])
    np.testing.assert_array_equal(layer["mlp"]["up"]["weight"], fused[MLP:])


@pytest.mark.parametrize(
    "part", [Part(0, 0, 9, 9), Part(0, 2, 5, 9), Part(0, 0, 4, 9, step=2), Part(0, 1, 3, 9, step=3)]
)
@pytest.mark.parametrize("block", [1, 2, 4, 9])
def test_a_part_read_block_by_block_is_the_part(part: Part, block: int) -> None:
    tensor, found = np.arange(9), np.full(part.count, -1)
    for first in range(0, 9, block):
        taken, given = part.rows(first, min(first + block, 9))
        found[given] = tensor[first : first + block][taken]
    np.testing.assert_array_equal(found, tensor[part.index(1)])
    np.testing.assert_array_equal(found, part.start + part.step * np.arange(part.count))


def test_alternating_gate_and_up_are_told_apart(tmp_path: Path) -> None:
    tensors = tensors_of("gpt_oss")
    _, params = read(write(tmp_path, "gpt_oss", tensors))
    mlp, prefix = params["layers_0"]["mlp"], "model.layers.0.mlp.experts."
    np.testing.assert_array_equal(mlp["experts_gate"]["kernel"], tensors[prefix + "gate_up_proj"][..., ::2])
    np.testing.assert_array_equal(mlp["experts_up"]["kernel"], tensors[prefix + "gate_up_proj"][..., 1::2])
    np.testing.assert_array_equal(mlp["experts_gate_bias"]["bias"], tensors[prefix + "gate_up_proj_bias"][:, ::2])
    np.testing.assert_array_equal(mlp["experts_up_bias"]["bias"], tensors[prefix + "gate_up_proj_bias"][:, 1::2])
    np.testing.assert_array_equal(mlp["experts_down"]["kernel"], tensors[prefix + "down_proj"])
    np.testing.assert_array_equal(params["layers_0"]["attention"]["sinks"], tensors["model.layers.0.self_attn.sinks"])


def test_norms_are_where_the_family_has_them(tmp_path: Path) -> None:
    for name, norms in {
        "olmo2": {"attention_post_norm": "post_attention", "mlp_post_norm": "post_feedforward"},
        "gemma2": {
            "attention_norm": "input",
            "attention_post_norm": "post_attention",
            "mlp_norm": "pre_feedforward",
            "mlp_post_norm": "post_feedforward",
        },
        "mixtral": {"attention_norm": "input", "mlp_norm": "post_attention"},
    }.items():
        tensors = tensors_of(name)
        _, params = read(write(tmp_path / name, name, tensors))
        assert {key for key in params["layers_1"] if "norm" in key} == set(norms)
        for ours, theirs in norms.items():
            expected = tensors[f"model.layers.1.{theirs}_layernorm.weight"]
            np.testing.assert_array_equal(params["layers_1"][ours]["scale"], expected)


def test_latent_projections_are_in_their_places(tmp_path: Path) -> None:
    tensors = tensors_of("deepseek_v3")
    _, params = read(write(tmp_path, "deepseek_v3", tensors))
    attention, shared = params["layers_1"]["attention"], params["layers_1"]["mlp"]["shared"]
    for ours, theirs in {
        "q_down": "q_a_proj",
        "q_up": "q_b_proj",
        "kv_down": "kv_a_proj_with_mqa",
        "kv_up": "kv_b_proj",
        "o": "o_proj",
    }.items():
        np.testing.assert_array_equal(
            attention[ours]["weight"], tensors[f"model.layers.1.self_attn.{theirs}.weight"], err_msg=theirs
        )
    for ours, theirs in {"q_norm": "q_a_layernorm", "kv_norm": "kv_a_layernorm"}.items():
        np.testing.assert_array_equal(attention[ours]["scale"], tensors[f"model.layers.1.self_attn.{theirs}.weight"])
    for ours in ("gate", "up", "down"):
        np.testing.assert_array_equal(
            shared[ours]["weight"], tensors[f"model.layers.1.mlp.shared_experts.{ours}_proj.weight"]
        )


def test_the_bias_that_chooses_experts_stays_float32_on_every_way(tmp_path: Path) -> None:
    name, bias = "deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors = {key: value.astype(jnp.bfloat16) for key, value in tensors_of(name).items()}
    tensors[bias] = tensors_of(name)[bias]
    path = write(tmp_path / "in", name, tensors)
    for dtype in ("auto", "bfloat16", "float16"):
        model = load(path, dtype=dtype)
        np.testing.assert_array_equal(model.params["layers_1"]["mlp"]["router"]["selection_bias"], tensors[bias])
        assert model.params["layers_1"]["mlp"]["router"]["gate"]["weight"].dtype == model.dtype != np.float32
    model = load(path, dtype="auto")
    save(model, tmp_path / "hf", format="safetensors")
    assert stored_bytes(tmp_path / "hf") == stored_bytes(path)
    save(model, tmp_path / "orbax")
    again = load(tmp_path / "orbax", dtype="auto")
    np.testing.assert_array_equal(again.params["layers_1"]["mlp"]["router"]["selection_bias"], tensors[bias])


def test_layers_that_predict_further_tokens_are_left_out_as_many_as_the_config_says(tmp_path: Path) -> None:
    tensors = tensors_of("deepseek_v3")
    tensors["model.layers.2.eh_proj.weight"] = np.ones((HIDDEN, 2 * HIDDEN), np.float32)
    _, params = read(write(tmp_path / "one", "deepseek_v3", tensors, num_nextn_predict_layers=1))
    assert "layers_2" not in params
    with pytest.raises(CheckpointError, match=r"does not have: model.layers.2.eh_proj"):
        read(write(tmp_path / "none", "deepseek_v3", tensors))
    tensors["model.layers.3.eh_proj.weight"] = np.ones((HIDDEN, 2 * HIDDEN), np.float32)
    with pytest.raises(CheckpointError, match=r"does not have: model.layers.3.eh_proj"):
        read(write(tmp_path / "two", "deepseek_v3", tensors, num_nextn_predict_layers=1))


@pytest.mark.parametrize(
    ("name", "tensor", "shape", "message"),
    [
        ("mixtral", "block_sparse_moe.experts.3.w2.weight", None, "missing tensors: .*experts.3.w2.weight"),
        ("mixtral", "block_sparse_moe.experts.4.w2.weight", (HIDDEN, MLP), "does not have: .*experts.4.w2.weight"),
        ("mixtral", "block_sparse_moe.experts.0.w1.weight", (HIDDEN, MLP), r"has shape \[24, 40\], .*\[40, 24\]"),
        ("phi3", "self_attn.qkv_proj.weight", (47, HIDDEN), r"has shape \[47, 24\], config.json promises \[48, 24\]"),
        ("phi3", "self_attn.q_proj.weight", (HIDDEN, HIDDEN), "does not have: .*self_attn.q_proj.weight"),
        ("gpt_oss", "mlp.experts.gate_up_proj", (EXPERTS, 2 * MLP, HIDDEN), r"promises \[4, 24, 80\]"),
        ("gpt_oss", "self_attn.sinks", None, "missing tensors: .*self_attn.sinks"),
        ("gemma2", "self_attn.q_norm.weight", (HEAD_DIM,), "does not have: .*q_norm.weight"),
        ("olmo2", "self_attn.k_norm.weight", (HEAD_DIM,), r"has shape \[6\], config.json promises \[12\]"),
        ("deepseek_v2", "mlp.gate.e_score_correction_bias", (EXPERTS,), "does not have: .*e_score_correction_bias"),
        ("deepseek_v3", "mlp.gate.e_score_correction_bias", None, "missing tensors: .*e_score_correction_bias"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, name: str, tensor: str, shape: tuple[int, ...] | None, message: str
) -> None:
    tensors = tensors_of(name)
    key = f"model.layers.1.{tensor}"
    if shape is None:
        del tensors[key]
    else:
        tensors[key] = np.ones(shape, np.float32)
    with pytest.raises(CheckpointError, match=message):
        read(write(tmp_path, name, tensors))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("qwen3_moe", "mlp.experts.2.up_proj.weight"),
        ("phi3", "mlp.gate_up_proj.weight"),
        ("gpt_oss", "mlp.experts.gate_up_proj"),
    ],
)
def test_one_value_that_is_no_number_is_found_wherever_it_lies(tmp_path: Path, name: str, tensor: str) -> None:
    tensors = tensors_of(name)
    tensors[f"model.layers.1.{tensor}"].reshape(-1)[-1] = np.nan
    with pytest.raises(CheckpointError, match=f"{tensor} holds NaN"):
        read(write(tmp_path, name, tensors))


def test_parameters_of_one_tensor_must_agree_in_dtype_to_be_written(tmp_path: Path) -> None:
    config, params = read(write(tmp_path / "in", "phi3", tensors_of("phi3")))
    up = params["layers_0"]["mlp"]["up"]
    up["weight"] = up["weight"].astype(jnp.bfloat16)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"layers.0.mlp.gate_up_proj.weight do not fit together"):
        save_hf(config, params, tmp_path / "out")
