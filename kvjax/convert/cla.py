"""Layers that share keys and values: cross-layer attention (Brandon et al. 2024, 2405.12981)."""

from __future__ import annotations

import dataclasses
from typing import Any

from kvjax.convert.calibration import checked_calibration, losses
from kvjax.convert.plain import changed, check_plain, checked_integer
from kvjax.convert.report import Energy, Report, report
from kvjax.errors import ConfigError
from kvjax.model import Model


def to_cla(model: Model, share: int = 2) -> Model:
    """A model in which each `share` layers, from the first on, read the keys and values of the first of them.

    Owners keep their weights; readers lose their key and value projections, and read what was made for another layer:
    the model must be trained on before it is of use. Its cache takes ceil(layers / share) / layers of the bytes. No
    Hugging Face family has such layers: `kvjax.save` writes it as orbax. 1: the model itself.

    Args:
      share: layers per set of keys and values; from the number of layers on, one set serves all.

    Raises:
      ConfigError: share is below 1, layers that would share see windows of different sizes, or the model has no keys
        and values of each layer's own.
    """
    return convert(model, share)[0]


def convert(model: Model, share: int = 2, calibration: Any = None) -> tuple[Model, Report]:
    """`to_cla`, and what it did; calibration: int32[N, T], on which losses are measured."""
    check_plain(model, "to_cla")
    rule = "an integer of at least 1 (layers per set of keys and values)"
    share = checked_integer("to_cla share", share, rule, lambda n: n >= 1)
    tokens, config = checked_calibration(model, calibration), model.config
    owners = tuple(layer - layer % share for layer in range(config.num_layers))
    for layer, owner in enumerate(owners):
        if config.windows[layer] != config.windows[owner]:
            raise ConfigError(
                f"to_cla share={share} would have layer {layer}, which sees {config.windows[layer]} positions, read "
                f"layer {owner}, which sees {config.windows[owner]} (None: all); layers that share must see as far: "
                "choose a share within which windows are alike"
            )
    reads = {"k": None, "v": None, "k_norm": None}
    after = model
    if share > 1:
        shared = dataclasses.replace(config, owners=owners)
        after = changed(model, shared, [{} if owner == layer else reads for layer, owner in enumerate(owners)])
    energies = [Energy() if owner == layer else Energy(0.0, 0.0, 0.0) for layer, owner in enumerate(owners)]
    what = f"CLA, {share} layers to a set of keys and values"
    return after, report(what, energies, config, after.config, losses(model, after, tokens))
