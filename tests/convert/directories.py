"""Small Hugging Face directories written without kvjax: names and shapes from the architectures' definitions, the
container by the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import deserialize
from safetensors.numpy import save_file

VOCAB, HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 48, 24, 40, 2, 4, 2, 6

DOCUMENT: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama_shapes(**document: Any) -> dict[str, tuple[int, ...]]:
    """Tensor names and [out, in] shapes of a model of `DOCUMENT` with changed fields."""
    fields = {**DOCUMENT, **document}
    queries, keys = HEADS * HEAD_DIM, fields["num_key_value_heads"] * HEAD_DIM
    qkv_bias = fields.get("attention_bias") or fields["model_type"] == "qwen2"
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(fields["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, out, inner in (
            ("self_attn.q_proj", queries, HIDDEN),
            ("self_attn.k_proj", keys, HIDDEN),
            ("self_attn.v_proj", keys, HIDDEN),
            ("self_attn.o_proj", HIDDEN, queries),
            ("mlp.gate_proj", MLP, HIDDEN),
            ("mlp.up_proj", MLP, HIDDEN),
            ("mlp.down_proj", HIDDEN, MLP),
        ):
            shapes[f"{prefix}{name}.weight"] = (out, inner)
            on_output = "o_proj" in name
            if (qkv_bias and "attn" in name and not on_output) or (fields.get("attention_bias") and on_output):
                shapes[f"{prefix}{name}.bias"] = (out,)
            if fields.get("mlp_bias") and "mlp" in name:
                shapes[f"{prefix}{name}.bias"] = (out,)
        if fields["model_type"] == "qwen3":
            shapes[f"{prefix}self_attn.q_norm.weight"] = (HEAD_DIM,)
            shapes[f"{prefix}self_attn.k_norm.weight"] = (HEAD_DIM,)
        shapes[f"{prefix}input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (HIDDEN,)
    if not fields["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    return shapes


def random_tensors(shapes: dict[str, tuple[int, ...]], dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Normal weights of a NumPy or ml_dtypes dtype, about 1/sqrt(HIDDEN) in size: activations stay of order one."""
    random = np.random.default_rng(seed)
    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    return {name: (0.2 * random.standard_normal(shape, np.float32)).astype(kind) for name, shape in shapes.items()}


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """One safetensors file, by the library."""
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path, {"format": "pt"})


def write_directory(
    path: Path, tensors: dict[str, np.ndarray] | None = None, shards: int = 1, dtype: str = "float32", **document: Any
) -> Path:
    """A Hugging Face directory: `document` changes fields of `DOCUMENT` (a value of ... removes one)."""
    path.mkdir(parents=True, exist_ok=True)
    fields = {name: value for name, value in {**DOCUMENT, **document}.items() if value is not ...}
    (path / "config.json").write_text(json.dumps(fields))
    if tensors is None:
        tensors = random_tensors(llama_shapes(**document), dtype)
    if shards == 1:
        write_tensors(path / "model.safetensors", tensors)
        return path
    weight_map = {}
    names = list(tensors)
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[shard::shards]
        write_tensors(path / file, {name: tensors[name] for name in mine})
        weight_map.update(dict.fromkeys(mine, file))
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def stored_bytes(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a directory as (dtype, shape, bytes), read by the library."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        for name, entry in deserialize(file.read_bytes()):
            found[name] = (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
    return found
