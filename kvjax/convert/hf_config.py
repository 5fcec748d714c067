"""`config.json` of a Hugging Face directory to a `ModelConfig`, and back."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np

from kvjax.config import ModelConfig
from kvjax.convert.families import Family, family_of
from kvjax.convert.hf_fields import Fields
from kvjax.errors import CheckpointError, ConfigError
from kvjax.models.rotary import inverse_frequencies

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1, 1.0),
    "quantization_config": (),
    "compression_config": (),
    "per_layer_config": ({},),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "use_bidirectional_attention": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "attention_chunk_size": (),
    "no_rope_layers": ([],),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "logit_scale": (1, 1.0),
    "lm_head_bias": (False,),
    "rope_interleave": (False,),
    "rope_interleaved": (False,),
}
"""Fields that would change what the model computes, and the values (beside null) under which they do not, unless the
family reads them (`Family.reads`)."""

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""Names of activations; of several for one, the first is written."""

MAX_LAYERS = 10_000

PRIVATE = "_kvjax"
"""Key of `ModelConfig.extra` for what kvjax itself must remember; never written to a `config.json`."""

_REWRITTEN = frozenset(
    {
        "architectures",
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "original_max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "bos_token_id",
        "eos_token_id",
        "rope_theta",
        "rope_scaling",
    }
)
"""Fields whose value the `ModelConfig` holds; all others stay in `extra`, also those that tell in which of two forms
(`dtype` or `torch_dtype`, `rope_parameters` or `rope_scaling`) the document was."""

_SAID_OTHERWISE = frozenset({"rope_scaling", "extra", "dtype"})
"""Fields of `ModelConfig` that may be read back differently and mean the same."""


def read_config(document: dict[str, Any], source: str) -> ModelConfig:
    """The `ModelConfig` of a parsed `config.json`.

    Args:
      source: where the document came from, for error messages.

    Raises:
      CheckpointError: an architecture kvjax does not have, a field missing or of the wrong kind, or a field that asks
        for a computation kvjax does not do.
    """
    family = family_of(document.get("model_type"), source)
    fields = Fields(document, source)
    _check_architecture(family, fields)
    for name, harmless in NEUTRAL.items():
        value = document.get(name)
        if name not in family.reads and value is not None and value not in harmless:
            allowed = " or ".join(json.dumps(v) for v in harmless) or "null"
            raise fields.wrong(name, f"{allowed} (kvjax does nothing else)")
    try:
        values = _plain_values(family, fields)
        values |= family.rope(fields, values["max_position_embeddings"])
        values |= family.values
        values |= family.read(fields, values)
        config = ModelConfig(**values)
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from error
    _check_rope(config, source)
    return config


def _plain_values(family: Family, fields: Fields) -> dict[str, Any]:
    """The arguments of `ModelConfig` that are read alike in all families."""
    # A damaged number of layers would otherwise be found only after describing each of them.
    layers, heads = fields.integer("num_hidden_layers", most=MAX_LAYERS), fields.integer("num_attention_heads")
    biased = fields.flag("attention_bias", family.attention_bias) if family.biases == "config" else False
    extra = {name: value for name, value in fields.table.items() if name not in _REWRITTEN}
    return {
        "family": family.model_type,
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": fields.integer("hidden_size"),
        "intermediate_size": fields.integer("intermediate_size"),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": _kv_heads(family, fields, heads),
        "head_dim": _head_dim(family, fields),
        "norm_eps": fields.number("rms_norm_eps", family.norm_eps),
        "qkv_bias": biased or family.biases == "qkv",
        "o_bias": biased,
        "mlp_bias": family.mlp_bias and fields.flag("mlp_bias"),
        "activation": _activation(family, fields),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", family.tie_word_embeddings),
        "windows": family.windows.read(fields, layers),
        "max_position_embeddings": fields.integer("max_position_embeddings", family.max_position_embeddings),
        "dtype": _dtype(fields.table),
        "bos_token_id": _bos(family, fields),
        "eos_token_ids": fields.token_ids("eos_token_id", _as_ids(family.eos_token_id)),
        "extra": json.dumps(extra, sort_keys=True),
    }


def write_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model whose weights are of `dtype`: `read_config` gives the same config again.

    Raises:
      CheckpointError: the config's family has no way to say it (say, qk_norm in a Llama).
    """
    family = family_of(config.family, "ModelConfig.family")
    extra = json.loads(config.extra)
    extra.pop(PRIVATE, None)
    eos = config.eos_token_ids
    document = {
        **extra,
        **_write_activation(config, family, extra),
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.width,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": (list(eos) if len(eos) > 1 else eos[0]) if eos else None,
        "dtype" if "dtype" in extra else "torch_dtype": dtype,
        **family.windows.write(config.windows, extra),
    }
    if family.biases == "config":
        document["attention_bias"] = config.o_bias
    if family.mlp_bias:
        document["mlp_bias"] = config.mlp_bias
    document |= family.write_rope(config, bool(extra.get("rope_parameters")))
    document |= family.write(config, extra)
    _check_said(config, document)
    return document


def config_to_json(config: ModelConfig) -> str:
    """A `ModelConfig` as JSON; `config_from_json` reads it."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def config_from_json(text: str, source: str = "config") -> ModelConfig:
    """The config that `config_to_json` wrote; `CheckpointError` names `source` and what is wrong."""
    try:
        table = json.loads(text)
        if not isinstance(table, dict):
            raise TypeError(f"a JSON object is expected, got {type(table).__name__}")
        return ModelConfig.from_dict(table, source)
    except (ValueError, TypeError) as error:  # a ConfigError is a ValueError
        raise CheckpointError(f"{source} does not hold a kvjax config: {error}") from error


def _check_architecture(family: Family, fields: Fields) -> None:
    """`architectures`, where it is there, must be the causal language model."""
    names = fields.table.get("architectures")
    if names is not None and (
        not isinstance(names, list) or [str(n).lower() for n in names] != [family.architecture.lower()]
    ):
        raise fields.wrong("architectures", f"[{family.architecture!r}] for model_type {family.model_type!r}")


def _check_rope(config: ModelConfig, source: str) -> None:
    """Numbers that are each allowed can still make rotary frequencies that are none."""
    scaling = config.rope_scaling
    if scaling.kind == "longrope":
        for name in ("short_factor", "long_factor"):
            if len(getattr(scaling, name)) != config.rotary_width // 2:
                raise CheckpointError(
                    f"{source}: {name} must be a list of {config.rotary_width // 2} numbers, one per pair of channels "
                    f"that turns, got {len(getattr(scaling, name))}"
                )
    try:
        finite = bool(np.isfinite(_frequencies(config)).all())
    except (ArithmeticError, ValueError):
        finite = False
    if not finite:
        raise CheckpointError(
            f"{source}: rope_theta {config.rope_theta} with {config.rope_scaling} gives no finite rotary frequencies; "
            "correct the rope fields"
        )


def _frequencies(config: ModelConfig) -> np.ndarray:
    """What the rotary fields come to: radians per position, and last the factor on cos and sin."""
    with np.errstate(all="ignore"):
        frequencies, factor = inverse_frequencies(config.rotary_width, config.rope_theta, config.rope_scaling)
    return np.append(frequencies, factor)


def _kv_heads(family: Family, fields: Fields, heads: int) -> int:
    """An explicit null means as many as query heads, an absent field what the family says."""
    absent = family.kv_heads if "num_key_value_heads" not in fields.table else None
    return int(fields.integer("num_key_value_heads", absent or heads))


def _head_dim(family: Family, fields: Fields) -> int | None:
    """Likewise; None lets `ModelConfig` divide."""
    absent = family.head_dim if "head_dim" not in fields.table else None
    value = fields.integer("head_dim", absent)
    return None if value is None else int(value)


def _activation(family: Family, fields: Fields) -> str:
    """The gate's activation. Gemma names it in a field of its own, beside which `hidden_act` may stand too."""
    given = {}
    for name in {family.activation_field: None, "hidden_act": None}:
        value = fields.table.get(name)
        if value is not None and not (isinstance(value, str) and value in ACTIVATIONS):
            raise fields.wrong(name, " or ".join(f'"{name}"' for name in ACTIVATIONS))
        given[name] = family.activation if value is None else ACTIVATIONS[value]
    chosen = given[family.activation_field]
    if fields.table.get("hidden_act") is not None and given["hidden_act"] != chosen:
        raise fields.wrong("hidden_act", f"what {family.activation_field} says, {chosen}")
    return chosen


def _write_activation(config: ModelConfig, family: Family, extra: dict[str, Any]) -> dict[str, Any]:
    """The fields that `_activation` reads, under the name that was read where it still is true."""
    usual = next(name for name, activation in ACTIVATIONS.items() if activation == config.activation)
    names = {family.activation_field: None} | ({"hidden_act": None} if extra.get("hidden_act") else {})
    return {name: extra[name] if ACTIVATIONS.get(extra.get(name, "")) == config.activation else usual for name in names}


def _bos(family: Family, fields: Fields) -> int | None:
    """The token a text begins with."""
    ids = fields.token_ids("bos_token_id", _as_ids(family.bos_token_id))
    if len(ids) > 1:
        raise fields.wrong("bos_token_id", "one token id or null")
    return ids[0] if ids else None


def _as_ids(token: int | None) -> tuple[int, ...]:
    return () if token is None else (token,)


def _dtype(document: dict[str, Any]) -> str:
    """What the document says the weights are; the weights themselves decide in the end."""
    name = str(document.get("dtype") or document.get("torch_dtype")).removeprefix("torch.")
    return name if name in ("float32", "bfloat16", "float16") else "float32"


def _check_said(config: ModelConfig, document: dict[str, Any]) -> None:
    """Reads the document back: whatever comes out differently, this family cannot say."""
    again = read_config(document, "the config.json to be written")
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(config, field.name), getattr(again, field.name)
        if field.name not in _SAID_OTHERWISE and not _equal(ours, theirs):
            raise _unsayable(config, field.name, theirs)
    if not np.allclose(_frequencies(config), _frequencies(again), rtol=1e-6, atol=0):
        raise _unsayable(config, "rope_scaling", again.rope_scaling)


def _equal(ours: Any, theirs: Any) -> bool:
    """Whether two values are one, or floats that differ by the rounding of a formula and its inverse."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-12)
    return bool(ours == theirs)


def _unsayable(config: ModelConfig, name: str, theirs: Any) -> CheckpointError:
    """The error for a field that is lost in writing."""
    return CheckpointError(
        f"ModelConfig.{name}={getattr(config, name)!r} cannot be written as model_type {config.family!r} (it would be "
        f'read back as {theirs!r}); save with format="orbax", or choose another family'
    )
