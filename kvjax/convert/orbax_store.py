"""Weights as an orbax checkpoint, with the config as JSON beside it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from kvjax.config import ModelConfig
from kvjax.convert.directory import KVJAX_FILE, PARAMS_FOLDER
from kvjax.convert.hf_config import config_from_json, config_to_json
from kvjax.convert.weight_dtypes import parameter_dtype
from kvjax.errors import CheckpointError
from kvjax.model import parameter_shapes
from kvjax.typing import Params


def save_orbax(config: ModelConfig, params: Params, path: Path) -> None:
    """Writes config and weights into the existing directory `path`; sharded weights are written shard by shard.

    Of several processes all must call it; or one alone, with NumPy arrays.
    """
    config = dataclasses.replace(config, dtype=params["embed"]["embedding"].dtype.name)
    (path / KVJAX_FILE).write_text(config_to_json(config) + "\n", encoding="utf-8")
    together, me = ocp.options.MultiprocessingOptions(), jax.process_index()
    if jax.process_count() > 1 and all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params)):
        # Else it would wait for the others.
        together = ocp.options.MultiprocessingOptions(me, {me}, f"process {me} alone")
    with ocp.StandardCheckpointer(multiprocessing_options=together) as checkpointer:
        checkpointer.save(path / PARAMS_FOLDER, params)
        checkpointer.wait_until_finished()


def load_orbax(
    path: Path, dtype: np.dtype | None, shardings: Callable[[ModelConfig], Params | None]
) -> tuple[ModelConfig, Params]:
    """Config and weights that `save_orbax` wrote, on any mesh, whatever mesh they were saved from.

    Arguments as in `load_hf`.

    Raises:
      CheckpointError: the directory is damaged, or its weights are not those that its config promises, or not finite.
    """
    source = path / KVJAX_FILE
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {source}: {error}") from error
    config = config_from_json(text, str(source))
    folder = path.absolute() / PARAMS_FOLDER  # a relative path means nothing to orbax
    if not folder.is_dir():
        raise CheckpointError(f"{path} has {KVJAX_FILE} but no folder {PARAMS_FOLDER}; copy the whole directory again")
    dtype = dtype or jnp.dtype(config.dtype)
    expected, placed = parameter_shapes(config), shardings(config)
    if placed is None:
        (device,) = jnp.zeros(()).devices()
        placed = jax.tree.map(lambda _: SingleDeviceSharding(device), expected)
    target = jax.tree_util.tree_map_with_path(
        lambda path, leaf, where: jax.ShapeDtypeStruct(
            leaf.shape, parameter_dtype([key.key for key in path], dtype), sharding=where
        ),
        expected,
        placed,
    )
    # Orbax and TensorStore raise whatever the layer that met the damage raises.
    try:
        with ocp.StandardCheckpointer(restore_concurrent_gb=_concurrent_gb(expected)) as checkpointer:
            _check_tree(folder, checkpointer.metadata(folder).item_metadata.tree, expected)
            params = checkpointer.restore(folder, target)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{folder} is not a whole orbax checkpoint ({_first_line(error)}); copy the directory again"
        ) from error
    for name, finite in _named(_all_finite(params)).items():
        if not finite:
            raise CheckpointError(
                f"{folder}: {name} holds NaN or infinite values as {dtype.name}; the weights are damaged"
            )
    return config, params


def _concurrent_gb(shapes: Params) -> int:
    """How much orbax may read at once: little, so that few host copies exist, but no less than the largest tensor."""
    largest = max(leaf.size for leaf in jax.tree.leaves(shapes)) * 4
    return 1 + math.ceil(largest / 1e9)


@jax.jit
def _all_finite(params: Params) -> Params:
    """bool[] per leaf, in one program, where the weights lie."""
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), params)


def _check_tree(folder: Path, stored: Any, expected: Params) -> None:
    """The same names and shapes as the config promises."""
    theirs, ours = _named(stored), _named(expected)
    for kind, names in (("missing", ours.keys() - theirs.keys()), ("unexpected", theirs.keys() - ours.keys())):
        if names:
            raise CheckpointError(
                f"{folder}: {kind} parameters: {', '.join(sorted(names)[:3])}; {KVJAX_FILE} is of another model"
            )
    for name, leaf in ours.items():
        if tuple(theirs[name].shape) != leaf.shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {list(theirs[name].shape)}, {KVJAX_FILE} promises {list(leaf.shape)}"
            )


def _named(tree: Any) -> dict[str, Any]:
    """A nested dict as one from slash-separated paths to leaves."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: not isinstance(x, dict))[0]
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"[:200]
