"""Parameter paths of `kvjax.models.Decoder` and the names that Llama, and most models after it, give their tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"

IGNORED = re.compile(r"^model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq$")
"""Buffers that old checkpoints carry and that the config determines."""

OUTSIDE: Mapping[str, str] = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}

LLAMA_NAMES: Mapping[str, str] = {
    "attention_norm": "input_layernorm",
    "attention/q": "self_attn.q_proj",
    "attention/k": "self_attn.k_proj",
    "attention/v": "self_attn.v_proj",
    "attention/o": "self_attn.o_proj",
    "attention/q_norm": "self_attn.q_norm",
    "attention/k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
"""Modules of a layer, see `kvjax.convert.families.base.Family.names`."""

SANDWICH_NAMES: Mapping[str, str] = {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
"""Norms of layers that normalise what a block gives."""

EXPERT_NAMES: Mapping[str, str] = {
    "mlp/router/gate": "mlp.gate",
    "mlp/experts_gate": "mlp.experts.{}.gate_proj",
    "mlp/experts_up": "mlp.experts.{}.up_proj",
    "mlp/experts_down": "mlp.experts.{}.down_proj",
}
"""A router, and one tensor per expert."""

LEAVES: Mapping[str, str] = dict.fromkeys(("embedding", "weight", "kernel", "scale"), "weight") | {"bias": "bias"}
