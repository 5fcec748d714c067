"""Fewer key-value heads: MHA or GQA to GQA or MQA (Ainslie et al. 2023, 2305.13245)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np

from kvjax.config import ModelConfig
from kvjax.convert import svd_merging
from kvjax.convert.calibration import checked_calibration, losses, moments_of, wide
from kvjax.convert.plain import changed, check_plain, checked_integer
from kvjax.convert.principal import share_of_groups
from kvjax.convert.report import Energy, Report, report
from kvjax.errors import ConfigError
from kvjax.model import Model
from kvjax.typing import Params

METHODS = ("mean", "svd")


def to_gqa(model: Model, kv_heads: int, method: Literal["mean", "svd"] = "mean", calibration: Any = None) -> Model:
    """A model with fewer key-value heads, each made of as many neighbouring ones; 1 is MQA (Shazeer 2019, 1911.02150).

    "mean" averages the weights of each group's heads (Ainslie et al. 2023, 2305.13245, section 2.1): another model of
    the same family, written as such; it is to be trained on. "svd" projects each group's keys, after RoPE, and values
    to the directions in which they are strongest (Yu et al. 2024, 2406.07056): it loses less, but keeps a small matrix
    per group in the layer, which no Hugging Face family has: `kvjax.save` writes it as orbax.

    As many heads as there are: the model itself.

    Args:
      kv_heads: 1 to the model's num_kv_heads, which it must divide.
      calibration: int32[N, T], text by which "svd" finds directions; some thousand tokens do. None: from the weights
        alone, which loses more.

    Raises:
      ConfigError: kv_heads or method is none of these, the calibration is no text of this model, or the model has no
        plain keys and values to merge.
    """
    return convert(model, kv_heads, method, calibration)[0]


def convert(
    model: Model, kv_heads: int, method: Literal["mean", "svd"] = "mean", calibration: Any = None
) -> tuple[Model, Report]:
    """`to_gqa`, and what it did."""
    check_plain(model, "to_gqa")
    if method not in METHODS:
        raise ConfigError(f"to_gqa method must be one of {', '.join(METHODS)}, got {method!r}")
    held = model.config.num_kv_heads
    rule = f"1 to the model's num_kv_heads {held}, and divide it"
    kv_heads = checked_integer("to_gqa kv_heads", kv_heads, rule, lambda n: 1 <= n <= held and held % n == 0)
    tokens = checked_calibration(model, calibration)
    if kv_heads == held:
        after, energies = model, [Energy()] * model.config.num_layers
    elif method == "svd":
        after, energies = svd_merging.merged(model, kv_heads, tokens)
    else:
        after, energies = _pooled(model, kv_heads, tokens)
    what = f"GQA, {kv_heads} of {held} key-value heads, by {'SVD' if method == 'svd' else 'mean pooling'}"
    found = report(what, energies, model.config, after.config, losses(model, after, tokens))
    return after, found


def _pooled(model: Model, kv_heads: int, tokens: np.ndarray | None) -> tuple[Model, list[Energy]]:
    """Means over contiguous groups."""
    config = dataclasses.replace(model.config, num_kv_heads=kv_heads)
    layers = [
        pool(model.params[f"layers_{layer}"]["attention"], model.config, kv_heads) for layer in range(config.num_layers)
    ]
    count = model.config.num_kv_heads // kv_heads
    # A mean of keys, after RoPE or before, is their projection to what all heads have in common.
    common = np.tile(np.eye(config.width), (count, 1)) / count**0.5
    energies = [
        Energy(*(share_of_groups(part, common) for part in each if part is not None))
        for each in moments_of(model, tokens, kv_heads)
    ]
    return changed(model, config, layers), energies


def pool(attention: Params, config: ModelConfig, kv_heads: int) -> Params:
    """Keys' and values' weights and biases of one layer, and a norm over all heads, as means over contiguous groups."""

    def mean(x: Any) -> np.ndarray:
        """[heads * D, ...] -> [kv_heads * D, ...]."""
        x = wide(x)
        groups = x.reshape(kv_heads, -1, config.width, *x.shape[1:])
        return groups.mean(axis=1).reshape(-1, *x.shape[1:])

    names = ("k", "v", "k_norm") if config.qk_norm_whole else ("k", "v")
    return {name: {leaf: mean(x) for leaf, x in attention[name].items()} for name in names}
