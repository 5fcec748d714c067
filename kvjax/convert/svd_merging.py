"""Key-value heads merged along their strongest directions (Yu et al. 2024, 2406.07056).

The keys of a group's t heads, side by side, span t D columns; what is kept of them is their projection to the D in
which they are strongest. Keys are projected after RoPE, by a matrix that stays in the layer: RoPE turns pairs of
columns, and a projection that mixes pairs does not commute with it. Values have no such trouble: their projection
folds into the weights before and behind.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from kvjax.config import ModelConfig
from kvjax.convert.calibration import Moments, moments_of, wide
from kvjax.convert.plain import changed
from kvjax.convert.principal import principal, share_of_groups
from kvjax.convert.report import Energy
from kvjax.model import Model
from kvjax.typing import Params


def merged(model: Model, kv_heads: int, tokens: np.ndarray | None) -> tuple[Model, list[Energy]]:
    """The model with `kv_heads` heads, and what each layer keeps. tokens: int32[N, T], None: from the weights alone."""
    config = dataclasses.replace(model.config, num_kv_heads=kv_heads, merged_keys=model.config.num_kv_heads)
    layers, energies = [], []
    for layer, moments in enumerate(moments_of(model, tokens, kv_heads)):
        parts, energy = merged_layer(model.params[f"layers_{layer}"]["attention"], config, moments)
        layers.append(parts)
        energies.append(energy)
    return changed(model, config, layers), energies


def merged_layer(attention: Params, config: ModelConfig, moments: Moments) -> tuple[Params, Energy]:
    """One layer's new weights. config: the new one; moments: of its groups."""
    assert moments.values is not None
    groups, width = config.num_kv_heads, config.width
    count = config.key_heads // groups
    keys, values = (np.stack([principal(part, width) for part in parts]) for parts in (moments.keys, moments.values))
    blocks = values.reshape(groups, count, width, width)

    def folded(x: np.ndarray) -> np.ndarray:
        """Projected values: [key_heads * D, ...] -> [groups * D, ...]."""
        stacked = x.reshape(groups, count * width, -1)
        return np.einsum("gnr,gnx->grx", values, stacked, optimize=True).reshape(groups * width, *x.shape[1:])

    out = wide(attention["o"]["weight"]).reshape(-1, groups, count, config.num_heads // config.key_heads, width)
    out = np.einsum("ogthd,gtde->ogthe", out, blocks, optimize=True)
    parts = {
        "key_merge": {"weight": keys.reshape(groups, count, width, width)},
        "v": {leaf: folded(wide(x)) for leaf, x in attention["v"].items()},
        "o": {**attention["o"], "weight": out.reshape(out.shape[0], -1)},
    }
    return parts, Energy(share_of_groups(moments.keys, keys), share_of_groups(moments.values, values))
