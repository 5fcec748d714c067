"""`config.json` of a Hugging Face directory to a `ModelConfig`, and back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np

from kvjax.config import ModelConfig
from kvjax.convert.families import Family, family_of
from kvjax.convert.hf_fields import Fields
from kvjax.convert.hf_rope import read_rope, write_rope
from kvjax.errors import CheckpointError, ConfigError
from kvjax.models.rotary import inverse_frequencies

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1, 1.0),
    "quantization_config": (),
    "compression_config": (),
    "per_layer_config": ({},),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
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
    "rope_interleaved": (False,),
}
"""Fields that would change what the model computes, and the values (beside null) under which they do not."""

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
        if value is not None and value not in harmless:
            allowed = " or ".join(json.dumps(v) for v in harmless) or "null"
            raise fields.wrong(name, f"{allowed} (kvjax does nothing else)")
    # A damaged number of layers would otherwise be found only after describing each of them.
    layers, heads = fields.integer("num_hidden_layers", most=MAX_LAYERS), fields.integer("num_attention_heads")
    context = fields.integer("max_position_embeddings", family.max_position_embeddings)
    biased = fields.flag("attention_bias") if family.biases == "config" else False
    extra = {name: value for name, value in document.items() if name not in _REWRITTEN}
    try:
        theta, scaling = read_rope(document, context, source)
        config = ModelConfig(
            family=family.model_type,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=_kv_heads(family, fields, heads),
            head_dim=_head_dim(family, fields),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            qkv_bias=biased or family.biases == "qkv",
            o_bias=biased,
            mlp_bias=family.mlp_bias and fields.flag("mlp_bias"),
            qk_norm=family.qk_norm,
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            windows=_windows(family, fields, layers),
            max_position_embeddings=context,
            dtype=_dtype(document),
            bos_token_id=_bos(family, fields),
            eos_token_ids=fields.token_ids("eos_token_id", _as_ids(family.eos_token_id)),
            extra=json.dumps(extra, sort_keys=True),
        )
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from error
    _check_rope(config, source)
    return config


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
        "hidden_act": "silu",
        **extra,
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
        **write_rope(config, as_parameters=bool(extra.get("rope_parameters"))),
        **_write_windows(config, family, extra),
    }
    if family.biases == "config":
        document["attention_bias"] = config.o_bias
    if family.mlp_bias:
        document["mlp_bias"] = config.mlp_bias
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
    try:
        with np.errstate(all="ignore"):
            frequencies, _ = inverse_frequencies(config.width, config.rope_theta, config.rope_scaling)
        finite = bool(np.isfinite(frequencies).all())
    except (ArithmeticError, ValueError):
        finite = False
    if not finite:
        raise CheckpointError(
            f"{source}: rope_theta {config.rope_theta} with {config.rope_scaling} gives no finite rotary frequencies; "
            "correct the rope fields"
        )


def _kv_heads(family: Family, fields: Fields, heads: int) -> int:
    """An explicit null means as many as query heads, an absent field what the family says."""
    absent = family.kv_heads if "num_key_value_heads" not in fields.table else None
    return int(fields.integer("num_key_value_heads", absent or heads))


def _head_dim(family: Family, fields: Fields) -> int | None:
    """Likewise; None lets `ModelConfig` divide."""
    absent = family.head_dim if "head_dim" not in fields.table else None
    value = fields.integer("head_dim", absent)
    return None if value is None else int(value)


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


def _windows(family: Family, fields: Fields, layers: int) -> tuple[int | None, ...]:
    """Per layer, how many positions it sees."""
    types = fields.table.get("layer_types")
    if types is not None and (not isinstance(types, list) or len(types) != layers):
        raise fields.wrong("layer_types", f"a list of {layers} entries, one per layer")
    for name in set(types or ()) - {"full_attention", "sliding_attention"}:
        raise CheckpointError(
            f"{fields.source}: layer_types holds {name!r}; allowed: 'full_attention' and 'sliding_attention'"
        )
    on = family.windows == "every" or (family.windows == "by_layer" and fields.flag("use_sliding_window"))
    window = fields.integer("sliding_window", 4096) if on else None
    if "sliding_window" in fields.table and fields.table["sliding_window"] is None:
        window = None  # an absent window has a default, an explicit null is none
    first = 0
    if family.windows == "by_layer" and window is not None and types is None:
        first = fields.integer("max_window_layers", 28, least=0)
    windows = tuple(window if index >= first else None for index in range(layers))
    if types is None:
        return windows
    by_type = tuple(window if name == "sliding_attention" else None for name in types)
    if "sliding_attention" in types and window is None:
        raise CheckpointError(f"{fields.source}: layer_types has sliding layers, but sliding_window is off or null")
    if family.windows != "by_layer" and by_type != windows:
        raise CheckpointError(
            f"{fields.source}: layer_types contradicts sliding_window, which holds for every layer of model_type "
            f"{family.model_type!r}; remove layer_types"
        )
    return by_type


def _write_windows(config: ModelConfig, family: Family, extra: dict[str, Any]) -> dict[str, Any]:
    """The fields that `_windows` reads; a switched-off `sliding_window` stays as it was."""
    windows = config.windows
    sizes = [w for w in windows if w is not None]
    if family.windows == "none":
        return {}
    if family.windows == "every":
        return {"sliding_window": sizes[0] if sizes else None}
    types = ["full_attention" if w is None else "sliding_attention" for w in windows]
    if not sizes:
        return {"use_sliding_window": False, **({"layer_types": types} if "layer_types" in extra else {})}
    return {
        "use_sliding_window": True,
        "sliding_window": sizes[0],
        # Readers older than layer_types know only a number of unwindowed layers in front.
        "max_window_layers": types.index("sliding_attention"),
        "layer_types": types,
    }


def _check_said(config: ModelConfig, document: dict[str, Any]) -> None:
    """Reads the document back: whatever comes out differently, this family cannot say."""
    again = read_config(document, "the config.json to be written")
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(config, field.name), getattr(again, field.name)
        if field.name not in _SAID_OTHERWISE and ours != theirs:
            raise CheckpointError(
                f"ModelConfig.{field.name}={ours!r} cannot be written as model_type {config.family!r} (it would be "
                f'read back as {theirs!r}); save with format="orbax", or choose another family'
            )
