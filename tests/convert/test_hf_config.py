"""`config.json` means to kvjax what it means to transformers, or it is refused by the field's name."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from kvjax.config import ModelConfig, RopeScaling
from kvjax.convert.hf_config import config_from_json, config_to_json, read_config, write_config
from kvjax.errors import CheckpointError
from tests.convert.directories import DOCUMENT

QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def document(**fields: Any) -> dict[str, Any]:
    """`DOCUMENT` with changed fields; ... removes one."""
    return {name: value for name, value in {**DOCUMENT, **fields}.items() if value is not ...}


def read(**fields: Any) -> ModelConfig:
    return read_config(document(**fields), "here/config.json")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"family": "llama", "head_dim": 6, "num_kv_heads": 2, "qkv_bias": False, "qk_norm": False}),
        ({"num_key_value_heads": ...}, {"num_kv_heads": 4}),
        ({"num_key_value_heads": None}, {"num_kv_heads": 4}),
        ({"head_dim": None}, {"head_dim": 6}),
        ({"head_dim": 10}, {"head_dim": 10}),
        ({"attention_bias": True}, {"qkv_bias": True, "o_bias": True, "mlp_bias": False}),
        ({"mlp_bias": True}, {"qkv_bias": False, "o_bias": False, "mlp_bias": True}),
        (QWEN2, {"family": "qwen2", "qkv_bias": True, "o_bias": False, "qk_norm": False}),
        (QWEN3, {"family": "qwen3", "qkv_bias": False, "qk_norm": True, "head_dim": 128}),
        ({**QWEN3, "head_dim": None}, {"head_dim": 6}),
        ({**QWEN3, "attention_bias": True}, {"qkv_bias": True, "o_bias": True}),
        ({**MISTRAL, "num_key_value_heads": ..., "num_attention_heads": 8, "hidden_size": 32}, {"num_kv_heads": 8}),
        ({"eos_token_id": 7}, {"eos_token_ids": (7,)}),
        ({"eos_token_id": [7, 9]}, {"eos_token_ids": (7, 9)}),
        ({"eos_token_id": None, "bos_token_id": None}, {"eos_token_ids": (), "bos_token_id": None}),
        ({"eos_token_id": ..., "bos_token_id": ...}, {"eos_token_ids": (2,), "bos_token_id": 1}),
        ({**QWEN2, "eos_token_id": ..., "bos_token_id": ...}, {"eos_token_ids": (), "bos_token_id": None}),
        ({"hidden_act": "gelu_new"}, {"activation": "gelu_tanh"}),
        ({"hidden_act": "swish", "partial_rotary_factor": 1.0, "quantization_config": None}, {}),
        ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ({"dtype": "float16"}, {"dtype": "float16"}),
        ({"architectures": ...}, {"family": "llama"}),
    ],
)
def test_fields_mean_what_transformers_takes_them_for(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    config = read(**fields)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"sliding_window": 8}, (None, None)),  # transformers' Llama does not know it
        ({**MISTRAL, "sliding_window": 8}, (8, 8)),
        ({**MISTRAL, "sliding_window": None}, (None, None)),
        (MISTRAL, (4096, 4096)),
        (QWEN2, (None, None)),
        ({**QWEN2, "use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}, (None, None)),
        ({**QWEN2, "use_sliding_window": True, "sliding_window": 8}, (None, None)),
        ({**QWEN2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, (8, 8)),
        ({**QWEN2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, (None, 8)),
        ({**QWEN2, "use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, (None, None)),
        (
            {
                **QWEN3,
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 0,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            (8, None),
        ),
        ({"layer_types": ["full_attention", "full_attention"]}, (None, None)),
    ],
)
def test_windows_are_per_layer(fields: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert read(**fields).windows == windows


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        ({"rope_theta": ...}, 10000.0, RopeScaling()),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, RopeScaling()),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 1e4, RopeScaling("linear", 2.0)),
        ({"rope_scaling": {"rope_type": "default"}}, 1e4, RopeScaling()),
        ({"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, 7.0, RopeScaling()),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, 5e5, RopeScaling("llama3", 8.0, 32, 1.0, 4.0)),
        ({"rope_scaling": LLAMA3}, 1e4, RopeScaling("llama3", 8.0, 32, 1.0, 4.0)),
        (
            {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": ...}},
            1e4,
            RopeScaling("llama3", 8.0, 64, 1.0, 4.0),
        ),
        (
            {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16},
            1e4,
            RopeScaling("llama3", 8.0, 16, 1.0, 4.0),
        ),
        (
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                    "finetuned": True,
                }
            },
            1e4,
            RopeScaling("yarn", 4.0, 16),
        ),
        (
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": None,
                    "original_max_position_embeddings": 16,
                    "truncate": None,
                }
            },
            1e4,
            RopeScaling("yarn", 4.0, 16, truncate=False),
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4,
                    "attention_factor": 1.5,
                    "beta_fast": 16,
                    "beta_slow": 2,
                    "truncate": False,
                }
            },
            1e4,
            RopeScaling("yarn", 4.0, 64, beta_fast=16.0, beta_slow=2.0, attention_factor=1.5, truncate=False),
        ),
    ],
)
def test_rope_is_read_in_old_and_new_form(fields: dict[str, Any], theta: float, scaling: RopeScaling) -> None:
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(fields.get(name), dict):
            fields = {**fields, name: {k: v for k, v in fields[name].items() if v is not ...}}
    config = read(**fields)
    assert config.rope_theta == theta
    assert config.rope_scaling == scaling


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gemma"}, "model_type 'gemma' .* llama, qwen2, qwen3, qwen3_moe, mistral"),
        ({"model_type": ...}, "model_type None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures must be .*LlamaForCausalLM"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be"),
        ({"hidden_act": "relu"}, 'hidden_act must be "silu" or "swish".*\'relu\''),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config must be null"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping must be null"),
        ({"hidden_size": ...}, "the field hidden_size is missing"),
        ({"hidden_size": "24"}, "hidden_size must be an integer from 1 to 2147483647, got '24'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer from 1 to 10000"),
        ({"vocab_size": 10**30}, "vocab_size must be"),
        ({"rope_theta": 10**400}, "rope_theta must be a finite positive number"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be"),
        ({"num_key_value_heads": 3}, "num_heads must be a multiple of num_kv_heads"),
        ({"hidden_size": 26}, "set head_dim"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a finite positive number"),
        ({"rope_theta": float("nan")}, "rope_theta must be a finite positive number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id"),
        ({"bos_token_id": [1, 2]}, "bos_token_id must be one token id"),
        ({"rope_scaling": [1]}, "rope_scaling must be a table"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type 'dynamic' is not implemented"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters: the field short_factor is missing"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differs by layer type"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: the field factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "rope_scaling: factor must be a finite positive"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling: the field factor is missing"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "the field low_freq_factor is missing"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 0.5}}, "high_freq_factor > low_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "beta_fast": 3}}, "rope_scaling.beta_fast is not a field of rope_type 'llama3'"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
            "rope_scaling: partial_rotary_factor must be 1.0",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling and rope_parameters say different things",
        ),
        (
            {"rope_theta": 1.0, "rope_scaling": {"type": "yarn", "factor": 2.0}},
            "rope_theta must be finite and greater than 1",
        ),
        ({**QWEN2, "layer_types": ["full_attention"]}, "layer_types must be a list of 2"),
        ({**QWEN2, "layer_types": ["full_attention", "chunked_attention"]}, "layer_types holds 'chunked_attention'"),
        ({**QWEN2, "layer_types": ["full_attention", "sliding_attention"]}, "sliding_window is off or null"),
        (
            {**MISTRAL, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
            "layer_types contradicts sliding_window",
        ),
        ({**QWEN2, "use_sliding_window": True, "sliding_window": 0}, "sliding_window must be an integer"),
    ],
)
def test_what_kvjax_would_compute_wrongly_is_refused_by_the_fields_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as raised:
        read(**fields)
    assert "here/config.json" in str(raised.value)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "eos_token_id": [2, 5]},
        {"rope_scaling": LLAMA3},
        {"rope_scaling": {"type": "linear", "factor": 3.0}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.0}},
        {"head_dim": 10, "bos_token_id": None, "eos_token_id": None},
        QWEN2,
        {**QWEN2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        {**QWEN2, "use_sliding_window": False, "sliding_window": 8, "layer_types": ["full_attention"] * 2},
        {
            **QWEN3,
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        {**MISTRAL, "sliding_window": 8},
        {**MISTRAL, "sliding_window": None},
    ],
)
def test_a_written_document_reads_back_as_the_same_config(fields: dict[str, Any]) -> None:
    config = read(**fields)
    again = read_config(write_config(config, "float32"), "again")
    assert dataclasses.replace(again, extra="{}") == dataclasses.replace(config, extra="{}")


def test_fields_that_change_nothing_are_written_back_as_they_were() -> None:
    kept = {
        "transformers_version": "4.40.1",
        "initializer_range": 0.02,
        "use_cache": True,
        "pretraining_tp": 1,
        "pad_token_id": 0,
        "some_training_note": {"seen": [1, 2, None]},
    }
    written = write_config(read(**kept, torch_dtype="bfloat16"), "bfloat16")
    assert {name: written[name] for name in kept} == kept
    assert written["torch_dtype"] == "bfloat16"
    unchanged = {name: value for name, value in DOCUMENT.items() if name != "head_dim"}
    assert {name: written[name] for name in unchanged} == unchanged


def test_the_form_of_rope_and_dtype_fields_is_kept() -> None:
    new = write_config(read(rope_parameters={"rope_type": "default", "rope_theta": 7.0}, dtype="float32"), "float16")
    assert new["rope_parameters"] == {"rope_type": "default", "rope_theta": 7.0}
    assert new["dtype"] == "float16"
    assert not {"rope_theta", "rope_scaling", "torch_dtype"} & new.keys()
    old = write_config(read(rope_scaling=LLAMA3), "float32")
    assert old["rope_theta"] == 10000.0
    assert LLAMA3.items() <= old["rope_scaling"].items()
    assert "rope_parameters" not in old


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": True}, "ModelConfig.qk_norm=True cannot be written as model_type 'llama'"),
        ({"qkv_bias": True}, "ModelConfig.qkv_bias=True"),
        ({"windows": (None, 8)}, "ModelConfig.windows"),
        ({"family": "mistral", "windows": (4, 8)}, "ModelConfig.windows"),
        ({"family": "deepseek"}, "model_type 'deepseek'"),
    ],
)
def test_a_config_its_family_cannot_say_is_not_written(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_config(dataclasses.replace(read(), **changes), "float32")


@pytest.mark.parametrize(
    "config",
    [
        read(),
        read(rope_scaling=LLAMA3, eos_token_id=[2, 5], note="kept"),
        read(**{**QWEN2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ],
)
def test_a_config_survives_json(config: ModelConfig) -> None:
    assert config_from_json(config_to_json(config)) == config


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"vocab_size": 3}', json.dumps({**json.loads(config_to_json(read())), "x": 1})]
)
def test_json_that_is_no_config_is_refused_by_its_source(text: str) -> None:
    with pytest.raises(CheckpointError, match="somewhere"):
        config_from_json(text, "somewhere")
