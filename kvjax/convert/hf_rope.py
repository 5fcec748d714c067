"""Rotary scaling in `config.json`: `rope_theta` with `rope_scaling`, or transformers 5's `rope_parameters`."""

from __future__ import annotations

import math
from typing import Any

from kvjax.config import ModelConfig, RopeScaling
from kvjax.convert.hf_fields import REQUIRED, Fields
from kvjax.errors import CheckpointError

DEFAULT_THETA = 10000.0

_ALWAYS = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "finetuned"}
_ORIGINAL = "original_max_position_embeddings"
_ALLOWED = {
    "default": None,  # transformers reads nothing else here, whatever is left from another type
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL},
    "yarn": {
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        _ORIGINAL,
    },
}


def read_rope(document: dict[str, Any], max_position_embeddings: int, source: str) -> tuple[float, RopeScaling]:
    """(theta, scaling) of a `config.json`, in either form.

    Raises:
      CheckpointError: both forms are there and disagree, or the scaling is of a type or has a field that kvjax would
        have to ignore.
    """
    found = {
        name: _read_table(document, name, max_position_embeddings, source)
        for name in ("rope_scaling", "rope_parameters")
        if document.get(name)
    }
    if not found:
        return Fields(document, source).number("rope_theta", DEFAULT_THETA), RopeScaling()
    first, *others = found.values()
    if any(other != first for other in others):
        raise CheckpointError(f"{source}: rope_scaling and rope_parameters say different things; remove one of them")
    return first


def _read_table(
    document: dict[str, Any], name: str, max_position_embeddings: int, source: str
) -> tuple[float, RopeScaling]:
    """One of the two tables."""
    table = document[name]
    if not isinstance(table, dict):
        raise Fields(document, source).wrong(name, "a table")
    fields = Fields(table, f"{source}: {name}")
    kind = table.get("rope_type", table.get("type", "default"))
    if any(isinstance(value, dict) for value in table.values()):
        raise CheckpointError(f"{source}: {name} differs by layer type, which kvjax does not know; got {table!r}")
    if kind not in _ALLOWED:
        raise CheckpointError(f"{source}: {name}.rope_type {kind!r} is not implemented; allowed: {', '.join(_ALLOWED)}")
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise fields.wrong("partial_rotary_factor", "1.0 (kvjax rotates whole heads)")
    allowed = _ALLOWED[kind]
    unknown = sorted(
        key for key, value in table.items() if value is not None and key not in _ALWAYS | (allowed or set())
    )
    if allowed is not None and unknown:
        raise CheckpointError(
            f"{source}: {name}.{unknown[0]} is not a field of rope_type {kind!r} that kvjax knows; "
            f"allowed: {', '.join(sorted(allowed))}"
        )
    theta = fields.number("rope_theta", Fields(document, source).number("rope_theta", DEFAULT_THETA))
    if kind == "default":
        return theta, RopeScaling()
    if kind == "linear":
        return theta, RopeScaling("linear", factor=fields.number("factor"))
    # A field of this name beside the table wins over the one inside, as in transformers.
    original = Fields(document, source).integer(_ORIGINAL, fields.integer(_ORIGINAL, max_position_embeddings))
    if kind == "llama3":
        return theta, RopeScaling(
            "llama3",
            factor=fields.number("factor"),
            original_max_position_embeddings=original,
            low_freq_factor=fields.number("low_freq_factor"),
            high_freq_factor=fields.number("high_freq_factor"),
        )
    # As in transformers: a null factor is the ratio of the two context lengths, a null truncate is false.
    factor = fields.number("factor", max_position_embeddings / original if "factor" in table else REQUIRED)
    return theta, RopeScaling(
        "yarn",
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        attention_factor=fields.number("attention_factor", _attention_factor(fields, factor)),
        truncate=fields.flag("truncate", "truncate" not in table),
    )


def _attention_factor(fields: Fields, factor: float) -> float | None:
    """DeepSeek's form of the factor on cos and sin, from `mscale` and `mscale_all_dim`; None: YaRN's own."""
    scale, scale_all = fields.number("mscale", None), fields.number("mscale_all_dim", None)
    if scale is None or scale_all is None or factor <= 1:
        return None
    return (0.1 * scale * math.log(factor) + 1.0) / (0.1 * scale_all * math.log(factor) + 1.0)


def write_rope(config: ModelConfig, as_parameters: bool) -> dict[str, Any]:
    """The fields of `config.json` that `read_rope` reads back; `as_parameters`: in transformers 5's form."""
    scaling = config.rope_scaling
    table: dict[str, Any] = {"rope_type": scaling.kind}
    if scaling.kind != "default":
        table["factor"] = scaling.factor
    if scaling.kind in ("llama3", "yarn"):
        table[_ORIGINAL] = scaling.original_max_position_embeddings
    if scaling.kind == "llama3":
        table["low_freq_factor"] = scaling.low_freq_factor
        table["high_freq_factor"] = scaling.high_freq_factor
    if scaling.kind == "yarn":
        table["beta_fast"], table["beta_slow"] = scaling.beta_fast, scaling.beta_slow
        table["truncate"] = scaling.truncate
        if scaling.attention_factor is not None:
            table["attention_factor"] = scaling.attention_factor
    if as_parameters:
        return {"rope_parameters": {**table, "rope_theta": config.rope_theta}}
    # "type" is what releases of transformers before 4.43 read.
    old = None if scaling.kind == "default" else {**table, "type": scaling.kind}
    return {"rope_theta": config.rope_theta, "rope_scaling": old}
