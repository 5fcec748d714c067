"""Where a run's arrays lie on a mesh.

Axes by name: rows of a batch are split over "data" and "fsdp", weights and their optimiser's state over "fsdp" (fully
sharded: Rajbhandari et al. 2020, 1910.02054) and "tensor" (heads, the MLP, the vocabulary: 1909.08053).
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvjax.config import ModelConfig
from kvjax.convert.adapters import ADAPTER
from kvjax.distributed import AxisRules, parameter_shardings
from kvjax.errors import ConfigError
from kvjax.partition import HEADS, ROWS
from kvjax.train.batch import Batch
from kvjax.train.run_step import RunState
from kvjax.typing import Params


def rules_of(mesh: Mesh) -> AxisRules:
    """Fully sharded where the mesh has an axis of that name."""
    return AxisRules(embed="fsdp" if "fsdp" in mesh.axis_names else None)


def check_mesh(mesh: Mesh, batch_size: int, accumulate: int) -> None:
    """Raises ConfigError where rows cannot be split evenly, or an axis would be of no use."""
    known = (*ROWS, HEADS)
    for name in mesh.axis_names:
        if name not in known:
            raise ConfigError(f"a mesh for training has axes of {', '.join(known)}; got {name!r}")
    ways = int(np.prod([mesh.shape[name] for name in ROWS if name in mesh.axis_names]))
    if (batch_size // accumulate) % ways:
        raise ConfigError(
            f"batch_size {batch_size} in {accumulate} parts cannot be split {ways} ways over the mesh's data and fsdp "
            f"axes; take a multiple of {ways * accumulate}"
        )


def trained_shardings(trained: Params, whole: Params) -> Params:
    """A sharding per trained weight, out of those of all weights; adapters lie as the weight they adapt."""
    out: Params = {}
    for name, part in trained.items():
        if not isinstance(part, dict):
            out[name] = whole[name]
        elif part.keys() == ADAPTER:
            mesh, spec = whole[name]["weight"].mesh, whole[name]["weight"].spec
            *lead, rows, columns = spec
            out[name] = {
                "a": NamedSharding(mesh, PartitionSpec(*lead, None, columns)),
                "b": NamedSharding(mesh, PartitionSpec(*lead, rows, None)),
            }
        else:
            out[name] = trained_shardings(part, whole[name])
    return out


def state_shardings(
    trained: Params, optimizer: optax.GradientTransformation, config: ModelConfig, mesh: Mesh, scan: bool
) -> RunState:
    """A sharding for every array of a `RunState`: the optimiser's moments lie as their weights."""
    params = trained_shardings(trained, parameter_shardings(config, mesh, rules_of(mesh), scan))
    alone: Any = NamedSharding(mesh, PartitionSpec())
    of_path = {
        _names(path): (leaf.shape, where)
        for (path, leaf), where in zip(
            jax.tree_util.tree_flatten_with_path(trained)[0], jax.tree.leaves(params), strict=True
        )
    }

    def moment(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        shape, where = of_path.get(_names(path), ((), alone))
        return where if shape == leaf.shape else alone

    moments: Any = jax.tree_util.tree_map_with_path(moment, jax.eval_shape(optimizer.init, trained))
    return RunState(params, moments, alone, alone)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The dictionary keys of a path: a moment's are its weight's, whatever optimisers it lies within."""
    return tuple(part.key for part in path if isinstance(part, jax.tree_util.DictKey))


def put_batch(batch: Batch, mesh: Mesh | None) -> Batch:
    """A batch on the device, or its rows over the mesh; every process has the whole batch, and keeps its share."""
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, batch)
    axes = tuple(name for name in ROWS if name in mesh.axis_names)
    sharding = NamedSharding(mesh, PartitionSpec(axes or None))
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch)


def put_weights(params: Params, shardings: Params) -> Params:
    """Weights where training wants them; every process has all of them, or its share of another mesh."""

    def put(leaf: jax.Array, where: NamedSharding) -> jax.Array:
        if where.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
            return jax.device_put(leaf, where)
        # From a device of one process to those of all: by way of the host, and no further than each process's share.
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])

    return jax.tree.map(put, params, shardings)
