"""Weights arrive as they were stored, each in its place, and whatever does not belong together is refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from kvjax.convert.hf import load_hf, save_hf
from kvjax.convert.tensor_file import StoredTensor
from kvjax.errors import CheckpointError
from kvjax.model import parameter_shapes
from tests.convert.directories import HIDDEN, llama_shapes, random_tensors, stored_bytes, write_directory

FLOAT32 = np.dtype(np.float32)


def load(path: Path, dtype: np.dtype | None = None) -> tuple[Any, Any]:
    return load_hf(path, dtype, lambda config: None)


def test_kernels_are_transposed_and_everything_else_is_as_stored(tmp_path: Path) -> None:
    tensors = random_tensors(llama_shapes(attention_bias=True, mlp_bias=True))
    path = write_directory(tmp_path, tensors, attention_bias=True, mlp_bias=True)
    config, params = load(path)
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, parameter_shapes(config))
    layer = params["layers_1"]
    for ours, theirs in (
        (params["embed"]["embedding"], "model.embed_tokens.weight"),
        (params["norm"]["scale"], "model.norm.weight"),
        (params["head"]["weight"], "lm_head.weight"),
        (layer["attention_norm"]["scale"], "model.layers.1.input_layernorm.weight"),
        (layer["mlp_norm"]["scale"], "model.layers.1.post_attention_layernorm.weight"),
        (layer["attention"]["q"]["weight"], "model.layers.1.self_attn.q_proj.weight"),
        (layer["attention"]["k"]["weight"], "model.layers.1.self_attn.k_proj.weight"),
        (layer["attention"]["v"]["bias"], "model.layers.1.self_attn.v_proj.bias"),
        (layer["attention"]["o"]["weight"], "model.layers.1.self_attn.o_proj.weight"),
        (layer["attention"]["o"]["bias"], "model.layers.1.self_attn.o_proj.bias"),
        (layer["mlp"]["gate"]["weight"], "model.layers.1.mlp.gate_proj.weight"),
        (layer["mlp"]["up"]["bias"], "model.layers.1.mlp.up_proj.bias"),
        (layer["mlp"]["down"]["weight"], "model.layers.1.mlp.down_proj.weight"),
    ):
        np.testing.assert_array_equal(ours, tensors[theirs], err_msg=theirs)


def test_tensors_of_several_blocks_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_directory(tmp_path)
    _, whole = load(path)
    blocks = StoredTensor.blocks
    size = 2 * 4 * HIDDEN  # two rows to a block, several blocks to a tensor
    monkeypatch.setattr(StoredTensor, "blocks", lambda self: blocks(self, size))
    _, pieces = load(path)
    jax.tree.map(np.testing.assert_array_equal, pieces, whole)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16"])
def test_every_dtype_is_cast_to_every_other_as_numpy_casts(tmp_path: Path, stored: str, wanted: str) -> None:
    tensors = random_tensors(llama_shapes(), stored)
    config, params = load(write_directory(tmp_path, tensors), jax.numpy.dtype(wanted))
    assert config.dtype == stored
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {wanted}
    expected = tensors["model.layers.0.mlp.up_proj.weight"].astype(jax.numpy.dtype(wanted))
    np.testing.assert_array_equal(params["layers_0"]["mlp"]["up"]["weight"], expected)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 6},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 8},
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_loading_and_saving_gives_the_same_names_and_bits(tmp_path: Path, family: str, shards: int, dtype: str) -> None:
    path = write_directory(tmp_path / "in", shards=shards, dtype=dtype, **FAMILIES[family])
    out = tmp_path / "out"
    out.mkdir()
    config, params = load(path)
    save_hf(config, params, out)
    assert stored_bytes(out) == stored_bytes(path)
    again, _ = load(out)
    assert dataclasses.replace(again, extra="{}") == dataclasses.replace(config, extra="{}")


def test_saving_splits_over_files_with_an_index_that_loading_follows(tmp_path: Path) -> None:
    path = write_directory(tmp_path / "in")
    out = tmp_path / "out"
    out.mkdir()
    config, params = load(path)
    save_hf(config, params, out, max_shard_bytes=8000)
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert all((out / name).stat().st_size < 12000 for name in files)
    assert stored_bytes(out) == stored_bytes(path)
    jax.tree.map(np.testing.assert_array_equal, load(out)[1], params)


def test_a_tied_matrix_stored_twice_is_written_twice_again(tmp_path: Path) -> None:
    tensors = random_tensors(llama_shapes(tie_word_embeddings=True))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    path = write_directory(tmp_path / "in", tensors, tie_word_embeddings=True)
    config, params = load(path)
    assert "head" not in params
    (tmp_path / "out").mkdir()
    save_hf(config, params, tmp_path / "out")
    assert stored_bytes(tmp_path / "out") == stored_bytes(path)
    assert "_kvjax" not in (tmp_path / "out" / "config.json").read_text()


def test_tied_matrices_that_differ_are_refused(tmp_path: Path) -> None:
    tensors = random_tensors(llama_shapes(tie_word_embeddings=True))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    path = write_directory(tmp_path, tensors, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load(path)


def test_rotary_buffers_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    tensors = random_tensors(llama_shapes())
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    load(write_directory(tmp_path, tensors))


def without(name: str) -> Callable[[dict], None]:
    return lambda tensors: tensors.pop(name)


def with_value(name: str, value: Any) -> Callable[[dict], None]:
    return lambda tensors: tensors.update({name: value})


GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without(GATE), f"missing tensors: {GATE}"),
        (without("lm_head.weight"), "missing tensors: lm_head.weight; set tie_word_embeddings"),
        (
            with_value("model.layers.2.mlp.gate_proj.weight", np.ones((2, 2), np.float32)),
            "does not have: model.layers.2",
        ),
        (with_value("model.layers.0.self_attn.q_proj.bias", np.ones(24, np.float32)), "does not have: .*q_proj.bias"),
        (with_value(GATE, np.ones((24, 40), np.float32)), rf"{GATE} has shape \[24, 40\], .* promises \[40, 24\]"),
        (with_value(GATE, np.ones((40, 24), np.int8)), f"{GATE} has dtype I8; kvjax reads F32, F16, BF16"),
        (with_value(GATE, np.ones((40, 24), np.float64)), f"{GATE} has dtype F64"),
        (with_value(GATE, np.full((40, 24), np.nan, np.float32)), f"{GATE} holds NaN or infinite values"),
        (
            with_value("model.norm.weight", np.r_[np.ones(23), -np.inf].astype(np.float32)),
            "model.norm.weight holds NaN",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, damage: Callable[[dict], None], message: str, shards: int
) -> None:
    tensors = random_tensors(llama_shapes())
    damage(tensors)
    path = write_directory(tmp_path, tensors, shards=shards)
    with pytest.raises(CheckpointError, match=message) as raised:
        load(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_one_value_that_is_no_number_is_found_in_every_dtype(tmp_path: Path, dtype: str, bad: float) -> None:
    tensors = random_tensors(llama_shapes(), dtype)
    tensors[GATE][-1, -1] = bad
    with pytest.raises(CheckpointError, match=f"{GATE} holds NaN or infinite"):
        load(write_directory(tmp_path, tensors))


def test_the_largest_and_smallest_numbers_are_numbers(tmp_path: Path) -> None:
    tensors = random_tensors(llama_shapes())
    tensors[GATE][0, :4] = [np.finfo(np.float32).max, -np.finfo(np.float32).max, 1e-45, -0.0]
    _, params = load(write_directory(tmp_path, tensors))
    np.testing.assert_array_equal(params["layers_1"]["mlp"]["gate"]["weight"], tensors[GATE])


def test_weights_too_large_for_float16_are_refused_not_made_infinite(tmp_path: Path) -> None:
    tensors = random_tensors(llama_shapes())
    tensors[GATE][0, 0] = 1e5
    with pytest.raises(CheckpointError, match=f"{GATE} .* too large for float16: load them as bfloat16 or float32"):
        load(write_directory(tmp_path, tensors), np.dtype(np.float16))


def _index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        file = path / "model.safetensors.index.json"
        table = json.loads(file.read_text())
        change(table)
        file.write_text(json.dumps(table))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "model-00002-of-00002.safetensors").unlink(), "names model-00002-of-00002.safetensors, which"),
        (lambda p: (p / "model.safetensors.index.json").unlink(), "neither model.safetensors nor"),
        (lambda p: (p / "model.safetensors.index.json").write_text("{"), "index.json is not valid JSON"),
        (_index(lambda t: t.pop("weight_map")), "weight_map must be a table"),
        (_index(lambda t: t["weight_map"].update({GATE: "../elsewhere.safetensors"})), "weight_map must be a table"),
        (_index(lambda t: t["weight_map"].update({GATE: 3})), "weight_map must be a table"),
        (_index(lambda t: t["weight_map"].update({"x": "model-00001-of-00002.safetensors"})), "promises x, which"),
        (
            _index(lambda t: t["weight_map"].update({"model.norm.weight": "model-00001-of-00002.safetensors"})),
            "holds model.norm.weight, which model.safetensors.index.json places in",
        ),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    path = write_directory(tmp_path, shards=2)
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_other_weight_files_are_named_in_the_advice(tmp_path: Path) -> None:
    path = write_directory(tmp_path)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"it holds pytorch_model.bin: convert it to safetensors"):
        load(path)


def test_the_config_is_held_against_the_weights(tmp_path: Path) -> None:
    path = write_directory(tmp_path, random_tensors(llama_shapes()), num_key_value_heads=4)
    with pytest.raises(CheckpointError, match=r"k_proj.weight has shape \[12, 24\], config.json promises \[24, 24\]"):
        load(path)
