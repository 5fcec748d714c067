"""What the `config.json` of each family means, what of it is refused, and that it is written back as it was."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import pytest

from kvjax.config import Latent, ModelConfig, RopeScaling
from kvjax.convert.hf_config import read_config, write_config
from kvjax.errors import CheckpointError
from kvjax.model import parameter_shapes
from tests.convert.family_directories import DOCUMENTS, YARN

LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2], "long_factor": [1.5, 2.5, 3.5]}
LOCAL, GLOBAL = "sliding_attention", "full_attention"


def document(name: str, **fields: Any) -> dict[str, Any]:
    """A family's small document with changed fields; ... removes one."""
    return {key: value for key, value in {**DOCUMENTS[name], **fields}.items() if value is not ...}


def read(name: str, **fields: Any) -> ModelConfig:
    return read_config(document(name, **fields), "here/config.json")


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("qwen3_moe", {}, {"qk_norm": True, "qkv_bias": False, "intermediate_size": 40}),
        ("qwen3_moe", {"head_dim": ..., "num_key_value_heads": ...}, {"head_dim": 6, "num_kv_heads": 4}),
        ("mixtral", {"rope_theta": ..., "num_key_value_heads": 4}, {"rope_theta": 1e6, "num_kv_heads": 4}),
        ("mixtral", {"rms_norm_eps": ...}, {"norm_eps": 1e-5, "activation": "silu"}),
        (
            "gemma2",
            {"tie_word_embeddings": ..., "rms_norm_eps": ...},
            {
                "tie_word_embeddings": True,
                "norm_placement": "sandwich",
                "norm_unit_offset": True,
                "embedding_scale": 24**0.5,
                "query_scale": 12**-0.5,
                "attention_soft_cap": 50.0,
                "logit_soft_cap": 30.0,
                "activation": "gelu_tanh",
                "norm_eps": 1e-6,
            },
        ),
        (
            "gemma2",
            {"attn_logit_softcapping": None, "final_logit_softcapping": None},
            {"attention_soft_cap": None, "logit_soft_cap": None},
        ),
        ("gemma2", {"query_pre_attn_scalar": 6, "head_dim": 6}, {"query_scale": None}),
        ("gemma2", {"query_pre_attn_scalar": ..., "head_dim": ...}, {"query_scale": None, "head_dim": 256}),
        ("gemma2", {"hidden_activation": "gelu"}, {"activation": "gelu"}),
        ("gemma2", {"hidden_act": "gelu_pytorch_tanh"}, {"activation": "gelu_tanh"}),
        (
            "gemma3_text",
            {"rope_theta": ...},
            {"qk_norm": True, "rope_theta": 1e6, "local_rope_theta": 1e4, "logit_soft_cap": None, "query_scale": None},
        ),
        ("phi3", {}, {"rotary_fraction": 1.0, "rope_scaling": RopeScaling()}),
        ("phi3", {"hidden_size": 64, "partial_rotary_factor": 0.25}, {"rotary_fraction": 0.25, "rotary_width": 4}),
        ("olmo2", {"num_key_value_heads": ...}, {"norm_placement": "post", "qk_norm_whole": True, "num_kv_heads": 4}),
        ("olmo2", {"attention_bias": True}, {"qkv_bias": True, "o_bias": True}),
        (
            "deepseek_v2",
            {"attention_bias": True, "mlp_bias": True},
            {
                "latent": Latent(14, 8, 6, 4, q_lora_rank=10),
                "qkv_bias": True,
                "o_bias": True,
                "mlp_bias": True,
                "head_dim": 6,
                "query_scale": None,
            },
        ),
        ("deepseek_v3", {"rope_interleave": False}, {"latent": Latent(14, 8, 6, 4, 10, interleaved=False)}),
        ("deepseek_v3", {"q_lora_rank": None}, {"latent": Latent(14, 8, 6, 4)}),
        ("gpt_oss", {"rope_theta": ...}, {"attention_sinks": True, "qkv_bias": True, "rope_theta": 150000.0}),
        ("gpt_oss", {"attention_bias": False, "head_dim": ...}, {"qkv_bias": False, "head_dim": 64}),
    ],
)
def test_fields_mean_what_transformers_takes_them_for(
    name: str, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    config = read(name, **fields)
    assert {field: getattr(config, field) for field in expected} == expected


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("qwen3_moe", {}, {"count": 4, "per_token": 2, "intermediate_size": 20, "normalize": True}),
        ("qwen3_moe", {"norm_topk_prob": ...}, {"normalize": False, "scoring": "softmax"}),
        ("qwen3_moe", {"num_experts": ..., "num_local_experts": 6}, {"count": 6, "dense_layers": (0,)}),
        (
            "qwen3_moe",
            {"num_hidden_layers": 6, "mlp_only_layers": [3], "decoder_sparse_step": 2},
            {"dense_layers": (0, 2, 3, 4)},
        ),
        ("mixtral", {}, {"count": 4, "per_token": 2, "intermediate_size": 40, "normalize": True, "dense_layers": ()}),
        ("mixtral", {"num_local_experts": ...}, {"count": 8}),
        (
            "deepseek_v2",
            {"routed_scaling_factor": 16.0},
            {
                "intermediate_size": 20,
                "shared_intermediate_size": 40,
                "dense_layers": (0,),
                "groups": 2,
                "groups_per_token": 1,
                "group_score": "max",
                "normalize": False,
                "scaling_factor": 16.0,
                "selection_bias": False,
            },
        ),
        ("deepseek_v2", {"topk_method": "greedy"}, {"groups": 1, "groups_per_token": 1}),
        ("deepseek_v2", {"first_k_dense_replace": 7}, {"dense_layers": (0, 1)}),
        (
            "deepseek_v3",
            {},
            {
                "scoring": "sigmoid",
                "normalize": True,
                "scaling_factor": 2.5,
                "groups": 2,
                "group_score": "top2",
                "selection_bias": True,
                "bias": False,
            },
        ),
        ("gpt_oss", {}, {"normalize": True, "limit": 7.0, "bias": True, "router_bias": True, "intermediate_size": 40}),
        ("gpt_oss", {"num_experts_per_tok": ..., "experts_per_token": 3}, {"per_token": 3}),
    ],
)
def test_experts_are_read(name: str, fields: dict[str, Any], expected: dict[str, Any]) -> None:
    experts = read(name, **fields).experts
    assert {field: getattr(experts, field) for field in expected} == expected


@pytest.mark.parametrize(
    ("name", "fields", "windows"),
    [
        ("qwen3_moe", {"sliding_window": 8}, (None, None)),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, (8, 8)),
        ("qwen3_moe", {"use_sliding_window": True}, (4096, 4096)),
        ("mixtral", {}, (None, None)),
        ("mixtral", {"sliding_window": 8}, (8, 8)),
        ("gemma2", {"num_hidden_layers": 3}, (8, None, 8)),
        ("gemma2", {"sliding_window": ...}, (4096, None)),
        ("gemma2", {"layer_types": [GLOBAL, LOCAL]}, (None, 8)),
        ("gemma2", {"layer_types": [GLOBAL, GLOBAL], "sliding_window": None}, (None, None)),
        ("gemma3_text", {"num_hidden_layers": 4}, (8, None, 8, None)),
        (
            "gemma3_text",
            {"num_hidden_layers": 7, "sliding_window_pattern": ...},
            (8, 8, 8, 8, 8, None, 8),
        ),
        ("gemma3_text", {"layer_types": [GLOBAL, LOCAL]}, (None, 8)),
        ("phi3", {}, (8, 8)),
        ("phi3", {"sliding_window": ...}, (None, None)),
        ("gpt_oss", {"num_hidden_layers": 3}, (8, None, 8)),
        ("gpt_oss", {"sliding_window": ..., "layer_types": [LOCAL, LOCAL]}, (128, 128)),
    ],
)
def test_windows_are_per_layer(name: str, fields: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert read(name, **fields).windows == windows


@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
def test_deepseek_scales_attention_by_yarns_factor_squared(form: str) -> None:
    yarn = {**YARN, "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.707}
    for name in ("deepseek_v2", "deepseek_v3"):
        config = read(name, **{form: yarn})
        assert config.query_scale == pytest.approx((8 + 6) ** -0.5 * (0.1 * 0.707 * math.log(40) + 1) ** 2, rel=1e-12)
        assert config.query_scale == pytest.approx(14**-0.5 * 1.5896, rel=1e-4)
        assert config.rope_scaling.attention_factor == 1.0
    other = read("deepseek_v3", **{form: YARN})
    assert other.query_scale is None
    assert other.rope_scaling.attention_factor is None


@pytest.mark.parametrize(
    ("fields", "theta", "local", "scaling"),
    [
        ({"rope_theta": 5e5, "rope_local_base_freq": 100.0}, 5e5, 100.0, RopeScaling()),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 1e4, 1e4, RopeScaling("linear", 8.0)),
        (
            {
                "rope_theta": ...,
                "rope_parameters": {
                    GLOBAL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
                    LOCAL: {"rope_type": "default", "rope_theta": 500.0},
                },
            },
            2e6,
            500.0,
            RopeScaling("linear", 8.0),
        ),
        ({"rope_theta": ..., "rope_parameters": {GLOBAL: None, LOCAL: None}}, 1e6, 1e4, RopeScaling()),
    ],
)
def test_gemma3_turns_local_layers_by_a_base_of_their_own(
    fields: dict[str, Any], theta: float, local: float, scaling: RopeScaling
) -> None:
    config = read("gemma3_text", **fields)
    assert (config.rope_theta, config.local_rope_theta, config.rope_scaling) == (theta, local, scaling)


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        (
            {"original_max_position_embeddings": 16},
            {"factor": 4.0, "original_max_position_embeddings": 16, "long": True},
        ),
        ({"original_max_position_embeddings": 64}, {"factor": 1.0, "long": False}),
        ({"max_position_embeddings": 8192}, {"original_max_position_embeddings": 4096, "long": True}),
        ({"rope_scaling": {**LONGROPE, "type": "su"}}, {"kind": "longrope", "long": False}),
        (
            {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 32, "attention_factor": 1.5}},
            {"factor": 2.0, "long": True, "attention_factor": 1.5},
        ),
    ],
)
def test_phi3_takes_the_long_factors_where_the_context_is_longer_than_the_original(
    fields: dict[str, Any], scaling: dict[str, Any]
) -> None:
    config = read("phi3", **{"rope_scaling": LONGROPE, **fields})
    assert {field: getattr(config.rope_scaling, field) for field in scaling} == scaling
    assert config.rope_scaling.short_factor == (1.0, 1.1, 1.2)
    assert config.rope_scaling.long_factor == (1.5, 2.5, 3.5)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("qwen3_moe", {"num_experts": ...}, "the field num_experts is missing"),
        ("qwen3_moe", {"num_local_experts": 8}, "num_experts and num_local_experts are names of one number"),
        ("qwen3_moe", {"num_experts_per_tok": 5}, "1 <= per_token <= count"),
        ("qwen3_moe", {"mlp_only_layers": ["0"]}, "mlp_only_layers must be a list of integers"),
        ("qwen3_moe", {"moe_intermediate_size": 0}, "moe_intermediate_size must be an integer"),
        ("mixtral", {"num_experts": 4}, "num_experts must be 0 or 1"),
        ("mixtral", {"layer_types": [LOCAL, GLOBAL], "sliding_window": 8}, "layer_types contradicts sliding_window"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention must be false"),
        ("gemma2", {"hidden_activation": "relu"}, "hidden_activation must be \"silu\" or .*'relu'"),
        ("gemma2", {"hidden_act": "silu"}, "hidden_act must be what hidden_activation says, gelu_tanh"),
        ("gemma2", {"sliding_window": None}, "sliding_window must be an integer"),
        ("gemma2", {"layer_types": [LOCAL, LOCAL], "sliding_window": None}, "sliding_window is off or null"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be a finite positive"),
        ("gemma2", {"rope_parameters": {GLOBAL: {"rope_type": "default"}}}, "differs by layer type"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping must be null"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters must be a table for full"),
        ("gemma3_text", {"rope_parameters": {GLOBAL: 3}}, "rope_parameters: full_attention must be a table"),
        (
            "gemma3_text",
            {"rope_parameters": {LOCAL: {"rope_type": "linear", "factor": 2.0}}},
            "sliding_attention: rope_type must be 'default'",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {GLOBAL: {"rope_type": "dynamic", "factor": 2.0}}},
            "rope_type 'dynamic' is not implemented",
        ),
        ("phi3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type must be 'default' or 'longrope'"),
        ("phi3", {"partial_rotary_factor": 0.3}, "turn an even number of channels"),
        (
            "phi3",
            {"partial_rotary_factor": 0.5, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}},
            "partial_rotary_factor must be the same everywhere",
        ),
        ("phi3", {"rope_scaling": {**LONGROPE, "long_factor": [1.0]}}, "long_factor must be a list of 3 numbers"),
        (
            "phi3",
            {"rope_scaling": {**LONGROPE, "short_factor": [1.0, 2.0, 0]}},
            "short_factor must be a list of finite",
        ),
        ("phi3", {"rope_scaling": {**LONGROPE, "long_mscale": 1.2}}, "rope_scaling.long_mscale is not a field"),
        ("olmo2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob must be false"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func must be 'softmax'"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method must be 'greedy' or 'group_limited_greedy'"),
        ("deepseek_v2", {"n_group": None}, "the field n_group is missing"),
        ("deepseek_v2", {"n_group": 3}, "groups must divide count 4"),
        ("deepseek_v2", {"q_lora_rank": ...}, "the field q_lora_rank is missing; null"),
        ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq must be 1"),
        ("deepseek_v2", {"head_dim": 8}, "head_dim must be 6"),
        ("deepseek_v2", {"qk_head_dim": 8}, "qk_head_dim must be 14"),
        ("deepseek_v2", {"num_key_value_heads": 2}, "num_key_value_heads must be 4"),
        ("deepseek_v2", {"qk_rope_head_dim": 5}, "qk_rope_head_dim must be even"),
        ("deepseek_v2", {"rope_interleave": False}, "rope_interleave must be true"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func must be 'sigmoid'"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method must be 'noaux_tc'"),
        ("deepseek_v3", {"n_shared_experts": None}, "the field n_shared_experts is missing"),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config must be null"),
        ("gpt_oss", {"rope_scaling": None}, "the field rope_scaling is missing"),
        ("gpt_oss", {"swiglu_alpha": 1.5}, "swiglu_alpha must be 1.702"),
        ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ("gpt_oss", {"experts_per_token": 4}, "num_experts_per_tok and experts_per_token are names of one number"),
        ("gpt_oss", {"architectures": ["LlamaForCausalLM"]}, "architectures must be .*GptOssForCausalLM"),
    ],
)
def test_what_kvjax_would_compute_wrongly_is_refused_by_the_fields_name(
    name: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as raised:
        read(name, **fields)
    assert "here/config.json" in str(raised.value)


MSCALE = {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        *((name, {}) for name in DOCUMENTS),
        ("qwen3_moe", {"num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [3]}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}),
        ("mixtral", {"sliding_window": 8, "head_dim": 10}),
        ("gemma2", {"attn_logit_softcapping": None, "layer_types": [GLOBAL, LOCAL]}),
        ("gemma2", {"layer_types": [GLOBAL, GLOBAL], "query_pre_attn_scalar": 6.5}),
        ("gemma2", {"hidden_activation": "gelu", "query_pre_attn_scalar": 6}),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 100.0}),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    GLOBAL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
                    LOCAL: {"rope_type": "default", "rope_theta": 500.0},
                },
                "layer_types": [LOCAL, GLOBAL],
                "final_logit_softcapping": 20.0,
            },
        ),
        ("phi3", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 16}),
        ("phi3", {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 64, "attention_factor": 1.5}}),
        (
            "phi3",
            {
                "hidden_size": 32,
                "partial_rotary_factor": 0.5,
                "rope_scaling": {"type": "su", "short_factor": [1.0, 2.0], "long_factor": [1.0, 3.0]},
            },
        ),
        ("olmo2", {"attention_bias": True, "rope_scaling": YARN}),
        ("deepseek_v2", {"rope_scaling": MSCALE, "topk_method": "greedy", "q_lora_rank": None}),
        ("deepseek_v2", {"mlp_bias": True, "attention_bias": True, "routed_scaling_factor": 16.0}),
        ("deepseek_v3", {"rope_parameters": MSCALE, "norm_topk_prob": False, "rope_interleave": False}),
        ("deepseek_v3", {"rope_scaling": YARN, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1}),
        ("gpt_oss", {"rope_parameters": {"rope_type": "default"}, "rope_scaling": None, "swiglu_limit": 3.0}),
        ("gpt_oss", {"rope_scaling": {"rope_type": "default"}, "experts_per_token": 2, "attention_bias": False}),
    ],
)
def test_a_written_document_reads_back_as_the_same_config(name: str, fields: dict[str, Any]) -> None:
    config = read(name, **fields)
    written = write_config(config, "float32")
    again = read_config(written, "again")
    assert dataclasses.replace(again, extra="{}", query_scale=None) == dataclasses.replace(
        config, extra="{}", query_scale=None
    )
    # Inverting a root and a logarithm may round.
    assert (again.query_scale is None) == (config.query_scale is None)
    assert again.query_scale is None or math.isclose(again.query_scale, config.query_scale or 0, rel_tol=1e-12)
    kept = {key: value for key, value in document(name, **fields).items() if "rope" not in key}
    assert {key: written[key] for key in kept} == kept


def test_deepseeks_own_form_of_yarn_is_written_again() -> None:
    written = write_config(read("deepseek_v3", rope_scaling=MSCALE), "float32")["rope_scaling"]
    assert MSCALE.items() <= written.items()
    assert "attention_factor" not in written


def test_an_old_phi3_table_has_the_fields_that_old_readers_ask_for() -> None:
    written = write_config(read("phi3", rope_scaling=LONGROPE, original_max_position_embeddings=16), "float32")
    assert written["rope_scaling"] == LONGROPE
    assert written["original_max_position_embeddings"] == 16


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mixtral", {"experts": None}, "ModelConfig.experts=None cannot be written as model_type 'mixtral'"),
        ("mixtral", {"intermediate_size": 44}, "ModelConfig.experts"),
        ("mixtral", {"qkv_bias": True}, "ModelConfig.qkv_bias=True"),
        ("gemma2", {"embedding_scale": 1.0}, "ModelConfig.embedding_scale=1.0"),
        ("gemma2", {"local_rope_theta": 100.0}, "ModelConfig.local_rope_theta"),
        ("gemma3_text", {"attention_soft_cap": 5.0}, "ModelConfig.attention_soft_cap"),
        ("phi3", {"query_scale": 0.5}, "ModelConfig.query_scale"),
        ("phi3", {"rope_scaling": RopeScaling("linear", 2.0)}, "rope_type must be 'default' or 'longrope'"),
        ("deepseek_v2", {"latent": None}, "ModelConfig.latent"),
        ("deepseek_v3", {"latent": Latent(14, 8, 6, 4, 10, norm_eps=1e-5)}, "ModelConfig.latent"),
        ("deepseek_v3", {"query_scale": 0.5}, "ModelConfig.query_scale"),
        ("gpt_oss", {"attention_sinks": False}, "ModelConfig.attention_sinks"),
    ],
)
def test_a_config_its_family_cannot_say_is_not_written(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_config(dataclasses.replace(read(name), **changes), "float32")


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v2", "deepseek_v3"])
def test_dense_layers_of_another_pattern_are_said_or_refused(name: str) -> None:
    config = read(name, num_hidden_layers=4)
    assert config.experts is not None
    scattered = dataclasses.replace(config, experts=dataclasses.replace(config.experts, dense_layers=(0, 2)))
    if name == "qwen3_moe":
        again = read_config(write_config(scattered, "float32"), "again")
        assert again.experts == scattered.experts
    else:
        with pytest.raises(CheckpointError, match=r"ModelConfig.experts"):
            write_config(scattered, "float32")


# Fields of the published config.json that bear on shapes, and the number of weights that its authors give.
PUBLISHED: dict[str, tuple[int, str, dict[str, Any]]] = {
    "Mixtral-8x7B": (
        46_702_792_704,
        "mixtral",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
        },
    ),
    "Gemma-2-2B": (
        2_614_341_888,
        "gemma2",
        {
            "vocab_size": 256000,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "tie_word_embeddings": ...,
        },
    ),
    "Gemma-3-1B": (
        999_885_952,
        "gemma3_text",
        {
            "vocab_size": 262144,
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "tie_word_embeddings": ...,
        },
    ),
    "Phi-4-mini": (
        3_836_021_760,
        "phi3",
        {
            "vocab_size": 200064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "partial_rotary_factor": 0.75,
            "tie_word_embeddings": True,
        },
    ),
    "DeepSeek-V2-Lite": (
        15_706_484_224,
        "deepseek_v2",
        {
            "vocab_size": 102400,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "n_shared_experts": 2,
            "n_routed_experts": 64,
            "num_experts_per_tok": 6,
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "gpt-oss-20b": (
        20_914_757_184,
        "gpt_oss",
        {
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 24,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
        },
    ),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_published_config_has_as_many_weights_as_published(model: str) -> None:
    weights, name, fields = PUBLISHED[model]
    config = read(name, **fields)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameter_shapes(config))) == weights
