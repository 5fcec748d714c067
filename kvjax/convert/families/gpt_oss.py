"""gpt-oss (OpenAI 2025, 2508.10925): attention sinks, every second layer local, experts with biases and a clamped gate.

One tensor holds all experts, in it gate and up alternate. The published weights are 4-bit numbers with shared scales,
which kvjax does not read: dequantise them first (transformers: `Mxfp4Config(dequantize=True)`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from kvjax.config import Experts, ModelConfig
from kvjax.convert.families.base import Family, Values
from kvjax.convert.hf_fields import Fields
from kvjax.convert.hf_names import LLAMA_NAMES
from kvjax.convert.hf_place import Part
from kvjax.convert.hf_rope import TABLES, read_rope, write_rope
from kvjax.convert.hf_windows import Windows
from kvjax.errors import CheckpointError

SIGMOID_SLOPE = 1.702
_PER_TOKEN = ("num_experts_per_tok", "experts_per_token")


def _read(fields: Fields, values: Values) -> Values:
    if fields.number("swiglu_alpha", SIGMOID_SLOPE) != SIGMOID_SLOPE:
        raise fields.wrong("swiglu_alpha", f"{SIGMOID_SLOPE} or absent")
    if values["activation"] != "silu":
        raise fields.wrong("hidden_act", "'silu' (the gate's slope aside)")
    experts = Experts(
        count=fields.integer("num_local_experts"),
        per_token=fields.same(*_PER_TOKEN),
        intermediate_size=values["intermediate_size"],
        router_bias=True,
        bias=True,
        limit=fields.number("swiglu_limit", 7.0),
    )
    return {"experts": experts}


def _write(config: ModelConfig, extra: Values) -> Values:
    if config.experts is None:
        return {}
    return {
        "num_local_experts": config.experts.count,
        **{name: config.experts.per_token for name in _PER_TOKEN if name in extra or name == _PER_TOKEN[0]},
        "swiglu_limit": config.experts.limit,
    }


def _rope(fields: Fields, context: int) -> Values:
    """transformers takes an absent table for a YaRN of its own, others for none: it must be there."""
    if not any(fields.table.get(name) for name in TABLES):
        raise CheckpointError(
            f"{fields.source}: the field rope_scaling is missing; add it as the model's authors set it"
        )
    return read_rope(fields, context, theta=150000.0)


def _write_rope(config: ModelConfig, as_parameters: bool) -> Values:
    fields = write_rope(config, as_parameters)
    return fields if as_parameters or fields["rope_scaling"] else {**fields, "rope_scaling": {"rope_type": "default"}}


def _parts(config: ModelConfig) -> Mapping[str, Part]:
    assert config.experts is not None
    width = config.experts.intermediate_size
    part = functools.partial(Part, count=width, size=2 * width, step=2)
    return {
        "mlp/experts_gate/kernel": part(axis=2, start=0),
        "mlp/experts_up/kernel": part(axis=2, start=1),
        "mlp/experts_gate_bias/bias": part(axis=1, start=0),
        "mlp/experts_up_bias/bias": part(axis=1, start=1),
    }


GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    biases="config",
    attention_bias=True,
    windows=Windows("pattern", size=128, full_every=2),
    kv_heads=8,
    head_dim=64,
    max_position_embeddings=131072,
    norm_eps=1e-5,
    values={"attention_sinks": True},
    reads=frozenset({"num_local_experts"}),
    read=_read,
    write=_write,
    rope=_rope,
    write_rope=_write_rope,
    names={
        **LLAMA_NAMES,
        "attention/sinks": "self_attn.sinks",
        "mlp/router/gate": "mlp.router",
        **dict.fromkeys(("mlp/experts_gate/kernel", "mlp/experts_up/kernel"), "mlp.experts.gate_up_proj"),
        **dict.fromkeys(("mlp/experts_gate_bias/bias", "mlp/experts_up_bias/bias"), "mlp.experts.gate_up_proj_bias"),
        "mlp/experts_down/kernel": "mlp.experts.down_proj",
        "mlp/experts_down_bias/bias": "mlp.experts.down_proj_bias",
    },
    parts=_parts,
)
