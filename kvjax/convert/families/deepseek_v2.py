"""DeepSeek-V2 and V2-Lite (DeepSeek 2024, 2405.04434): latent attention; experts by softmax, of the best groups."""

from __future__ import annotations

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

GREEDY, LIMITED = "greedy", "group_limited_greedy"


def _read(fields: Fields, values: Values) -> Values:
    if fields.flag("norm_topk_prob"):
        # Its authors' code then leaves routed_scaling_factor out, transformers does not normalise at all.
        raise fields.wrong("norm_topk_prob", "false")
    if fields.table.get("scoring_func", "softmax") != "softmax":
        raise fields.wrong("scoring_func", "'softmax' or absent")
    if not fields.flag("rope_interleave", True):
        raise fields.wrong("rope_interleave", "true or absent")
    method = fields.table.get("topk_method", GREEDY)
    if method not in (GREEDY, LIMITED):
        raise fields.wrong("topk_method", f"{GREEDY!r} or {LIMITED!r}")
    groups = {}
    if method == LIMITED:
        groups = {"groups": fields.integer("n_group"), "groups_per_token": fields.integer("topk_group")}
    scaling = fields.number("routed_scaling_factor", 1.0)
    experts = Experts(**read_experts(fields, values), normalize=False, scaling_factor=scaling, **groups)
    return {"experts": experts, **read_latent(fields, values, interleaved=True)}


def _write(config: ModelConfig, extra: Values) -> Values:
    written = write_latent(config)
    if config.experts is None or config.experts.groups == 1:
        return {**written, "topk_method": GREEDY}
    groups = {"n_group": config.experts.groups, "topk_group": config.experts.groups_per_token}
    return {**written, "topk_method": LIMITED, **groups}


DEEPSEEK_V2 = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    biases="config",
    mlp_bias=True,
    max_position_embeddings=2048,
    bos_token_id=1,
    eos_token_id=2,
    reads=frozenset({"rope_interleave"}),
    read=_read,
    write=_write,
    write_rope=write_latent_rope,
    names=LATENT_NAMES,
)
