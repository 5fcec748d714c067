"""The folder of a training run, as what it is to a reader: a model.

run/kvjax_run.json         the model's config, and what of it is trained
run/base/                  the model it began as, where only a part is trained
run/checkpoints/STEP/      params, rest (optimiser, step, key), data (place in it): written by orbax
run/manifests/STEP.json    size and hash of each file of a finished checkpoint
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from kvjax.config import ModelConfig
from kvjax.convert.adapters import joined
from kvjax.convert.directory import PARAMS_FOLDER
from kvjax.convert.hf_config import config_from_json, config_to_json
from kvjax.convert.manifest import damage
from kvjax.convert.orbax_store import load_orbax
from kvjax.convert.weight_dtypes import parameter_dtype
from kvjax.errors import CheckpointError
from kvjax.model import parameter_shapes
from kvjax.models import unstack_layers
from kvjax.typing import Params

RUN_FILE = "kvjax_run.json"
BASE_FOLDER = "base"
CHECKPOINTS_FOLDER = "checkpoints"
MANIFESTS_FOLDER = "manifests"
FORMAT = 1


def describe_run(config: ModelConfig, settings: dict[str, Any], scale: float, part: bool) -> str:
    """The content of `kvjax_run.json`.

    Args:
      settings: what a run that goes on must share. scale: of adapters. part: whether `base` holds the rest.
    """
    table = {"format": FORMAT, "scale": scale, "part": part, "settings": settings}
    return json.dumps({**table, "config": json.loads(config_to_json(config))}, indent=1) + "\n"


def read_run(path: Path) -> dict[str, Any]:
    """`kvjax_run.json` of a run's folder, its config as `ModelConfig`."""
    source = path / RUN_FILE
    try:
        table = json.loads(source.read_text(encoding="utf-8"))
        if table["format"] != FORMAT:
            raise CheckpointError(f"{source} has format {table['format']}, this kvjax reads {FORMAT}")
        return {**table, "config": config_from_json(json.dumps(table["config"]), str(source))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read {source}: {error}") from error


def run_of(path: Path) -> tuple[Path, int | None] | None:
    """(the run's folder, the step asked for) where `path` is a run, or one of its checkpoints; else None."""
    if (path / RUN_FILE).is_file():
        return path, None
    run = path.parent.parent
    if path.parent.name == CHECKPOINTS_FOLDER and path.name.isdigit() and (run / RUN_FILE).is_file():
        return run, int(path.name)
    return None


def good_steps(run: Path) -> Iterator[int]:
    """Steps of whole checkpoints, the last first; a warning for each that is damaged or half-written."""
    folder = run / CHECKPOINTS_FOLDER
    found = [int(entry.name) for entry in folder.glob("*") if entry.name.isdigit()] if folder.is_dir() else []
    for step in sorted(found, reverse=True):
        wrong = damage(folder / str(step), run / MANIFESTS_FOLDER / f"{step}.json")
        if wrong is None:
            yield step
        else:
            warnings.warn(f"the checkpoint {folder / str(step)} is not used: {wrong}", stacklevel=2)


def load_run(
    run: Path, step: int | None, dtype: np.dtype | None, shardings: Callable[[ModelConfig], Params | None]
) -> tuple[ModelConfig, Params]:
    """Config and weights of a run's last good checkpoint, or of the one at `step`; other arguments as in `load_orbax`.

    Raises:
      CheckpointError: there is no good one, or the one asked for is damaged.
    """
    about = read_run(run)
    config: ModelConfig = about["config"]
    folder = run / CHECKPOINTS_FOLDER
    if step is None:
        step = next(good_steps(run), None)
        if step is None:
            raise CheckpointError(f"{run} is a training run without a whole checkpoint; train on, or load its base")
    else:
        wrong = damage(folder / str(step), run / MANIFESTS_FOLDER / f"{step}.json")
        if wrong is not None:
            raise CheckpointError(
                f"the checkpoint {folder / str(step)} is damaged: {wrong}; load {run} for the last good"
            )
    placed = shardings(config)
    trained = _read(folder / str(step) / PARAMS_FOLDER, None if about["part"] else placed)
    trained = unstack_layers(trained) if "layers" in trained else trained
    frozen = load_orbax(run / BASE_FOLDER, None, lambda config: None)[1] if about["part"] else {}
    wanted = dtype or jnp.dtype(config.dtype)
    whole = joined(frozen, trained, about["scale"])
    _check(whole, parameter_shapes(config), folder / str(step))

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf.astype(parameter_dtype([part.key for part in path], wanted))

    params = jax.tree_util.tree_map_with_path(cast, whole)
    return config, params if placed is None else jax.device_put(params, placed)


def _read(folder: Path, placed: Params | None) -> Params:
    """What is stored, as it is; where `placed` says for each weight per layer, or on the default device."""
    folder = folder.absolute()  # a relative path means nothing to orbax
    try:
        # The handler, not a checkpointer: this is an item of a checkpoint, which has no metadata of its own.
        handler = ocp.StandardCheckpointHandler()
        stored = handler.metadata(folder).tree
        if placed is None:
            where = jax.tree.map(lambda leaf: jax.sharding.SingleDeviceSharding(jax.devices()[0]), stored)
        else:
            where = _stacked(placed) if "layers" in stored else placed
        target = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), stored, where)
        params: Params = handler.restore(folder, args=ocp.args.StandardRestore(target))
        return params
    except Exception as error:  # orbax and TensorStore raise whatever the layer that met the damage raises
        raise CheckpointError(f"{folder} cannot be read: {type(error).__name__}: {error}".splitlines()[0]) from error


def _stacked(placed: Params) -> Params:
    """Shardings per layer, of layers of one kind, as those of stacked weights."""
    rest = {name: part for name, part in placed.items() if not name.startswith("layers_")}
    layers = jax.tree.map(lambda at: NamedSharding(at.mesh, PartitionSpec(None, *at.spec)), placed["layers_0"])
    return {**rest, "layers": layers}


def _check(params: Params, expected: Params, folder: Path) -> None:
    """The same names and shapes as the config promises."""
    ours, theirs = (
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
        for tree in (expected, params)
    )
    wrong = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if wrong:
        raise CheckpointError(
            f"{folder}: {wrong[0]} has shape {theirs.get(wrong[0])}, {RUN_FILE} promises {ours.get(wrong[0])}"
        )
