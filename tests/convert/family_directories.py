"""A small `config.json` of each family beside Llama and its like, and the tensors of such a checkpoint: names and
shapes as transformers' definitions (or, for experts, its published conversions) have them, written without kvjax."""

from __future__ import annotations

from typing import Any

VOCAB, HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM = 48, 24, 40, 4, 2, 6
EXPERTS, EXPERT = 4, 20
QUERY_RANK, RANK, NOPE, ROPE, VALUE = 10, 14, 8, 6, 4

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ROUTED: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": EXPERT}
_LATENT: dict[str, Any] = {
    **_ROUTED,
    "num_key_value_heads": HEADS,
    "q_lora_rank": QUERY_RANK,
    "kv_lora_rank": RANK,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": VALUE,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "rms_norm_eps": 1e-6,
}
YARN: dict[str, Any] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def _document(model_type: str, architecture: str, **fields: Any) -> dict[str, Any]:
    return {**_BASE, "model_type": model_type, "architectures": [f"{architecture}ForCausalLM"], **fields}


DOCUMENTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": _document(
        "qwen3_moe", "Qwen3Moe", **_ROUTED, num_experts=EXPERTS, mlp_only_layers=[0], norm_topk_prob=True, head_dim=6
    ),
    "mixtral": _document("mixtral", "Mixtral", num_local_experts=EXPERTS, num_experts_per_tok=2),
    "gemma2": _document("gemma2", "Gemma2", head_dim=6, query_pre_attn_scalar=12, sliding_window=8),
    "gemma3_text": _document(
        "gemma3_text", "Gemma3", head_dim=6, query_pre_attn_scalar=6, sliding_window=8, sliding_window_pattern=2
    ),
    "phi3": _document("phi3", "Phi3", sliding_window=8),
    "olmo2": _document("olmo2", "Olmo2"),
    "deepseek_v2": _document("deepseek_v2", "DeepseekV2", **_LATENT, topk_method="group_limited_greedy"),
    "deepseek_v3": _document("deepseek_v3", "DeepseekV3", **_LATENT, topk_method="noaux_tc"),
    "gpt_oss": _document(
        "gpt_oss",
        "GptOss",
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        head_dim=6,
        sliding_window=8,
        rope_scaling=YARN,
    ),
}

Shapes = dict[str, tuple[int, ...]]


def _linear(name: str, out: int, inner: int, biased: bool = False) -> Shapes:
    return {f"{name}.weight": (out, inner), **({f"{name}.bias": (out,)} if biased else {})}


def _gated(name: str, width: int) -> Shapes:
    return {
        **_linear(f"{name}.gate_proj", width, HIDDEN),
        **_linear(f"{name}.up_proj", width, HIDDEN),
        **_linear(f"{name}.down_proj", HIDDEN, width),
    }


def _attention(document: dict[str, Any]) -> Shapes:
    kind, queries, keys = document["model_type"], HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    if kind in ("deepseek_v2", "deepseek_v3"):
        query = _linear("q_proj", HEADS * (NOPE + ROPE), HIDDEN)
        if document["q_lora_rank"] is not None:
            query = {
                **_linear("q_a_proj", QUERY_RANK, HIDDEN),
                "q_a_layernorm.weight": (QUERY_RANK,),
                **_linear("q_b_proj", HEADS * (NOPE + ROPE), QUERY_RANK),
            }
        return {
            **query,
            **_linear("kv_a_proj_with_mqa", RANK + ROPE, HIDDEN),
            "kv_a_layernorm.weight": (RANK,),
            **_linear("kv_b_proj", HEADS * (NOPE + VALUE), RANK),
            **_linear("o_proj", HIDDEN, HEADS * VALUE),
        }
    if kind == "phi3":
        return {**_linear("qkv_proj", queries + 2 * keys, HIDDEN), **_linear("o_proj", HIDDEN, queries)}
    biased = kind == "gpt_oss"
    norms = {
        "qwen3_moe": (HEAD_DIM, HEAD_DIM),
        "gemma3_text": (HEAD_DIM, HEAD_DIM),
        "olmo2": (queries, keys),
    }.get(kind)
    return {
        **_linear("q_proj", queries, HIDDEN, biased),
        **_linear("k_proj", keys, HIDDEN, biased),
        **_linear("v_proj", keys, HIDDEN, biased),
        **_linear("o_proj", HIDDEN, queries, biased),
        **({"q_norm.weight": (norms[0],), "k_norm.weight": (norms[1],)} if norms else {}),
        **({"sinks": (HEADS,)} if kind == "gpt_oss" else {}),
    }


def _feed_forward(document: dict[str, Any], layer: int) -> Shapes:
    kind = document["model_type"]
    if kind == "mixtral":
        each = [
            {
                **_linear(f"block_sparse_moe.experts.{n}.w1", MLP, HIDDEN),
                **_linear(f"block_sparse_moe.experts.{n}.w2", HIDDEN, MLP),
                **_linear(f"block_sparse_moe.experts.{n}.w3", MLP, HIDDEN),
            }
            for n in range(EXPERTS)
        ]
        return {**_linear("block_sparse_moe.gate", EXPERTS, HIDDEN), **{k: v for one in each for k, v in one.items()}}
    if kind == "gpt_oss":
        return {
            **_linear("mlp.router", EXPERTS, HIDDEN, biased=True),
            "mlp.experts.gate_up_proj": (EXPERTS, HIDDEN, 2 * MLP),
            "mlp.experts.gate_up_proj_bias": (EXPERTS, 2 * MLP),
            "mlp.experts.down_proj": (EXPERTS, MLP, HIDDEN),
            "mlp.experts.down_proj_bias": (EXPERTS, HIDDEN),
        }
    if kind == "phi3":
        return {**_linear("mlp.gate_up_proj", 2 * MLP, HIDDEN), **_linear("mlp.down_proj", HIDDEN, MLP)}
    if kind not in ("qwen3_moe", "deepseek_v2", "deepseek_v3") or layer == 0:
        return _gated("mlp", MLP)
    shapes = _linear("mlp.gate", EXPERTS, HIDDEN)
    for number in range(EXPERTS):
        shapes |= _gated(f"mlp.experts.{number}", EXPERT)
    if kind != "qwen3_moe":
        shapes |= _gated("mlp.shared_experts", 2 * EXPERT)
    if kind == "deepseek_v3":
        shapes["mlp.gate.e_score_correction_bias"] = (EXPERTS,)
    return shapes


def shapes_of(document: dict[str, Any]) -> Shapes:
    """Tensor names and shapes of a checkpoint with this `config.json`."""
    norms = {
        "olmo2": ("post_attention", "post_feedforward"),
        "gemma2": ("input", "post_attention", "pre_feedforward", "post_feedforward"),
        "gemma3_text": ("input", "post_attention", "pre_feedforward", "post_feedforward"),
    }.get(document["model_type"], ("input", "post_attention"))
    shapes: Shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(document["num_hidden_layers"]):
        inner = {f"self_attn.{name}": shape for name, shape in _attention(document).items()}
        inner |= _feed_forward(document, layer) | {f"{name}_layernorm.weight": (HIDDEN,) for name in norms}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in inner.items()}
    if not document["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    return shapes
