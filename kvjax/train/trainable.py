"""Which weights are trained: all, attention's, or low-rank adapters beside them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kvjax.errors import ConfigError
from kvjax.train.settings import LoRA
from kvjax.typing import Params

ATTENTION = {"attention", "bridge"}
"""Parts of a path that mean attention; a bridge makes the keys and values of a cross-decoder."""


def split(params: Params, trainable: str | LoRA, seed: int = 0) -> tuple[Params, Params]:
    """(what is trained, in float32; what stays as it is): `kvjax.convert.adapters.joined` puts both together.

    Adapters start as A ~ normal of 1/sqrt(in) and B = 0, so that the model starts as itself.

    Raises:
      ConfigError: nothing would be trained, or an adapter would have a higher rank than its weight.
    """
    if isinstance(trainable, LoRA):
        return _adapters(params, trainable, jax.random.key(seed)), params
    if trainable == "all":
        # A copy: training gives its buffers away.
        return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params), {}
    trained, frozen = _parted(params, inside=False)
    if not trained:
        raise ConfigError('trainable="attention": this model has no attention; train "all"')
    return trained, frozen


def _parted(params: Params, inside: bool) -> tuple[Params, Params]:
    """The subtrees of attention, and the others."""
    trained: Params = {}
    frozen: Params = {}
    for name, part in params.items():
        within = inside or name in ATTENTION
        if isinstance(part, dict):
            one, other = _parted(part, within)
            trained |= {name: one} if one else {}
            frozen |= {name: other} if other else {}
        elif within:
            trained[name] = jnp.array(part, jnp.float32, copy=True)
        else:
            frozen[name] = part
    return trained, frozen


def _adapters(params: Params, lora: LoRA, key: jax.Array) -> Params:
    """A and B for every target."""
    found: dict[tuple[str, ...], Any] = {}
    names: set[str] = set()
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        *module, name = (part.key for part in keys)
        if name != "weight":
            continue
        names.add(module[-1])
        if module[-1] in lora.targets:
            found[tuple(module)] = leaf
    if not found:
        raise ConfigError(f"LoRA.targets {lora.targets} names no module of this model; it has: {sorted(names)}")
    trained: Params = {}
    for number, (path, weight) in enumerate(sorted(found.items(), key=lambda item: item[0])):
        *lead, rows, columns = weight.shape
        if lora.rank > min(rows, columns):
            raise ConfigError(
                f"LoRA.rank {lora.rank} is more than {'/'.join(path)} has: [{rows}, {columns}]; take "
                f"{min(rows, columns)} or less"
            )
        place = trained
        for part in path:
            place = place.setdefault(part, {})
        drawn = jax.random.normal(jax.random.fold_in(key, number), (*lead, lora.rank, columns), jnp.float32)
        place["a"] = drawn * columns**-0.5
        place["b"] = jnp.zeros((*lead, rows, lora.rank), jnp.float32)
    return trained
