"""Rotary scaling in `config.json`: `rope_theta` with `rope_scaling`, or transformers 5's `rope_parameters`."""

from __future__ import annotations

import math
from typing import Any

from kvjax.config import ROPE_KINDS, ModelConfig, RopeScaling
from kvjax.convert.hf_fields import REQUIRED, Fields
from kvjax.errors import CheckpointError

DEFAULT_THETA = 10000.0
TABLES = ("rope_scaling", "rope_parameters")
ORIGINAL = "original_max_position_embeddings"

_ALWAYS = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "finetuned"}
_ALLOWED = {
    "default": None,  # transformers reads nothing else here, whatever is left from another type
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", ORIGINAL},
    "yarn": {
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        ORIGINAL,
    },
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor", ORIGINAL},
}


def read_rope(fields: Fields, context: int, theta: float = DEFAULT_THETA) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of the `ModelConfig`, from either form of a `config.json`.

    Args:
      context: its max_position_embeddings.
      theta: what an absent rope_theta means.

    Raises:
      CheckpointError: both forms are there and disagree, or the scaling is of a type or has a field that kvjax would
        have to ignore.
    """
    found = {name: _read_table(fields, name, context, theta) for name in TABLES if fields.table.get(name)}
    if not found:
        return {"rope_theta": fields.number("rope_theta", theta), "rope_scaling": RopeScaling()}
    first, *others = found.values()
    if any(other != first for other in others):
        raise CheckpointError(
            f"{fields.source}: rope_scaling and rope_parameters say different things; remove one of them"
        )
    return {"rope_theta": first[0], "rope_scaling": first[1]}


def rope_table(fields: Fields) -> Fields:
    """The table that `read_rope` reads, empty where there is none."""
    name = next((name for name in TABLES if fields.table.get(name)), None)
    return Fields({} if name is None else fields.table[name], f"{fields.source}: {name}")


def _read_table(fields: Fields, name: str, context: int, default_theta: float) -> tuple[float, RopeScaling]:
    """One of the two tables."""
    table = fields.table[name]
    if not isinstance(table, dict):
        raise fields.wrong(name, "a table")
    inner = Fields(table, f"{fields.source}: {name}")
    kind = rope_type(table)
    if any(isinstance(value, dict) for value in table.values()):
        raise CheckpointError(
            f"{fields.source}: {name} differs by layer type, which kvjax does not know of model_type "
            f"{fields.table.get('model_type')!r}; got {table!r}"
        )
    if kind not in ROPE_KINDS:
        raise CheckpointError(
            f"{fields.source}: {name}.rope_type {kind!r} is not implemented; allowed: {', '.join(ROPE_KINDS)}"
        )
    if inner.number("partial_rotary_factor", 1.0) != 1.0:
        raise inner.wrong("partial_rotary_factor", "1.0 (kvjax rotates whole heads of this model_type)")
    allowed = _ALLOWED[kind]
    unknown = sorted(
        key for key, value in table.items() if value is not None and key not in _ALWAYS | (allowed or set())
    )
    if allowed is not None and unknown:
        raise CheckpointError(
            f"{fields.source}: {name}.{unknown[0]} is not a field of rope_type {kind!r} that kvjax knows; "
            f"allowed: {', '.join(sorted(allowed))}"
        )
    theta = inner.number("rope_theta", fields.number("rope_theta", default_theta))
    # A field of this name beside the table wins over the one inside, as in transformers.
    original = fields.integer(ORIGINAL, inner.integer(ORIGINAL, context))
    return theta, _read_scaling(inner, kind, context, original)


def rope_type(table: dict[str, Any]) -> Any:
    """The type of scaling, under its new or old name."""
    return table.get("rope_type", table.get("type", "default"))


def _read_scaling(fields: Fields, kind: str, context: int, original: int) -> RopeScaling:
    """The scaling of a table of a known kind."""
    if kind == "default":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling("linear", factor=fields.number("factor"))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            factor=fields.number("factor"),
            original_max_position_embeddings=original,
            low_freq_factor=fields.number("low_freq_factor"),
            high_freq_factor=fields.number("high_freq_factor"),
        )
    if kind == "longrope":
        return RopeScaling(
            "longrope",
            factor=fields.number("factor", context / original),
            original_max_position_embeddings=original,
            attention_factor=fields.number("attention_factor", None),
            short_factor=fields.numbers("short_factor"),
            long_factor=fields.numbers("long_factor"),
            long=context > original,
        )
    # As in transformers: a null factor is the ratio of the two context lengths, a null truncate is false.
    factor = fields.number("factor", context / original if "factor" in fields.table else REQUIRED)
    return RopeScaling(
        "yarn",
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        attention_factor=fields.number("attention_factor", _attention_factor(fields, factor)),
        truncate=fields.flag("truncate", "truncate" not in fields.table),
    )


def _attention_factor(fields: Fields, factor: float) -> float | None:
    """DeepSeek's form of the factor on cos and sin, from `mscale` and `mscale_all_dim`; None: YaRN's own."""
    scale, scale_all = fields.number("mscale", None), fields.number("mscale_all_dim", None)
    if scale is None or scale_all is None or factor <= 1:
        return None
    return yarn_mscale(factor, scale) / yarn_mscale(factor, scale_all)


def yarn_mscale(factor: float, mscale: float) -> float:
    """How much larger scores are made for a context `factor` times as long (2309.00071, section 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def write_rope(config: ModelConfig, as_parameters: bool) -> dict[str, Any]:
    """The fields of `config.json` that `read_rope` reads back; `as_parameters`: in transformers 5's form."""
    table = write_table(config)
    if as_parameters:
        return {"rope_parameters": {**table, "rope_theta": config.rope_theta}}
    # "type" is what releases of transformers before 4.43 read.
    old = None if config.rope_scaling.kind == "default" else {**table, "type": config.rope_scaling.kind}
    return {"rope_theta": config.rope_theta, "rope_scaling": old}


def write_table(config: ModelConfig) -> dict[str, Any]:
    """The scaling as a table."""
    scaling = config.rope_scaling
    table: dict[str, Any] = {"rope_type": scaling.kind}
    if scaling.kind == "default":
        return table
    table["factor"] = scaling.factor
    if scaling.kind != "linear":
        table[ORIGINAL] = scaling.original_max_position_embeddings
    if scaling.kind == "llama3":
        table["low_freq_factor"] = scaling.low_freq_factor
        table["high_freq_factor"] = scaling.high_freq_factor
    if scaling.kind == "yarn":
        table["beta_fast"], table["beta_slow"] = scaling.beta_fast, scaling.beta_slow
        table["truncate"] = scaling.truncate
    if scaling.kind == "longrope":
        table["short_factor"], table["long_factor"] = list(scaling.short_factor), list(scaling.long_factor)
        if scaling.factor == config.max_position_embeddings / scaling.original_max_position_embeddings:
            del table["factor"]
    if scaling.attention_factor is not None:
        table["attention_factor"] = scaling.attention_factor
    return table
