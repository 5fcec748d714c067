"""Parameter paths of `kvjax.models.Decoder` and their tensor names in a Hugging Face checkpoint."""

from __future__ import annotations

import re

from kvjax.errors import CheckpointError

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"

IGNORED = re.compile(r"^model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq$")
"""Buffers that old checkpoints carry and that the config determines."""

_OUTSIDE = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_INSIDE = {
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
_LEAF = {"embedding": "weight", "kernel": "weight", "scale": "weight", "bias": "bias"}


def tensor_name(path: tuple[str, ...]) -> str:
    """The tensor name of the parameter at `path`, e.g. ("layers_3", "attention", "q", "kernel") ->
    "model.layers.3.self_attn.q_proj.weight"."""
    *modules, leaf = path
    first, inner = modules[0], "/".join(modules[1:])
    if first.startswith("layers_") and inner in _INSIDE and leaf in _LEAF:
        return f"model.layers.{first.removeprefix('layers_')}.{_INSIDE[inner]}.{_LEAF[leaf]}"
    if first in _OUTSIDE and not inner and leaf in _LEAF:
        return f"{_OUTSIDE[first]}.{_LEAF[leaf]}"
    raise CheckpointError(
        f'parameter {"/".join(path)} has no name in a Hugging Face checkpoint; save with format="orbax"'
    )


def is_transposed(path: tuple[str, ...]) -> bool:
    """Kernels are [in, out] here and [out, in] there."""
    return path[-1] == "kernel"
