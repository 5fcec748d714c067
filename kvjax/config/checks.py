"""What fields of a model's config must be, each and together."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from kvjax.config.layers import GoldFinch
from kvjax.errors import ConfigError

if TYPE_CHECKING:
    from kvjax.config.model import ModelConfig


def check_choices(config: ModelConfig) -> None:
    """Fields with few allowed values, and factors."""
    choices = {
        "activation": ("silu", "gelu", "gelu_tanh"),
        "norm_placement": ("pre", "post", "sandwich"),
    }
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {getattr(config, name)!r}")
    for name in ("query_scale", "attention_soft_cap", "logit_soft_cap", "local_rope_theta", "embedding_scale"):
        value = getattr(config, name)
        if value is not None and (not math.isfinite(value) or value <= 0):
            raise ConfigError(f"{name} must be a finite positive number, got {value!r}")
    if not 0 < config.rotary_fraction <= 1 or config.rotary_width % 2 or config.rotary_width == 0:
        raise ConfigError(
            f"rotary_fraction must be in (0, 1] and turn an even number of channels, got {config.rotary_fraction} of "
            f"{config.width}"
        )
    if config.latent is not None:
        names = ("qk_norm", "qk_norm_whole", "rotary_fraction", "rope_interleaved", "local_rope_theta")
        plain = {field.name: field.default for field in dataclasses.fields(config)}
        given = [name for name in (*names, "attention_sinks") if getattr(config, name) != plain[name]]
        if given:
            raise ConfigError(
                f"latent attention has norms and rotated channels of its own, and no sinks: drop {', '.join(given)}"
            )
    if config.qk_norm and config.qk_norm_whole:
        raise ConfigError("qk_norm and qk_norm_whole exclude each other")
    for layer in config.experts.dense_layers if config.experts else ():
        if not 0 <= layer < config.num_layers:
            raise ConfigError(f"experts.dense_layers names layer {layer} of {config.num_layers}")


def checked_owners(config: ModelConfig) -> tuple[int, ...]:
    """Every layer's owner (-1: it has no keys), or () where each has its own.

    Owners are earlier layers, own themselves, and see as far as their readers. A cross-decoder, retention layers and
    GoldFinch say themselves who owns what.
    """
    if config.goldfinch is not None:
        return _of_goldfinch(config, config.goldfinch)
    owners = _of_cross_decoder(config)
    if owners in ((), tuple(range(config.num_layers))):
        return ()
    if len(owners) != config.num_layers:
        raise ConfigError(f"owners has {len(owners)} entries for {config.num_layers} layers")
    for layer, owner in enumerate(owners):
        if layer in config.retention_layers:
            continue
        if not 0 <= owner <= layer or owners[owner] != owner:
            raise ConfigError(
                f"owners[{layer}] is {owner}; it must be the layer itself or an earlier one that owns itself"
            )
        if config.windows[layer] != config.windows[owner]:
            raise ConfigError(
                f"layer {layer} sees {config.windows[layer]} positions and reads layer {owner}, which sees "
                f"{config.windows[owner]}; layers that share keys and values must have the same window"
            )
    if config.latent is not None:
        raise ConfigError("owners with latent attention is not implemented; give every layer its own latent")
    return owners


def _of_cross_decoder(config: ModelConfig) -> tuple[int, ...]:
    """What cross_from and retention_layers mean; without them, what is given."""
    if config.cross_from is None and not config.retention_layers:
        return config.owners
    first = config.num_layers if config.cross_from is None else config.cross_from
    if config.cross_from is not None and not 0 < first < config.num_layers:
        raise ConfigError(f"cross_from must be 1 to {config.num_layers - 1}, got {config.cross_from}")
    wrong = [layer for layer in config.retention_layers if not 0 <= layer < first]
    if wrong:
        raise ConfigError(f"retention_layers names layer {wrong[0]}; allowed: 0 to {first - 1}")
    if len(config.retention_layers) == config.num_layers:
        raise ConfigError("retention_layers names every layer; at least one must have keys and values to cache")
    if config.latent is not None or any(config.windows[first:]):
        raise ConfigError("a cross-decoder has neither latent attention nor windows")
    owners = tuple(-1 if layer in config.retention_layers else min(layer, first) for layer in range(config.num_layers))
    if config.owners not in ((), owners):
        raise ConfigError(f"owners {config.owners} contradicts cross_from and retention_layers, which mean {owners}")
    return owners


def _of_goldfinch(config: ModelConfig, goldfinch: GoldFinch) -> tuple[int, ...]:
    """Its layers are of kinds of their own: what shapes others does not apply."""
    foreign = (
        *("latent", "experts", "retention_layers", "cross_from", "qkv_bias", "o_bias", "mlp_bias", "qk_norm"),
        *("qk_norm_whole", "activation", "norm_placement", "norm_unit_offset", "embedding_scale", "query_scale"),
        *("attention_soft_cap", "attention_sinks", "rotary_fraction", "local_rope_theta"),
    )
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in foreign:
        if getattr(config, name) != defaults[name]:
            raise ConfigError(f"a model with goldfinch takes no {name}, got {getattr(config, name)!r}; leave it out")
    if any(config.windows):
        raise ConfigError(f"goldfinch rebuilds keys from every token: it takes no windows, got {config.windows}")
    if not goldfinch.lower_layers < config.num_layers:
        raise ConfigError(
            f"goldfinch lower_layers must be 1 to {config.num_layers - 1}, of {config.num_layers} layers, got "
            f"{goldfinch.lower_layers}"
        )
    if config.num_kv_heads != config.num_heads or config.num_heads * config.width != config.hidden_size:
        raise ConfigError(
            "goldfinch needs num_kv_heads equal to num_heads, and heads that make up hidden_size "
            f"{config.hidden_size}; got {config.num_kv_heads} and {config.num_heads} of {config.width}"
        )
    if config.hidden_size % goldfinch.compression:
        raise ConfigError(
            f"goldfinch compression must divide hidden_size {config.hidden_size}, got {goldfinch.compression}"
        )
    if goldfinch.rope and not config.rope_interleaved:
        raise ConfigError("goldfinch with rope turns neighbouring channels together: set rope_interleaved=True too")
    first = goldfinch.lower_layers
    owners = (-1,) * first + (first,) * (config.num_layers - first)
    if config.owners not in ((), owners):
        raise ConfigError(f"owners {config.owners} contradicts goldfinch, which means {owners}")
    return owners


def check_encoder(config: ModelConfig) -> None:
    """Which decoders an encoder can serve, and what an encoder may be."""
    e = config.encoder
    if e is None:
        if config.cross_layers is not None:
            raise ConfigError(f"cross_layers={config.cross_layers} needs an encoder; give one or drop cross_layers")
        return
    if not isinstance(e, type(config)):
        raise ConfigError(f"encoder must be a ModelConfig or None, got {e!r:.80}")
    for name, most in (("context_chunk", e.max_position_embeddings), ("cross_layers", config.num_layers)):
        value = getattr(config, name)
        left_out = value is None and name == "cross_layers"
        if not left_out and (not isinstance(value, int) or not 1 <= value <= most):
            raise ConfigError(f"{name} must be an integer from 1 to {most}, got {value!r}")
    if config.latent or config.goldfinch or config.cross_from is not None or config.retention_layers:
        raise ConfigError(
            "an encoder serves layers that attend to keys and values: latent attention, goldfinch, cross_from and "
            "retention_layers are not implemented beside it"
        )
    if config.norm_placement != "pre":
        raise ConfigError(
            f"cross-attention normalises what it reads: with an encoder norm_placement must be 'pre', got "
            f"{config.norm_placement!r}"
        )
    if e.encoder or e.latent or e.goldfinch or e.owners or any(e.windows):
        raise ConfigError(
            "an encoder's layers are plain and see the whole chunk: drop its own encoder, latent attention, "
            "goldfinch, owners, cross_from, retention_layers and windows"
        )


def check_merged_keys(config: ModelConfig) -> None:
    """Which models may merge key heads after RoPE."""
    merged = config.merged_keys
    if merged is None:
        return
    if not isinstance(merged, int) or merged <= 0 or merged % config.num_kv_heads or config.num_heads % merged:
        raise ConfigError(
            f"merged_keys must be a multiple of num_kv_heads {config.num_kv_heads} and divide num_heads "
            f"{config.num_heads}, got {merged!r}"
        )
    given = [name for name in ("latent", "goldfinch", "owners", "encoder") if getattr(config, name)]
    if given:
        raise ConfigError(
            f"merged_keys merges the key heads of a layer that has its own: it goes with no {', '.join(given)}; drop "
            "one of them"
        )
