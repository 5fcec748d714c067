"""What conversions between kinds of attention ask of a model, and how they put weights back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from kvjax.config import ModelConfig
from kvjax.errors import ConfigError
from kvjax.model import Model
from kvjax.typing import Params

KINDS = {
    "latent": "has latent attention (MLA) already",
    "goldfinch": "rebuilds keys from tokens (GoldFinch)",
    "retention_layers": "has retention layers, which hold no keys",
    "cross_from": "is a cross-decoder (YOCO), whose layers share one set of keys",
    "owners": "shares keys and values across layers (CLA) already",
    "merged_keys": "merges its key heads after RoPE already",
    "encoder": "reads encoded context (CEPE) by its own key-value heads",
}
"""What a model with a field set is, for models whose every layer must have plain keys and values of its own."""


def check_plain(model: Model, conversion: str) -> None:
    """Every layer has keys and values of its own, as projected.

    Raises:
      ConfigError: naming what the model is instead.
    """
    for name, what in KINDS.items():
        if getattr(model.config, name):
            raise ConfigError(
                f"{conversion} takes a model whose layers each have plain keys and values (MHA, GQA or MQA); this one "
                f"{what} ({name}={getattr(model.config, name)!r:.60}); convert the model it was made from"
            )
    if "layers_0" not in model.params:
        raise ConfigError(
            f"{conversion} takes parameters layer by layer (layers_0, ...), got {', '.join(model.params)}; stacked "
            "ones go through kvjax.models.unstack_layers first"
        )


def checked_integer(name: str, value: Any, rule: str, ok: Callable[[int], bool]) -> int:
    """`value` if it is an integer of which `ok` holds; `ConfigError` with the rule otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not ok(int(value)):
        raise ConfigError(f"{name} must be {rule}, got {value!r}")
    return int(value)


def changed(model: Model, config: ModelConfig, attention: list[Params]) -> Model:
    """The model with another config and other attention weights, a table for each layer, in the model's dtype.

    What stays is not copied; what is None goes.
    """
    params = dict(model.params)
    for layer, parts in enumerate(attention):
        old = params[f"layers_{layer}"]
        kept = {name: part for name, part in {**old["attention"], **parts}.items() if part is not None}
        new = {
            name: {leaf: _as_weight(x, model.dtype) for leaf, x in part.items()} if name in parts else part
            for name, part in kept.items()
        }
        params[f"layers_{layer}"] = {**old, "attention": new}
    return dataclasses.replace(model, config=config, params=params)


def _as_weight(x: Any, dtype: Any) -> Any:
    """NumPy float64 rounds once, to the model's dtype."""
    return jnp.asarray(np.asarray(x).astype(dtype)) if isinstance(x, np.ndarray) else x
