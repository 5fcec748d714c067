"""Mixtral (Jiang et al. 2024, 2401.04088): Mistral with experts, each of `intermediate_size`."""

from __future__ import annotations

import functools

from kvjax.config import Experts, ModelConfig
from kvjax.convert.families.base import Family, Values
from kvjax.convert.hf_fields import Fields
from kvjax.convert.hf_names import LLAMA_NAMES
from kvjax.convert.hf_rope import read_rope
from kvjax.convert.hf_windows import Windows


def _read(fields: Fields, values: Values) -> Values:
    experts = Experts(
        count=fields.integer("num_local_experts", 8),
        per_token=fields.integer("num_experts_per_tok", 2),
        intermediate_size=values["intermediate_size"],
    )
    return {"experts": experts}


def _write(config: ModelConfig, extra: Values) -> Values:
    if config.experts is None:
        return {}
    return {"num_local_experts": config.experts.count, "num_experts_per_tok": config.experts.per_token}


MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    windows=Windows("every", size=None),
    kv_heads=8,
    max_position_embeddings=131072,
    norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
    reads=frozenset({"num_local_experts"}),
    read=_read,
    write=_write,
    rope=functools.partial(read_rope, theta=1e6),
    names={
        **LLAMA_NAMES,
        "mlp/router/gate": "block_sparse_moe.gate",
        "mlp/experts_gate": "block_sparse_moe.experts.{}.w1",
        "mlp/experts_down": "block_sparse_moe.experts.{}.w2",
        "mlp/experts_up": "block_sparse_moe.experts.{}.w3",
    },
)
