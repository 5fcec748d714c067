"""Qwen3-MoE (Yang et al. 2025, 2505.09388): Qwen3 with experts in all layers but those listed as dense."""

from __future__ import annotations

from kvjax.config import Experts, ModelConfig
from kvjax.convert.families.base import Family, Values
from kvjax.convert.hf_fields import Fields
from kvjax.convert.hf_names import EXPERT_NAMES, LLAMA_NAMES
from kvjax.convert.hf_windows import Windows

_COUNT = ("num_experts", "num_local_experts")


def _dense_layers(fields: Fields, layers: int) -> tuple[int, ...]:
    """Those that `mlp_only_layers` lists, and all but each `decoder_sparse_step`-th."""
    step = fields.integer("decoder_sparse_step", 1)
    listed = fields.integers("mlp_only_layers", least=0)
    return tuple(layer for layer in range(layers) if layer in listed or (layer + 1) % step)


def _read(fields: Fields, values: Values) -> Values:
    experts = Experts(
        count=fields.same(*_COUNT),
        per_token=fields.integer("num_experts_per_tok"),
        intermediate_size=fields.integer("moe_intermediate_size"),
        dense_layers=_dense_layers(fields, values["num_layers"]),
        normalize=fields.flag("norm_topk_prob"),
    )
    return {"experts": experts}


def _write(config: ModelConfig, extra: Values) -> Values:
    if config.experts is None:
        return {}
    experts, layers = config.experts, config.num_layers
    written: Values = {
        **{name: experts.count for name in _COUNT if name in extra or name == _COUNT[0]},
        "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": experts.intermediate_size,
        "norm_topk_prob": experts.normalize,
    }
    if _dense_layers(Fields(extra, "ModelConfig.extra"), layers) != experts.dense_layers:
        written |= {"decoder_sparse_step": 1, "mlp_only_layers": list(experts.dense_layers)}
    return written


QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    biases="config",
    windows=Windows("switched"),
    kv_heads=4,
    values={"qk_norm": True},
    reads=frozenset(_COUNT),
    read=_read,
    write=_write,
    names={**LLAMA_NAMES, **EXPERT_NAMES},
)
