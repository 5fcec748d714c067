"""`load` and `save`: models from and to directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

from kvjax.config import MeshConfig, ModelConfig
from kvjax.convert.directory import KVJAX_FILE, TOKENIZER_FILE, read_sidecars, replaced
from kvjax.convert.generation import agreeing, with_generation_config
from kvjax.convert.hf import CONFIG_FILE, load_hf, save_hf
from kvjax.convert.orbax_store import load_orbax, save_orbax
from kvjax.convert.run_store import load_run, run_of
from kvjax.convert.weight_dtypes import weight_dtype
from kvjax.distributed import as_mesh, parameter_shardings
from kvjax.errors import CheckpointError, ConfigError
from kvjax.model import Model, parameter_shapes
from kvjax.typing import Params

FORMATS = ("orbax", "safetensors")


def load(path: str | Path, dtype: Any = None, mesh: Mesh | MeshConfig | None = None) -> Model:
    """Reads a model from a Hugging Face directory, from one that `save` wrote, or from a training run.

    Args:
      path: a local directory: `config.json` and safetensors of a family in `kvjax.convert.families`, or
        `kvjax_config.json` and orbax weights, or the folder of a training run: its last good checkpoint is read, with a
        warning for each that is damaged; `RUN/checkpoints/STEP` is a certain one.
      dtype: of the weights: "float32", "bfloat16" or "float16"; "auto": the checkpoint's own (where tensors differ, the
        embedding's); None: bfloat16 on an accelerator, float32 on CPU (bfloat16 products are many times slower there).
      mesh: spread the weights over a mesh by `kvjax.distributed.AxisRules`, and so what is computed and held with them:
        sequences over "data", heads and the pools that hold them over "tensor"; None: all on the default device.

    Returns:
      A `Model`. `model.config.dtype` is the checkpoint's own dtype, `model.dtype` the one it was loaded in.

    Raises:
      CheckpointError: there is no such checkpoint, or it is damaged, incomplete, not finite, or of an architecture or
        with a setting that kvjax does not compute.
      ConfigError: the dtype is none of the above, or the mesh does not fit the model or the devices.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        why = "it is a file: give its directory" if path.exists() else "there is no such local directory"
        raise CheckpointError(f"cannot load {path}: {why}")
    device_mesh = None if mesh is None else as_mesh(mesh)
    wanted = _default_dtype(device_mesh) if dtype is None else None if dtype == "auto" else weight_dtype(dtype)

    def shardings(config: ModelConfig) -> Params | None:
        return None if device_mesh is None else parameter_shardings(config, device_mesh)

    run = run_of(path)
    beside = path if run is None else run[0]
    files = read_sidecars(beside)
    tokenizer = _read_tokenizer(files, beside)
    if run is not None:
        config, params = load_run(*run, wanted, shardings)
    elif (path / KVJAX_FILE).exists():
        config, params = load_orbax(path, wanted, shardings)
    elif (path / CONFIG_FILE).exists():
        config, params = load_hf(path, wanted, shardings)
        config = with_generation_config(config, files, str(path))
    else:
        raise CheckpointError(f"{path} holds no checkpoint: neither {CONFIG_FILE} nor {KVJAX_FILE}")
    return Model(config, params, tokenizer, files)


def save(model: Model, path: str | Path, format: str = "orbax") -> None:
    """Writes a model, its tokenizer and the small files it came with; nothing is ever seen half-written.

    The directory is written beside `path` and takes its place at the end. A checkpoint that is there is replaced; any
    other non-empty directory, or one that holds files besides a checkpoint's, is left alone.

    Args:
      format: "orbax" keeps everything kvjax knows, sharded weights shard by shard; "safetensors" is a Hugging Face
        directory of the config's family, whose tensors equal bit for bit those of a checkpoint that was loaded with
        dtype="auto".

    Raises:
      CheckpointError: `path` may not be replaced or cannot be written, the model has no form in `format`, or its
        weights are not those of its config.
      ConfigError: an unknown format.
    """
    if format not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    _check_params(model)
    with replaced(Path(path)) as folder:
        if format == "orbax":
            save_orbax(model.config, model.params, folder)
        else:
            save_hf(model.config, model.params, folder)
        for name, content in agreeing(model.files, model.config):
            if name != TOKENIZER_FILE:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(content)
        if model.tokenizer is not None:
            (folder / TOKENIZER_FILE).write_bytes(_tokenizer_bytes(model))


def _check_params(model: Model) -> None:
    """What is written must be what `load` will expect of this config."""
    ours, expected = (
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
        for tree in (model.params, parameter_shapes(model.config))
    )
    wrong = sorted(path for path in ours.keys() | expected.keys() if ours.get(path) != expected.get(path))
    if wrong:
        raise CheckpointError(
            f"model.params{wrong[0]} has shape {ours.get(wrong[0])}, model.config promises {expected.get(wrong[0])} "
            "(None: no such parameter); stacked layers go through kvjax.models.unstack_layers before saving"
        )


def _default_dtype(mesh: Mesh | None) -> np.dtype:
    """bfloat16 but on CPU."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return jnp.dtype("float32" if platform == "cpu" else "bfloat16")


def _read_tokenizer(files: tuple[tuple[str, bytes], ...], path: Path) -> Tokenizer | None:
    """The tokenizer of `tokenizer.json`, if there is one."""
    content = dict(files).get(TOKENIZER_FILE)
    if content is None:
        return None
    try:
        return _whole_texts(content)
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{path / TOKENIZER_FILE} is not a valid tokenizer: {error}; copy it again") from error


def _whole_texts(content: bytes) -> Tokenizer:
    """The tokenizer without what it was last trained with: a cut or padded prompt would be another prompt."""
    tokenizer = Tokenizer.from_buffer(content)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _tokenizer_bytes(model: Model) -> bytes:
    """The file the tokenizer was read from, unless the model was given another one since."""
    content = dict(model.files).get(TOKENIZER_FILE)
    if content is not None and _whole_texts(content).to_str() == model.tokenizer.to_str():
        return content
    return str(model.tokenizer.to_str(pretty=True)).encode("utf-8")
