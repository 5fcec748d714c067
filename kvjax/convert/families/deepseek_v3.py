"""DeepSeek-V3 and R1 (DeepSeek 2024, 2412.19437): as V2, with experts by sigmoid and a bias that balances the choice.

Checkpoints hold modules that predict further tokens in layers after the last; decoding has no use for them, and saving
does not write them again.
"""

from __future__ import annotations

import json

from kvjax.config import Experts, ModelConfig
from kvjax.convert.families.base import Family, Values
from kvjax.convert.families.latent import (
    LATENT_NAMES,
    read_experts,
    read_latent,
    write_latent,
    write_latent_rope,
)
from kvjax.convert.hf_fields import Fields

_EXPECTED = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
_FURTHER = ("num_nextn_predict_layers", "num_mtp_layers")


def _read(fields: Fields, values: Values) -> Values:
    for name, wanted in _EXPECTED.items():
        if fields.table.get(name, wanted) != wanted:
            raise fields.wrong(name, f"{wanted!r} or absent")
    experts = Experts(
        **read_experts(fields, values),
        scoring="sigmoid",
        normalize=fields.flag("norm_topk_prob", True),
        scaling_factor=fields.number("routed_scaling_factor", 2.5),
        groups=fields.integer("n_group"),
        groups_per_token=fields.integer("topk_group"),
        group_score="top2",
        selection_bias=True,
    )
    return {"experts": experts, **read_latent(fields, values, fields.flag("rope_interleave", True))}


def _write(config: ModelConfig, extra: Values) -> Values:
    written = write_latent(config)
    if config.experts is None or config.latent is None:
        return written
    return {
        **written,
        "norm_topk_prob": config.experts.normalize,
        "n_group": config.experts.groups,
        "topk_group": config.experts.groups_per_token,
        "rope_interleave": config.latent.interleaved,
    }


def _unused(config: ModelConfig, name: str) -> bool:
    """Layers that predict further tokens, as many as the config says."""
    extra = json.loads(config.extra)
    further = max((extra[field] for field in _FURTHER if isinstance(extra.get(field), int)), default=0)
    layers = range(config.num_layers, config.num_layers + further)
    return any(name.startswith(f"model.layers.{layer}.") for layer in layers)


DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    biases="config",
    max_position_embeddings=4096,
    bos_token_id=0,
    eos_token_id=1,
    reads=frozenset({"rope_interleave"}),
    read=_read,
    write=_write,
    write_rope=write_latent_rope,
    names={**LATENT_NAMES, "mlp/router/selection_bias": "mlp.gate.e_score_correction_bias"},
    unused=_unused,
)
