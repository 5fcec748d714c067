"""Fine-tuning: a model and tokens in, the tuned model out."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvjax.config import MeshConfig, ModelConfig, build
from kvjax.convert.adapters import joined
from kvjax.convert.weight_dtypes import weight_dtype
from kvjax.distributed import as_mesh, parameter_shardings
from kvjax.errors import ConfigError
from kvjax.model import Model
from kvjax.models import stack_layers, unstack_layers
from kvjax.train.attend import training_attend
from kvjax.train.batch import Batch, as_batch
from kvjax.train.batches import batches_of, fingerprint
from kvjax.train.dmc import dmc_stages
from kvjax.train.loop import Every, Told, run_steps
from kvjax.train.objective import Objective, Reader, check_teacher, distilled, next_token, reader
from kvjax.train.run_folder import RunFolder
from kvjax.train.run_step import Given, RunState, as_dtype, make_run_step, optimizer_of, run_state
from kvjax.train.settings import Settings
from kvjax.train.sharding import check_mesh, put_batch, put_weights, rules_of, state_shardings
from kvjax.train.through import through_attend
from kvjax.train.trainable import split
from kvjax.typing import Params


def finetune(
    model: Model,
    tokens: Any,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int = 0,
    *,
    teacher: Model | None = None,
    dtype: Any = None,
    mesh: Mesh | MeshConfig | None = None,
    run: str | Path | RunFolder | None = None,
    every: Every = Every(),
    evaluate: Callable[[Model], Mapping[str, float]] | None = None,
    report: Callable[[Told], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
    **options: Any,
) -> Model:
    """Trains a model on tokens: next-token loss, or the distance from a teacher.

    Args:
      tokens: int32[examples, T], in a new order every epoch; or an iterable of batches, each int32[B, T], a
        `kvjax.train.Batch` (packed rows, weights) or a dict of its fields.
      steps, batch_size, learning_rate, seed, **options: the fields of `Settings`, which says what they mean.
      teacher: learn from its logits as `Settings.distillation` says; None: from the text alone.
      dtype: of the result's weights; None: the model's.
      mesh: spread rows over its "data" and "fsdp" axes and weights over "fsdp" and "tensor"; None: one device.
      run: a folder for checkpoints. A run that is found there is gone on with, exactly where its last good checkpoint
        was: the result is bit for bit what it would have been (same machine, same devices).
      every: steps between checkpoints, and between measurements.
      evaluate: measures the model as it is so far: numbers by name. report: is told of every step.
      stopped: asked after each step; True ends the run early, with a checkpoint.

    Raises:
      ConfigError: settings that mean nothing, or do not fit the model, the mesh or the run.
      RequestError: tokens that are no batch, or outside the vocabulary.
      TrainingError: the loss is not finite any more, or the batches end before the steps.
      CheckpointError: a checkpoint cannot be written or read.
    """
    plain = dict(steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed)
    settings: Settings = build(Settings, {**options, **plain}, "finetune")
    wanted = model.dtype if dtype is None else weight_dtype(dtype)
    _check_model(model.config, "model")
    device_mesh = None if mesh is None else as_mesh(mesh)
    if device_mesh is not None:
        check_mesh(device_mesh, settings.batch_size, settings.accumulate)
    platform = jax.default_backend() if device_mesh is None else device_mesh.devices.flat[0].platform
    scan = model.config.uniform and (platform != "cpu" if settings.scan is None else settings.scan)
    compute = jnp.dtype(settings.compute_dtype or ("float32" if platform == "cpu" else "bfloat16"))
    stages: tuple[tuple[int, Any], ...] = ((0, None),)
    if settings.dmc is not None:
        stages = dmc_stages(model.config, settings.dmc)
    elif settings.through is not None:
        attend = through_attend(model, settings.through)
        # A scan over layers has one body, and so one cache.
        scan, stages = scan and len(attend.layouts) == 1, ((0, attend),)
    batches = batches_of(tokens, settings.batch_size, settings.seed, model.config.vocab_size)

    trained, frozen = split(_placed(model, device_mesh, scan), settings.trainable, settings.seed)
    optimizer = optimizer_of(settings)
    shardings = None
    if device_mesh is not None:
        shardings = state_shardings(trained, optimizer, model.config, device_mesh, scan)
        trained = jax.device_put(trained, shardings.params)
    start = jax.jit(lambda trained: run_state(trained, optimizer, settings.seed), out_shardings=shardings)
    state = start(trained)
    taught = None if teacher is None else _taught(model.config, settings, teacher, device_mesh, scan, compute)
    given = Given(frozen, taught)
    objectives = (_objective(model.config, settings, attend, teacher, scan) for _, attend in stages)
    made = [make_run_step(objective, settings, compute, shardings) for objective in objectives]

    def step_at(index: int) -> Any:
        return made[sum(first <= index for first, _ in stages) - 1]

    def finished(state: RunState, dtype: Any) -> Model:
        params = joined(frozen, state.params, settings.scale)
        # A copy: the next step gives the state's buffers away.
        params = jax.tree.map(jnp.copy, as_dtype(unstack_layers(params) if scan else params, dtype))
        return dataclasses.replace(model, params=params)

    with contextlib.ExitStack() as stack:
        folder = None
        if run is not None:
            folder = stack.enter_context(run if isinstance(run, RunFolder) else RunFolder(run))
            identity = _identity(settings, scan, model if frozen else None, teacher) | {"data": fingerprint(batches)}
            if folder.begin(model, identity, settings.scale, part=bool(frozen)):
                resumed = folder.restore(state)
                if resumed is not None:
                    state = resumed.state
                    batches.set_state(resumed.data)
        state = run_steps(
            step_at,
            state,
            given,
            batches,
            settings.steps,
            place=lambda x: put_batch(_checked(x, settings, model.config), device_mesh),
            folder=folder,
            every=every,
            evaluate=None if evaluate is None else lambda state: evaluate(finished(state, compute)),
            report=report,
            stopped=stopped,
        )
    return finished(state, wanted)


def _check_model(config: ModelConfig, name: str) -> None:
    if config.encoder is not None:
        raise ConfigError(
            f"finetune trains decoders on text alone; this {name} has an encoder: kvjax.train.step trains it"
        )


def _checked(given: Any, settings: Settings, config: ModelConfig) -> Batch:
    """A batch that the model can be trained on."""
    batch = as_batch(given, settings.batch_size, config.vocab_size)
    if batch.segments is not None and (config.retention_layers or config.goldfinch):
        raise ConfigError(
            "retention and GoldFinch carry a state along the row, which segments do not stop: give one document a row"
        )
    return batch


def _objective(
    config: ModelConfig,
    settings: Settings,
    attend: Any,
    teacher: Model | None,
    scan: bool,
) -> Objective:
    """What is lowered. attend: the student's, or its `Reading`; None: the quickest."""

    def read(config: ModelConfig, attend: Any, scan: bool, remat: bool) -> Reader:
        attend = training_attend(config) if attend is None else attend
        layers = teacher is not None and settings.distillation.layers > 0
        return reader(config, attend=attend, scan=scan, remat=remat, layers=layers)

    student = read(config, attend, scan, settings.remat)
    if teacher is None:
        return next_token(student)
    return distilled(student, read(teacher.config, None, scan and teacher.config.uniform, False), settings.distillation)


def _taught(
    config: ModelConfig, settings: Settings, teacher: Model, mesh: Mesh | None, scan: bool, compute: Any
) -> Params:
    """The teacher's weights, as they are computed with."""
    _check_model(teacher.config, "teacher")
    check_teacher(config, teacher.config, settings.distillation)
    return as_dtype(_placed(teacher, mesh, scan and teacher.config.uniform), compute)


def _placed(model: Model, mesh: Mesh | None, scan: bool) -> Params:
    """A model's weights in the layout of training, where training wants them."""
    params = stack_layers(model.params) if scan else model.params
    if mesh is None:
        return params
    return put_weights(params, parameter_shardings(model.config, mesh, rules_of(mesh), scan))


def _identity(settings: Settings, scan: bool, base: Model | None, teacher: Model | None) -> dict[str, Any]:
    """What a run must share with the one it goes on with, as JSON holds it.

    base: the model of which a part is trained; else a run that goes on has its weights from its checkpoint.
    """
    table = {**dataclasses.asdict(settings), "through": None if settings.through is None else repr(settings.through)}
    if not isinstance(settings.trainable, str):
        table["trainable"] = {**table["trainable"], "targets": list(settings.trainable.targets)}
    given = [None if one is None else _corners(one.params) for one in (base, teacher)]
    return {**table, "scan": scan, "taught": teacher is not None, "weights": given}


def _corners(params: Params) -> str:
    """A few numbers of every weight, hashed: what tells weights from others, without reading them all."""

    def ends(params: Params) -> list[jax.Array]:
        rows = ((leaf[(0,) * (leaf.ndim - 1)], leaf[(-1,) * (leaf.ndim - 1)]) for leaf in jax.tree.leaves(params))
        return [row[:16].astype(jnp.float32) for both in rows for row in both]

    where = jax.tree.leaves(params)[0].sharding
    # Weights on a mesh: every process is to see these few whole.
    whole = NamedSharding(where.mesh, PartitionSpec()) if isinstance(where, NamedSharding) else None
    found = jax.jit(ends, out_shardings=whole)(params)
    return hashlib.sha256(b"".join(np.asarray(row).tobytes() for row in found)).hexdigest()[:16]
