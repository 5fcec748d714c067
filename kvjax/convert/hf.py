"""Weights of a Hugging Face directory: safetensors in, safetensors out."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.config import ModelConfig
from kvjax.convert.deepseek_form import deepseek_form
from kvjax.convert.families import family_of
from kvjax.convert.hf_config import PRIVATE, read_config, write_config
from kvjax.convert.hf_fields import read_json
from kvjax.convert.hf_names import EMBEDDING, HEAD, IGNORED
from kvjax.convert.hf_place import Place, read_parameter, tensors_to_write
from kvjax.convert.progress import progress
from kvjax.convert.tensor_file import StoredTensor, TensorToWrite, read_header, write_tensors
from kvjax.convert.weight_dtypes import parameter_dtype
from kvjax.errors import CheckpointError
from kvjax.model import parameter_shapes
from kvjax.typing import Params

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

MAX_SHARD_BYTES = 5 * 10**9

_SHOWN = 3


def load_hf(
    path: Path, dtype: np.dtype | None, shardings: Callable[[ModelConfig], Params | None]
) -> tuple[ModelConfig, Params]:
    """Config and weights of a Hugging Face directory.

    One parameter at a time is read, cast, turned and placed, the experts of a layer together: beside the weights
    themselves, host memory holds the one parameter at hand and a few blocks of `BLOCK_BYTES`.

    Args:
      dtype: what to load in; None: the checkpoint's own.
      shardings: where each parameter goes, given the config; None: the default device.

    Raises:
      CheckpointError: naming the file or tensor that is missing, damaged, too many, of the wrong shape or not finite.
    """
    source = path / CONFIG_FILE
    config = read_config(read_json(source), str(source))
    stored = _stored_tensors(path)
    expected = _by_path(parameter_shapes(config))
    lies = _places(config, expected)
    _check_tensors(path, config, stored, expected, lies)
    own = stored[EMBEDDING].numpy_dtype
    head_too = config.tie_word_embeddings and HEAD in stored
    if head_too:
        _check_tied(stored[EMBEDDING], stored[HEAD])
        config = _remember_head(config)
    config = dataclasses.replace(config, dtype=own.name)
    placed = shardings(config)
    goes: dict[tuple[str, ...], Any] = dict.fromkeys(expected) if placed is None else _by_path(placed)
    params: Params = {}
    total = sum(place.nbytes(stored) for place in lies.values())
    with progress(f"loading {path.name}", total) as advance, ThreadPoolExecutor(_threads()) as pool:
        for leaf, shape in expected.items():
            wanted = parameter_dtype(leaf, dtype or own)
            if dtype is None and wanted != own:
                wanted = stored[lies[leaf].names[0]].numpy_dtype
            host = read_parameter(lies[leaf], stored, shape.shape, wanted, pool)
            # Waiting for each transfer keeps no more than one parameter's host copy alive.
            _put(params, leaf, jax.block_until_ready(jax.device_put(host, goes[leaf])))
            advance(lies[leaf].nbytes(stored))
    return config, params


def _threads() -> int:
    """Reading, casting and turning blocks are NumPy calls that run beside one another."""
    return min(8, os.cpu_count() or 1)


def save_hf(config: ModelConfig, params: Params, path: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes `config.json` and the weights, in their dtype, into the existing directory `path`.

    Weights beyond `max_shard_bytes` are split over several files with an index. Tied embeddings are written once, or
    twice where the checkpoint they were read from held them twice.
    """
    config, params = deepseek_form(config, params)
    dtype = params["embed"]["embedding"].dtype
    document = write_config(config, dtype.name)
    (path / CONFIG_FILE).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    leaves = _by_path(params)
    lies = _places(config, leaves)
    tensors = tensors_to_write(leaves, lies.__getitem__)
    if config.tie_word_embeddings and json.loads(config.extra).get(PRIVATE, {}).get("stored_head"):
        embedding = params["embed"]["embedding"]
        tensors.append(TensorToWrite(HEAD, embedding.shape, embedding.dtype, lambda: np.asarray(jnp.copy(embedding))))
    shards = list(_shards(tensors, max_shard_bytes))
    total = sum(tensor.nbytes for tensor in tensors)
    with progress("saving", total) as advance:
        if len(shards) == 1:
            write_tensors(path / SINGLE_FILE, tensors, advance)
            return
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_tensors(path / name, shard, advance)
            weight_map.update({tensor.name: name for tensor in shard})
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (path / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of the directory, by name, from the headers alone."""
    if (path / SINGLE_FILE).exists():
        return read_header(path / SINGLE_FILE)
    index = path / INDEX_FILE
    if not index.exists():
        other = next((f.name for pattern in ("*.bin", "*.pth", "*.gguf") for f in sorted(path.glob(pattern))), None)
        hint = f"; it holds {other}: convert it to safetensors" if other else ""
        raise CheckpointError(f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and file == Path(file).name for file in weight_map.values()
    ):
        raise CheckpointError(f"{index}: weight_map must be a table from tensor names to names of files beside it")
    files = sorted(set(weight_map.values()))
    absent = [file for file in files if not (path / file).exists()]
    if absent:
        raise CheckpointError(f"{index} names {_some(absent)}, which {path} does not hold; copy or download them")
    stored: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(path / file).items():
            if weight_map.get(name, file) != file:
                raise CheckpointError(f"{path / file} holds {name}, which {index.name} places in {weight_map[name]}")
            if name in stored:
                raise CheckpointError(f"{name} is in two files, {stored[name].file.name} and {file}; keep one")
            stored[name] = tensor
    lost = sorted(set(weight_map) - set(stored))
    if lost:
        raise CheckpointError(f"{index} promises {_some(lost)}, which {weight_map[lost[0]]} does not hold")
    return stored


def _places(config: ModelConfig, leaves: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], Place]:
    """Where each parameter lies in a checkpoint of the config's family."""
    family = family_of(config.family, "ModelConfig.family")
    return {leaf: family.place(config, leaf) for leaf in leaves}


def _check_tensors(
    path: Path,
    config: ModelConfig,
    stored: dict[str, StoredTensor],
    expected: dict[tuple[str, ...], jax.ShapeDtypeStruct],
    lies: dict[tuple[str, ...], Place],
) -> None:
    """The same names and shapes as the config promises, and dtypes that can be read."""
    shapes = {name: place.stored_shape(expected[leaf].shape) for leaf, place in lies.items() for name in place.names}
    allowed = {HEAD} if config.tie_word_embeddings else set()
    missing = [name for name in shapes if name not in stored]
    if missing:
        hint = "set tie_word_embeddings if the embedding is the head too" if missing == [HEAD] else ""
        hint = hint or f"{CONFIG_FILE} and the weights may belong to different models"
        raise CheckpointError(f"{path}: missing tensors: {_some(missing)}; {hint}")
    family = family_of(config.family, "ModelConfig.family")
    extra = sorted(
        name
        for name in stored
        if name not in shapes and name not in allowed and not IGNORED.match(name) and not family.unused(config, name)
    )
    if extra:
        raise CheckpointError(
            f"{path}: tensors that a {config.family} model of this {CONFIG_FILE} does not have: {_some(extra)}; "
            "kvjax would compute something else than their authors meant"
        )
    for name, wanted in shapes.items():
        tensor = stored[name]
        if tensor.shape != wanted:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, {CONFIG_FILE} promises {list(wanted)}; "
                "use the config that belongs to these weights"
            )
        _ = tensor.numpy_dtype  # refuses dtypes that cannot be read, before the first weight is


def _check_tied(embedding: StoredTensor, head: StoredTensor) -> None:
    """Both copies of a tied matrix must agree, or nobody knows which is meant."""
    same = (embedding.shape, embedding.dtype) == (head.shape, head.dtype)
    if not same or any(embedding.read(*rows).tobytes() != head.read(*rows).tobytes() for rows in head.blocks()):
        raise CheckpointError(
            f"{head.file}: {HEAD} differs from {EMBEDDING}, though {CONFIG_FILE} sets tie_word_embeddings; "
            f"set it to false, or remove {HEAD}"
        )


def _remember_head(config: ModelConfig) -> ModelConfig:
    """Notes that the checkpoint stores the tied matrix twice, so that saving does too."""
    extra = {**json.loads(config.extra), PRIVATE: {"stored_head": True}}
    return dataclasses.replace(config, extra=json.dumps(extra, sort_keys=True))


def _shards(tensors: list[TensorToWrite], max_bytes: int) -> Iterator[list[TensorToWrite]]:
    """Consecutive tensors, as many to a file as fit."""
    shard: list[TensorToWrite] = []
    for tensor in tensors:
        if shard and sum(t.nbytes for t in shard) + tensor.nbytes > max_bytes:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def _by_path(tree: Params) -> dict[tuple[str, ...], Any]:
    """A nested dict as one from paths to leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {tuple(key.key for key in path): leaf for path, leaf in leaves}


def _put(tree: Params, path: tuple[str, ...], value: jax.Array) -> None:
    """Sets a leaf, making the tables on the way."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
