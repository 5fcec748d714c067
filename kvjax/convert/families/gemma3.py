"""Gemma 3, text only (Gemma team 2025, 2503.19786): five local layers, then a global one with its own RoPE base."""

from __future__ import annotations

from kvjax.config import ModelConfig
from kvjax.convert.families.base import Family, Values
from kvjax.convert.families.gemma2 import LOGIT_CAP, read_gemma, write_gemma
from kvjax.convert.hf_fields import Fields
from kvjax.convert.hf_names import LLAMA_NAMES, SANDWICH_NAMES
from kvjax.convert.hf_rope import read_rope, rope_type, write_table
from kvjax.convert.hf_rope import write_rope as write_plain_rope
from kvjax.convert.hf_windows import FULL, SLIDING, Windows

GLOBAL_THETA, LOCAL_THETA = 1e6, 1e4
_LOCAL = "rope_local_base_freq"


def _read(fields: Fields, values: Values) -> Values:
    return {**read_gemma(fields, values), "logit_soft_cap": fields.nullable_number(LOGIT_CAP, None)}


def _write(config: ModelConfig, extra: Values) -> Values:
    return {**write_gemma(config, extra), LOGIT_CAP: config.logit_soft_cap}


def _rope(fields: Fields, context: int) -> Values:
    """A table per layer type, or, before transformers 5, one for global layers and a number for local ones."""
    tables = fields.table.get("rope_parameters")
    local = fields.number(_LOCAL, LOCAL_THETA)
    if not tables:
        return {**read_rope(fields, context, GLOBAL_THETA), "local_rope_theta": local}
    if not isinstance(tables, dict) or not set(tables) <= {FULL, SLIDING}:
        raise fields.wrong("rope_parameters", f"a table for {FULL} and one for {SLIDING}")
    for name, table in tables.items():
        if not isinstance(table, dict | None):
            raise Fields(tables, f"{fields.source}: rope_parameters").wrong(name, "a table")
    sliding = Fields(tables.get(SLIDING) or {}, f"{fields.source}: rope_parameters.{SLIDING}")
    if rope_type(sliding.table) != "default":
        raise sliding.wrong("rope_type", "'default' (kvjax scales the positions of global layers only)")
    both = Fields({**fields.table, "rope_parameters": tables.get(FULL)}, fields.source)
    return {**read_rope(both, context, GLOBAL_THETA), "local_rope_theta": sliding.number("rope_theta", local)}


def _write_rope(config: ModelConfig, as_parameters: bool) -> Values:
    if not as_parameters:
        return {**write_plain_rope(config, False), _LOCAL: config.local_rope_theta}
    return {
        "rope_parameters": {
            FULL: {**write_table(config), "rope_theta": config.rope_theta},
            SLIDING: {"rope_type": "default", "rope_theta": config.local_rope_theta},
        }
    }


GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    biases="config",
    windows=Windows("pattern", full_every=6, full_every_field="sliding_window_pattern"),
    activation="gelu_tanh",
    activation_field="hidden_activation",
    kv_heads=4,
    head_dim=256,
    max_position_embeddings=131072,
    tie_word_embeddings=True,
    bos_token_id=2,
    eos_token_id=1,
    values={"norm_placement": "sandwich", "norm_unit_offset": True, "qk_norm": True},
    reads=frozenset({LOGIT_CAP}),
    read=_read,
    write=_write,
    rope=_rope,
    write_rope=_write_rope,
    names={**LLAMA_NAMES, **SANDWICH_NAMES},
)
