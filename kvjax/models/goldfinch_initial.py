"""What a GoldFinch is trained from: the published starting values, leaf by leaf (2407.12077 and its code)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvjax.config import ModelConfig

SILENT = ("o", "value", "receptance")
"""Weights that start at zero, so that a layer starts by changing nothing."""


def initial(config: ModelConfig, path: tuple[str, ...], shape: tuple[int, ...], key: jax.Array) -> jax.Array:
    """float32 starting values of the parameter at `path`, e.g. ("layers_3", "time_mix", "shift_down").

    Embeddings lie within 1e-4, matrices are orthogonal and those that leave a layer zero, low ranks have no effect yet.
    How much of its predecessor a token takes falls with the channel.
    """
    *modules, leaf = path
    module = modules[-1]
    layer = int(path[0].removeprefix("layers_")) if path[0].startswith("layers_") else 0
    if leaf == "embedding":
        return jax.random.uniform(key, shape, jnp.float32, -1e-4, 1e-4)
    if leaf == "bias" or leaf.endswith("_down") or (leaf == "weight" and module in SILENT):
        return jnp.zeros(shape, jnp.float32)
    if leaf.endswith("_up"):
        return jax.random.uniform(key, shape, jnp.float32, -0.01, 0.01)
    if leaf == "scale":
        before_output = modules[1:] in (["time_mix", "norm"], ["attention", "out_norm"])
        return jnp.full(shape, ((1 + layer) / config.num_layers) ** 0.7 if before_output else 1.0, jnp.float32)
    if leaf == "weight":
        gain = 0.1 if modules[1:] == ["time_mix", "k"] else 1.0
        if module == "head":
            gain = 0.5 * max(config.vocab_size / config.hidden_size, 1.0) ** 0.5
        return jax.nn.initializers.orthogonal(gain)(key, shape, jnp.float32)
    depth = layer / (config.num_layers - 1)
    channel = jnp.arange(shape[-1], dtype=jnp.float32)
    if leaf == "decay":
        return -6.0 + 5.0 * (channel / (shape[-1] - 1)) ** (0.7 + 1.3 * depth)
    return _taken(config, path, channel / shape[-1], layer, depth).reshape(shape)


def _taken(config: ModelConfig, path: tuple[str, ...], channel: jax.Array, layer: int, depth: float) -> jax.Array:
    """How much of its predecessor a token takes: [purposes, hidden], channel in [0, 1)."""
    left = 1.0 - layer / config.num_layers
    plain = 1.0 - channel**left
    sharp, late = 1.0 - channel ** (0.5 * left), plain - 0.3 * depth
    purposes: dict[tuple[str, ...], tuple[jax.Array, ...]] = {
        ("time_mix", "shift"): (sharp, plain, late, plain, late),
        ("attention", "shift"): (sharp,),
        ("attention", "source_shift"): (plain, late),
        ("channel_mix", "shift"): (plain, plain),
    }
    return jnp.stack(purposes.get(path[1:], (plain,)))
