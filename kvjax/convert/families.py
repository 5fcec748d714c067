"""The Hugging Face model types that kvjax reads: what their `config.json` leaves unsaid."""

from __future__ import annotations

import dataclasses
from typing import Literal

from kvjax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`.

    Attributes:
      architecture: the class name in `architectures`.
      biases: on q, k and v "never", "qkv" always, or "config": `attention_bias` puts them on q, k, v and o.
      mlp_bias: the config's `mlp_bias` is honoured.
      qk_norm: q and k are normalised over head_dim.
      windows: "none"; "every": `sliding_window` holds for all layers; "by_layer": `use_sliding_window` together with
        `layer_types` or `max_window_layers` says which.
      kv_heads, head_dim, max_position_embeddings, bos_token_id, eos_token_id: what an absent field means (None for
        kv_heads: as many as query heads; for head_dim: hidden_size / num_attention_heads).
    """

    model_type: str
    architecture: str
    biases: Literal["never", "qkv", "config"] = "never"
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: Literal["none", "every", "by_layer"] = "none"
    kv_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 32768
    bos_token_id: int | None = None
    eos_token_id: int | None = None


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            biases="config",
            mlp_bias=True,
            max_position_embeddings=2048,
            bos_token_id=1,
            eos_token_id=2,
        ),
        Family("qwen2", "Qwen2ForCausalLM", biases="qkv", windows="by_layer", kv_heads=32),
        Family(
            "qwen3", "Qwen3ForCausalLM", biases="config", qk_norm=True, windows="by_layer", kv_heads=32, head_dim=128
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            windows="every",
            kv_heads=8,
            max_position_embeddings=131072,
            bos_token_id=1,
            eos_token_id=2,
        ),
    )
}


def family_of(model_type: object, source: str) -> Family:
    """The family named `model_type`; `CheckpointError` lists those there are."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"{source}: model_type {model_type!r} is not an architecture kvjax knows; allowed: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]
