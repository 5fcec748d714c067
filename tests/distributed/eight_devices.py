"""Run by test_sharded_checkpoints.py with eight virtual CPU devices: prints what it observed as JSON.

The number of devices is fixed when jax starts, so this needs a process of its own; one process serves all tests.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.attention.dense import DenseAttend
from kvjax.checkpoint import load, save
from kvjax.config import MeshConfig
from kvjax.distributed import make_mesh, parameter_shardings
from kvjax.errors import ConfigError
from kvjax.model import Model
from kvjax.models import Decoder

MESHES = {"2x4": MeshConfig(("data", "tensor"), (2, -1)), "1x2": MeshConfig(("data", "tensor"), (1, 2))}


def logits(model: Model, tokens: jax.Array) -> np.ndarray:
    module = Decoder(model.config, DenseAttend())
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    @jax.jit
    def run(params: Any) -> jax.Array:
        hidden, _ = module.apply({"params": params}, tokens, positions, None)
        return module.apply({"params": params}, hidden, method="logits")

    return np.asarray(run(model.params))


def equal(ours: Model, theirs: Model) -> bool:
    same = jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), ours.params, theirs.params)
    configs = [dataclasses.replace(model.config, extra="{}") for model in (ours, theirs)]
    return configs[0] == configs[1] and all(jax.tree.leaves(same))


def placed_as_promised(model: Model, mesh: MeshConfig) -> bool:
    promised = parameter_shardings(model.config, make_mesh(mesh))
    same = jax.tree.map(lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim), model.params, promised)
    return all(jax.tree.leaves(same))


def device_bytes(model: Model) -> int:
    """Bytes of weights on the first device."""
    first = jax.devices()[0]
    return sum(s.data.nbytes for x in jax.tree.leaves(model.params) for s in x.addressable_shards if s.device == first)


def main(path: Path) -> dict[str, Any]:
    seen: dict[str, Any] = {"devices": jax.device_count()}
    plain = load(path)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, plain.config.vocab_size, (2, 9)), jnp.int32)
    expected = logits(plain, tokens)
    seen["spread"] = float(expected.std())
    seen["plain bytes"] = device_bytes(plain)
    for name, mesh in MESHES.items():
        model = load(path, mesh=mesh)
        seen[f"{name} placed"] = placed_as_promised(model, mesh)
        seen[f"{name} equal"] = equal(model, plain)
        seen[f"{name} logits"] = float(np.abs(logits(model, tokens) - expected).max())
        seen[f"{name} bytes"] = device_bytes(model)
        weight = model.params["layers_0"]["mlp"]["up"]["weight"]
        seen[f"{name} mlp shard"] = weight.addressable_shards[0].data.shape
        if name == "1x2":
            save(model, path.parent / "safetensors", format="safetensors")
            seen["safetensors equal"] = equal(load(path.parent / "safetensors"), plain)
        else:
            save(model, path.parent / "orbax")
    moved = load(path.parent / "orbax", mesh=MESHES["1x2"])
    seen["moved placed"] = placed_as_promised(moved, MESHES["1x2"])
    seen["moved equal"] = equal(moved, plain)
    gathered = load(path.parent / "orbax")
    seen["gathered equal"] = equal(gathered, plain)
    seen["gathered devices"] = len(gathered.params["embed"]["embedding"].devices())
    own = jax.make_mesh((8,), ("data",))  # jax's own default axis types, and no axis the rules name
    replicated = load(path, mesh=own)
    seen["own mesh bytes"] = device_bytes(replicated)
    seen["own mesh logits"] = float(np.abs(logits(replicated, tokens) - expected).max())
    try:
        load(path, mesh=MeshConfig(("tensor",), (8,)))
    except ConfigError as error:
        seen["refused"] = str(error)
    return seen


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
