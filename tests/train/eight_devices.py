"""Run by test_sharding.py with eight virtual CPU devices: prints what it observed as JSON.

`eight_devices.py FOLDER` observes everything; without a folder, three steps on one mesh.
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

from kvjax.cache.codecs import Int8
from kvjax.cache.config import CacheConfig
from kvjax.cache.policies import StreamingLLM
from kvjax.checkpoint import load
from kvjax.config import MeshConfig, ModelConfig
from kvjax.errors import ConfigError
from kvjax.model import Model, init
from kvjax.train import Every, LoRA, Told, finetune
from kvjax.train.decode_loss import decode_loss

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
)
TOKENS = np.tile(np.random.default_rng(0).integers(0, 32, (16, 2)), (1, 8)).astype(np.int32)
STEPS = 20
MESHES = {
    "dp": MeshConfig(("data",), (8,)),
    "fsdp": MeshConfig(("fsdp",), (8,)),
    "tp": MeshConfig(("tensor",), (4,)),
    "dp x fsdp x tp": MeshConfig(("data", "fsdp", "tensor"), (2, 2, 2)),
}


def trained(mesh: MeshConfig | None, config: ModelConfig = CONFIG, **options: Any) -> tuple[Model, list[float]]:
    """The model and its losses."""
    losses: list[float] = []

    def note(told: Told) -> None:
        losses.append(told.numbers["loss"])

    settings: dict[str, Any] = dict(steps=STEPS, batch_size=8, learning_rate=1e-3, mesh=mesh, report=note)
    return finetune(init(config, dtype=jnp.float32), TOKENS, **{**settings, **options}), losses


def apart(ours: Model, theirs: Model) -> float:
    """The largest difference of any weight."""
    differences = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), ours.params, theirs.params)
    return float(max(jax.tree.leaves(differences)))


def device_share(model: Model) -> float:
    """The part of the weights that lies on the first device."""
    first, leaves = jax.devices()[0], jax.tree.leaves(model.params)
    here = sum(s.data.nbytes for x in leaves for s in x.addressable_shards if s.device == first)
    return here / sum(leaf.nbytes for leaf in leaves)


def compared(mesh: MeshConfig, plain: Model, losses: list[float], **options: Any) -> dict[str, float]:
    """Training on a mesh beside that on one device."""
    model, found = trained(mesh, **options)
    return {
        "losses": float(np.abs(np.subtract(losses, found)).max()),
        "weights": apart(model, plain),
        "share": device_share(model),
    }


def brief() -> dict[str, Any]:
    """A few steps of one layer on a mesh of all axes."""
    options: dict[str, Any] = dict(config=dataclasses.replace(CONFIG, num_layers=1), steps=3)
    return compared(MESHES["dp x fsdp x tp"], *trained(None, **options), **options)


def main(folder: Path) -> dict[str, Any]:
    """Everything that is observed."""
    seen: dict[str, Any] = {}
    plain, losses = trained(None)
    for name, mesh in MESHES.items():
        seen[name] = compared(mesh, plain, losses)
    options = dict(trainable=LoRA(rank=2), accumulate=2, scan=True)
    one, losses = trained(None, **options)
    seen["adapters"] = compared(MeshConfig(("fsdp", "tensor"), (2, 2)), one, losses, **options)
    # What attention reads is coded: windows, sinks and codes are split by the compiler as plain products are.
    cache = dict(through=CacheConfig(policy=StreamingLLM(2, 6), codec=Int8()))
    seen["through a cache"] = compared(MESHES["dp x fsdp x tp"], *trained(None, **cache), **cache)
    stacked, _ = trained(MESHES["fsdp"], scan=True, steps=2, run=folder / "stacked")
    on_mesh = load(folder / "stacked", mesh=MeshConfig(("data", "tensor"), (4, 2)))
    seen["stacked"] = {"loaded": apart(on_mesh, stacked), "share": device_share(on_mesh)}
    left = iter([False] * 9)
    trained(MESHES["fsdp"], run=folder / "run", every=Every(save=5), stopped=lambda: next(left, True))
    told: list[float] = []

    def measure(model: Model) -> dict[str, float]:
        told.append(decode_loss(model, TOKENS[:2], batch=2))
        return {"held_out": told[-1]}

    again = dict(run=folder / "run", every=Every(save=5))
    model, rest = trained(MESHES["dp x fsdp x tp"], **again, evaluate=measure)
    seen["moved"] = {"steps": len(rest), "weights": apart(model, plain), "loaded": apart(load(folder / "run"), model)}
    seen["measured"] = abs(told[-1] - decode_loss(plain, TOKENS[:2], batch=2))
    try:
        trained(MESHES["dp"], batch_size=4)
    except ConfigError as error:
        seen["refused"] = str(error)
    return seen


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1])) if len(sys.argv) > 1 else brief()))
