"""A run's state on disk: one npz file, replaced atomically, so that a run cut short loses minutes and no more."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from kvjax.errors import CheckpointError

State = TypeVar("State")


def save_state(path: str | Path, state: object) -> None:
    """Writes every array of `state`, under its path in the tree."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {
        jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    os.replace(partial, path)


def load_state(path: str | Path, like: State) -> State:
    """Reads what `save_state` wrote into the tree of `like`.

    Raises:
      CheckpointError: the file is missing or damaged, or its arrays are not those of `like`.
    """
    try:
        # Opened here, since np.load leaves a damaged file open.
        with Path(path).open("rb") as file, np.load(file) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"cannot read the run's state {path}: {error}") from error
    leaves, tree = jax.tree_util.tree_flatten_with_path(like)
    loaded = []
    for key, leaf in leaves:
        name = jax.tree_util.keystr(key)
        if name not in arrays or arrays[name].shape != leaf.shape or arrays[name].dtype != leaf.dtype:
            found = f"{arrays[name].dtype}{list(arrays[name].shape)}" if name in arrays else "nothing"
            raise CheckpointError(f"{path}: {name} should be {leaf.dtype}{list(leaf.shape)}, found {found}")
        loaded.append(jax.numpy.asarray(arrays[name]))
    return jax.tree_util.tree_unflatten(tree, loaded)
