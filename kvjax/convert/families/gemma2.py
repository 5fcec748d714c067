"""Gemma 2 (Gemma team 2024, 2408.00118): norms on both sides of each block, every second layer local, soft caps."""

from __future__ import annotations

from kvjax.config import ModelConfig
from kvjax.convert.families.base import Family, Values
from kvjax.convert.hf_fields import Fields
from kvjax.convert.hf_names import LLAMA_NAMES, SANDWICH_NAMES
from kvjax.convert.hf_windows import Windows

SCALAR, ATTENTION_CAP, LOGIT_CAP = "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"


def read_gemma(fields: Fields, values: Values) -> Values:
    """What Gemma 2 and 3 have in common: the factor on embeddings and the scale of attention scores."""
    width = values["head_dim"] or values["hidden_size"] // values["num_heads"]
    return {"embedding_scale": values["hidden_size"] ** 0.5, "query_scale": _query_scale(fields, width)}


def _query_scale(fields: Fields, width: int) -> float | None:
    """One over the root of a number that need not be the head's width; None where it is."""
    scalar = fields.number(SCALAR, 256.0)
    return None if scalar == width else float(scalar**-0.5)


def write_gemma(config: ModelConfig, extra: Values) -> Values:
    """The field that `read_gemma` reads, where `extra` does not say it already."""
    if _query_scale(Fields(extra, "ModelConfig.extra"), config.width) == config.query_scale:
        return {}
    scalar = config.width if config.query_scale is None else config.query_scale**-2
    # Readers want an integer, which inverting the root would miss by a rounding error.
    return {SCALAR: round(scalar) if abs(scalar - round(scalar)) < 1e-9 * scalar else scalar}


def _read(fields: Fields, values: Values) -> Values:
    return {
        **read_gemma(fields, values),
        "attention_soft_cap": fields.nullable_number(ATTENTION_CAP, 50.0),
        "logit_soft_cap": fields.nullable_number(LOGIT_CAP, 30.0),
    }


def _write(config: ModelConfig, extra: Values) -> Values:
    return {**write_gemma(config, extra), ATTENTION_CAP: config.attention_soft_cap, LOGIT_CAP: config.logit_soft_cap}


GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    biases="config",
    windows=Windows("pattern", full_every=2),
    activation="gelu_tanh",
    activation_field="hidden_activation",
    kv_heads=4,
    head_dim=256,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
    bos_token_id=2,
    eos_token_id=1,
    values={"norm_placement": "sandwich", "norm_unit_offset": True},
    reads=frozenset({ATTENTION_CAP, LOGIT_CAP}),
    read=_read,
    write=_write,
    names={**LLAMA_NAMES, **SANDWICH_NAMES},
)
