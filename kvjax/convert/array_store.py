"""Named arrays of any shape and dtype as an orbax checkpoint, read back bit for bit or not at all."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from kvjax.errors import CheckpointError

Manifest = dict[str, dict[str, Any]]
"""Name -> shape, dtype and checksum of an array, as JSON holds them."""


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> Manifest:
    """Writes arrays into the directory `path`, which must not exist yet. Returns what `load_arrays` needs to know."""
    with ocp.StandardCheckpointer() as checkpointer:
        # Orbax writes no array without elements; the manifest says all there is to know of one.
        checkpointer.save(path, {name: array for name, array in arrays.items() if array.size})
        checkpointer.wait_until_finished()
    return {
        name: {"shape": list(array.shape), "dtype": array.dtype.name, "crc32": _checksum(array)}
        for name, array in arrays.items()
    }


def load_arrays(path: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """The arrays that `save_arrays` wrote, on the host.

    Raises:
      CheckpointError: one is missing or damaged.
    """
    if not path.is_dir():
        raise CheckpointError(f"there is no folder {path}; copy the whole directory again")
    targets = {name: np.empty(known["shape"], jnp.dtype(known["dtype"])) for name, known in manifest.items()}
    wanted = {name: target for name, target in targets.items() if target.size}
    # Orbax and TensorStore raise whatever the layer that met the damage raises.
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.metadata(path).item_metadata.tree
            for name, target in wanted.items():
                known = stored.get(name)
                if known is None or (tuple(known.shape), known.dtype) != (target.shape, target.dtype):
                    raise CheckpointError(
                        f"{path} holds no {name} of shape {list(target.shape)} and dtype {target.dtype}; it is of "
                        "another checkpoint: copy the whole directory again"
                    )
            found = checkpointer.restore(path, wanted) if wanted else {}
    except CheckpointError:
        raise
    except Exception as error:
        lines = str(error).splitlines() or ["no message"]
        raise CheckpointError(
            f"{path} is not a whole orbax checkpoint ({type(error).__name__}: {lines[0]:.160}); "
            "copy the whole directory again"
        ) from error
    arrays = {name: np.asarray(found.get(name, target)) for name, target in targets.items()}
    for name, array in arrays.items():
        if _checksum(array) != manifest[name]["crc32"]:
            raise CheckpointError(f"{path}: {name} is damaged, its checksum is another; copy the directory again")
    return arrays


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
