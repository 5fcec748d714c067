"""Small random float32 models of transformers, one per architecture and setting that kvjax reads.

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_something(case, load_case):
        theirs, ours = load_case(case)

torch and transformers are imported by the factories, not by this module, so that it can be collected without them.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

VOCAB = 101
LENGTH = 40  # longer than every window below, and than the original contexts that rope scaling starts from
BATCH = 2

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    # A small theta turns every pair noticeably within LENGTH.
    return {"rope_type": kind, "rope_theta": 100.0, **fields}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A name, transformers' model class, and the config fields that differ from the common small shape."""

    name: str
    model_class: str
    fields: Mapping[str, Any]

    def __str__(self) -> str:
        return self.name

    def model(self, seed: int = 0) -> Any:
        """A transformers model in eval mode with eager attention and random float32 weights.

        Every weight is drawn, biases and norms too (transformers starts them at 0 and 1, which would hide their loss),
        with spreads that keep logits of order one; so is the bias by which DeepSeek-V3 chooses experts, which
        transformers counts among the buffers.
        """
        import torch
        import transformers

        kind = getattr(transformers, self.model_class)
        # A copy, as transformers completes rope tables in place and cases share some.
        fields = copy.deepcopy({"rope_parameters": _rope("default"), **_SHAPE, **self.fields})
        model = kind(kind.config_class(**fields, attn_implementation="eager")).eval()
        generator = torch.Generator().manual_seed(seed)
        chosen_by = [(name, value) for name, value in model.named_buffers() if name.endswith("correction_bias")]
        # Gemma's norms multiply by 1 + weight.
        centre = 0 if self.model_class.startswith("Gemma") else 1
        with torch.no_grad():
            for name, weight in [*model.named_parameters(), *chosen_by]:
                noise = torch.randn(weight.shape, generator=generator)
                if "norm" in name:
                    weight.copy_(centre + 0.2 * noise)
                elif name.endswith("bias"):
                    weight.copy_(0.3 * noise)
                elif name.endswith("sinks"):
                    weight.copy_(noise)
                elif "embed" in name:
                    weight.copy_(0.5 * noise)
                else:
                    weight.copy_(noise * weight.shape[-1] ** -0.5)
        return model


LLAMA, QWEN2, QWEN3, QWEN3_MOE, MISTRAL, MIXTRAL, GEMMA2, GEMMA3, PHI3, OLMO2, DEEPSEEK_V2, DEEPSEEK_V3, GPT_OSS = (
    f"{name}ForCausalLM"
    for name in (
        "Llama",
        "Qwen2",
        "Qwen3",
        "Qwen3Moe",
        "Mistral",
        "Mixtral",
        "Gemma2",
        "Gemma3",
        "Phi3",
        "Olmo2",
        "DeepseekV2",
        "DeepseekV3",
        "GptOss",
    )
)
_LLAMA3 = _rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=32)
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_EXPERTS = {"num_experts_per_tok": 3, "moe_intermediate_size": 24}
_LATENT = {
    **_EXPERTS,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
_LONGROPE = {
    "rope_parameters": _rope(
        "longrope", short_factor=[1.0, 1.1, 1.3, 1.6], long_factor=[1.0, 1.7, 2.9, 4.3], partial_rotary_factor=1.0
    ),
    "original_max_position_embeddings": 32,
}

CASES = (
    Case("llama-mha", LLAMA, {"num_key_value_heads": 4}),
    Case("llama-gqa", LLAMA, {}),
    Case("llama-mqa", LLAMA, {"num_key_value_heads": 1}),
    Case("llama-tied", LLAMA, {"tie_word_embeddings": True}),
    Case("llama-biases", LLAMA, {"attention_bias": True, "mlp_bias": True}),
    Case("llama-head-dim", LLAMA, {"head_dim": 12}),
    Case("llama-rope-linear", LLAMA, {"rope_parameters": _rope("linear", factor=2.5)}),
    Case("llama-rope-llama3", LLAMA, {"rope_parameters": _LLAMA3}),
    Case("llama-rope-yarn", LLAMA, {"rope_parameters": _YARN}),
    Case(
        "llama-rope-yarn-tuned",
        LLAMA,
        {
            "rope_parameters": {
                **_YARN,
                "attention_factor": 1.3,
                "beta_fast": 4.0,
                "beta_slow": 0.5,
                "truncate": False,
            }
        },
    ),
    Case("llama-rope-yarn-mscale", LLAMA, {"rope_parameters": {**_YARN, "mscale": 0.7, "mscale_all_dim": 1.4}}),
    Case("qwen2", QWEN2, {}),
    Case(
        "qwen2-windows",
        QWEN2,
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    Case("qwen3", QWEN3, {"head_dim": 16}),
    Case("qwen3-bias", QWEN3, {"head_dim": 8, "attention_bias": True}),
    Case(
        "qwen3-layer-types",
        QWEN3,
        {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    Case("mistral-window", MISTRAL, {"sliding_window": 9}),
    Case("mistral-full", MISTRAL, {"sliding_window": None, "head_dim": 16}),
    Case("qwen3-moe", QWEN3_MOE, {**_EXPERTS, "num_experts": 8, "head_dim": 8, "norm_topk_prob": True}),
    Case(
        "qwen3-moe-sparse-step",
        QWEN3_MOE,
        {**_EXPERTS, "num_experts": 4, "num_hidden_layers": 4, "decoder_sparse_step": 2, "attention_bias": True},
    ),
    Case(
        "qwen3-moe-windows",
        QWEN3_MOE,
        {**_EXPERTS, "num_experts": 4, "mlp_only_layers": [0], "use_sliding_window": True, "sliding_window": 7},
    ),
    Case("mixtral", MIXTRAL, {"num_local_experts": 4}),
    Case("mixtral-window", MIXTRAL, {"num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": 9}),
    Case("mixtral-head-dim", MIXTRAL, {"num_local_experts": 4, "head_dim": 16, "num_key_value_heads": 1}),
    Case(
        "gemma2",
        GEMMA2,
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 12,
            "sliding_window": 7,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    Case(
        "gemma2-uncapped",
        GEMMA2,
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 5,
            "layer_types": [_GLOBAL, _LOCAL],
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
    ),
    Case(
        "gemma2-biases",
        GEMMA2,
        {
            "head_dim": 12,
            "attention_bias": True,
            "num_key_value_heads": 1,
            "hidden_activation": "gelu",
            "sliding_window": 9,
        },
    ),
    Case(
        "gemma3",
        GEMMA3,
        {
            "head_dim": 8,
            "num_hidden_layers": 3,
            "sliding_window": 6,
            "sliding_window_pattern": 3,
            "rope_parameters": {_GLOBAL: _rope("default"), _LOCAL: {"rope_type": "default", "rope_theta": 30.0}},
            "tie_word_embeddings": True,
        },
    ),
    Case(
        "gemma3-scaled",
        GEMMA3,
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 7,
            "layer_types": [_LOCAL, _GLOBAL],
            "rope_parameters": {
                _GLOBAL: _rope("linear", factor=2.5),
                _LOCAL: {"rope_type": "default", "rope_theta": 30.0},
            },
            "final_logit_softcapping": 4.0,
        },
    ),
    Case("phi3", PHI3, {}),
    Case(
        "phi3-partial",
        PHI3,
        {"rope_parameters": _rope("default", partial_rotary_factor=0.5), "sliding_window": 11},
    ),
    Case("phi3-longrope", PHI3, _LONGROPE),
    Case("phi3-longrope-short", PHI3, {**_LONGROPE, "original_max_position_embeddings": 128}),
    Case(
        "phi3-longrope-partial",
        PHI3,
        {
            "rope_parameters": _rope(
                "longrope",
                short_factor=[1.0, 1.1],
                long_factor=[1.2, 2.9],
                partial_rotary_factor=0.5,
                attention_factor=1.3,
            ),
            "original_max_position_embeddings": 32,
            "num_key_value_heads": 4,
        },
    ),
    Case("olmo2", OLMO2, {}),
    Case("olmo2-biases", OLMO2, {"attention_bias": True, "num_key_value_heads": 4, "rope_parameters": _YARN}),
    Case("deepseek-v2", DEEPSEEK_V2, {**_LATENT, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.7}),
    Case("deepseek-v2-lite", DEEPSEEK_V2, {**_LATENT, "q_lora_rank": None, "n_group": 1, "topk_group": 1}),
    Case(
        "deepseek-v2-yarn",
        DEEPSEEK_V2,
        {
            **_LATENT,
            "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
            "attention_bias": True,
            "mlp_bias": True,
            "rms_norm_eps": 1e-2,
        },
    ),
    Case("deepseek-v3", DEEPSEEK_V3, _LATENT),
    Case(
        "deepseek-v3-yarn",
        DEEPSEEK_V3,
        {
            **_LATENT,
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.6},
            "attention_bias": True,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
        },
    ),
    Case(
        "deepseek-v3-halves",
        DEEPSEEK_V3,
        {**_LATENT, "rope_interleave": False, "q_lora_rank": None, "n_group": 1, "topk_group": 1},
    ),
    Case(
        "gpt-oss",
        GPT_OSS,
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "head_dim": 16,
            "sliding_window": 7,
            "swiglu_limit": 0.7,
            "rope_parameters": {**_YARN, "truncate": False},
        },
    ),
    Case(
        "gpt-oss-unbiased",
        GPT_OSS,
        {
            "num_local_experts": 4,
            "head_dim": 8,
            "sliding_window": 5,
            "layer_types": [_GLOBAL, _LOCAL],
            "attention_bias": False,
            "num_key_value_heads": 4,
        },
    ),
)
