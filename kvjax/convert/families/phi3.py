"""Phi-3 and Phi-4 (Abdin et al. 2024, 2404.14219): fused projections, LongRoPE, RoPE on a part of each head.

LongRoPE has two sets of factors, and transformers takes the long ones as soon as a sequence exceeds the original
context, though keys cached before that have been turned by the short ones. kvjax takes one set for all sequences: the
long factors exactly when `max_position_embeddings` exceeds `original_max_position_embeddings`. For short sequences of a
model with a long context, set `max_position_embeddings` to the original one.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvjax.config import ModelConfig
from kvjax.convert.families.base import Family, Values
from kvjax.convert.hf_fields import Fields
from kvjax.convert.hf_names import LLAMA_NAMES
from kvjax.convert.hf_place import Part, rows_of
from kvjax.convert.hf_rope import ORIGINAL, TABLES, read_rope, rope_type, write_table
from kvjax.convert.hf_rope import write_rope as write_plain_rope
from kvjax.convert.hf_windows import Windows

DEFAULT_ORIGINAL = 4096
_FRACTION = "partial_rotary_factor"
_OLD_TYPES = ("su", "yarn")
"""What LongRoPE was called when Phi-3 came out."""


def _rope(fields: Fields, context: int) -> Values:
    """As for other families, with the part of a head that turns taken out of the tables."""
    document = dict(fields.table)
    fractions = [fields.number(_FRACTION, None)]
    for name in TABLES:
        if not isinstance(document.get(name), dict):
            continue
        table = dict(document[name])
        fractions.append(Fields(table, f"{fields.source}: {name}").number(_FRACTION, None))
        table.pop(_FRACTION, None)
        if rope_type(table) in _OLD_TYPES:
            table["rope_type"] = "longrope"
        if rope_type(table) not in ("default", "longrope"):
            raise Fields(table, f"{fields.source}: {name}").wrong("rope_type", "'default' or 'longrope'")
        if ORIGINAL not in table and document.get(ORIGINAL) is None:
            table[ORIGINAL] = DEFAULT_ORIGINAL
        document[name] = table
    given = sorted({fraction for fraction in fractions if fraction is not None})
    if len(given) > 1:
        raise fields.wrong(_FRACTION, f"the same everywhere (given: {given}),")
    rope = read_rope(Fields(document, fields.source), context)
    return {**rope, "rotary_fraction": given[0] if given else 1.0}


def _write_rope(config: ModelConfig, as_parameters: bool) -> Values:
    scaling, fraction = config.rope_scaling, config.rotary_fraction
    fields = write_plain_rope(config, as_parameters)
    if as_parameters:
        fields["rope_parameters"][_FRACTION] = fraction
    elif fraction != 1:
        fields[_FRACTION] = fraction
    if scaling.kind == "longrope":
        fields[ORIGINAL] = scaling.original_max_position_embeddings
        if not as_parameters:
            # Releases of transformers before 5 refuse a table with more than these three.
            table = write_table(config)
            kept = ("short_factor", "long_factor", "factor", "attention_factor")
            fields["rope_scaling"] = {"type": "longrope", **{key: table[key] for key in kept if key in table}}
    return fields


def _parts(config: ModelConfig) -> Mapping[str, Part]:
    queries, keys = config.num_heads * config.width, config.num_kv_heads * config.width
    return {
        **rows_of({"attention/q": queries, "attention/k": keys, "attention/v": keys}),
        **rows_of({"mlp/gate": config.intermediate_size, "mlp/up": config.intermediate_size}),
    }


PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    windows=Windows("every", size=None),
    max_position_embeddings=4096,
    norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=32000,
    reads=frozenset({_FRACTION}),
    rope=_rope,
    write_rope=_write_rope,
    names={
        **LLAMA_NAMES,
        **dict.fromkeys(("attention/q", "attention/k", "attention/v"), "self_attn.qkv_proj"),
        **dict.fromkeys(("mlp/gate", "mlp/up"), "mlp.gate_up_proj"),
    },
    parts=_parts,
)
