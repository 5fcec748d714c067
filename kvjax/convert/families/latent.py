"""What DeepSeek-V2 and V3 have in common: latent attention, a shared expert, and YaRN that also scales attention."""

from __future__ import annotations

import math
from typing import Any

from kvjax.config import Latent, ModelConfig
from kvjax.convert.families.base import Values
from kvjax.convert.hf_fields import Fields
from kvjax.convert.hf_names import EXPERT_NAMES, LLAMA_NAMES
from kvjax.convert.hf_rope import rope_table, rope_type, write_rope, yarn_mscale
from kvjax.errors import CheckpointError

LATENT_NAMES = {
    **LLAMA_NAMES,
    **EXPERT_NAMES,
    "attention/q_down": "self_attn.q_a_proj",
    "attention/q_norm": "self_attn.q_a_layernorm",
    "attention/q_up": "self_attn.q_b_proj",
    "attention/kv_down": "self_attn.kv_a_proj_with_mqa",
    "attention/kv_norm": "self_attn.kv_a_layernorm",
    "attention/kv_up": "self_attn.kv_b_proj",
    "mlp/shared/gate": "mlp.shared_experts.gate_proj",
    "mlp/shared/up": "mlp.shared_experts.up_proj",
    "mlp/shared/down": "mlp.shared_experts.down_proj",
}

_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def read_latent(fields: Fields, values: Values, interleaved: bool) -> Values:
    """Latent attention, and what follows from it for the plain arguments."""
    if "q_lora_rank" not in fields.table:
        raise CheckpointError(
            f"{fields.source}: the field q_lora_rank is missing; null: queries without a bottleneck of their own"
        )
    latent = Latent(
        **{name: fields.integer(name) for name in _SIZES},
        q_lora_rank=fields.integer("q_lora_rank", None),
        interleaved=interleaved,
    )
    for name, wanted in (
        ("num_key_value_heads", values["num_heads"]),
        ("head_dim", latent.qk_rope_head_dim),
        ("qk_head_dim", latent.qk_head_dim),
        ("moe_layer_freq", 1),
    ):
        if fields.integer(name, wanted) != wanted:
            raise fields.wrong(name, f"{wanted} or absent in a model_type with latent attention")
    return {
        "latent": latent,
        "num_kv_heads": values["num_heads"],
        "head_dim": latent.qk_rope_head_dim,
        "query_scale": _query_scale(latent, rope_table(fields)),
    }


def _query_scale(latent: Latent, rope: Fields) -> float | None:
    """YaRN's factor on attention, which DeepSeek applies to all of a head and not by cos and sin; None: no factor."""
    every = rope.number("mscale_all_dim", None)
    if rope_type(rope.table) == "default" or every is None:
        return None
    return float(latent.qk_head_dim**-0.5 * yarn_mscale(rope.number("factor"), every) ** 2)


def read_experts(fields: Fields, values: Values) -> Values:
    """The arguments of `Experts` that mean the same in V2 and V3."""
    dense, width = fields.integer("first_k_dense_replace", least=0), fields.integer("moe_intermediate_size")
    return {
        "count": fields.integer("n_routed_experts"),
        "per_token": fields.integer("num_experts_per_tok"),
        "intermediate_size": width,
        "shared_intermediate_size": width * fields.integer("n_shared_experts"),
        "dense_layers": tuple(range(min(dense, values["num_layers"]))),
    }


def write_latent(config: ModelConfig) -> Values:
    """The fields that `read_latent` and `read_experts` read."""
    latent, experts = config.latent, config.experts
    if latent is None or experts is None:
        return {}
    return {
        **{name: getattr(latent, name) for name in (*_SIZES, "q_lora_rank")},
        "head_dim": latent.qk_rope_head_dim,
        "n_routed_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": experts.intermediate_size,
        "n_shared_experts": experts.shared_intermediate_size // experts.intermediate_size,
        "first_k_dense_replace": len(experts.dense_layers),
        "routed_scaling_factor": experts.scaling_factor,
    }


def write_latent_rope(config: ModelConfig, as_parameters: bool) -> Values:
    """With `mscale` and `mscale_all_dim`, DeepSeek's own form of the factors, where there is a factor on attention."""
    fields = write_rope(config, as_parameters)
    scaling, latent = config.rope_scaling, config.latent
    if config.query_scale is None or latent is None or scaling.kind != "yarn" or scaling.factor <= 1:
        return fields
    table: dict[str, Any] = fields["rope_parameters" if as_parameters else "rope_scaling"]
    every = math.sqrt(config.query_scale * latent.qk_head_dim**0.5)
    table["mscale_all_dim"] = _mscale(every, scaling.factor)
    if scaling.attention_factor is not None:
        table["mscale"] = _mscale(table.pop("attention_factor") * every, scaling.factor)
    return fields


def _mscale(wanted: float, factor: float) -> float:
    """The argument for which `yarn_mscale` gives `wanted`, without the noise of inverting it."""
    exact = (wanted - 1.0) / (0.1 * math.log(factor))
    short = round(exact, 6)
    return short if math.isclose(yarn_mscale(factor, short), wanted, rel_tol=1e-12) else exact
