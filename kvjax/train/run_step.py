"""One step of fine-tuning, and the state it carries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kvjax.convert.adapters import joined
from kvjax.convert.weight_dtypes import parameter_dtype
from kvjax.train.batch import Batch, counted
from kvjax.train.objective import Objective
from kvjax.train.settings import Settings
from kvjax.train.step import adamw, schedule
from kvjax.typing import Params


class RunState(NamedTuple):
    """What fine-tuning carries from step to step.

    Attributes:
      params: what is trained, float32. optimizer: its state. step: int32[], steps taken. key: uint32[...], the data of
        the run's random key; a step's own is made of it and `step`.
    """

    params: Params
    optimizer: Any
    step: jax.Array
    key: jax.Array


class Given(NamedTuple):
    """What every step is given and none changes: weights that are not trained, and the teacher's (None: no teacher)."""

    frozen: Params
    teacher: Params | None = None


def optimizer_of(settings: Settings) -> optax.GradientTransformation:
    """AdamW with clipping, warm-up and a cosine; adapters, norms, biases and embeddings are not decayed."""
    s = settings
    rate = schedule(s.learning_rate, s.steps, s.warmup_steps, s.steps - s.warmup_steps, s.final)
    return adamw(rate, s.weight_decay, s.clip)


def run_state(trained: Params, optimizer: optax.GradientTransformation, seed: int) -> RunState:
    """A run's beginning."""
    key = jax.random.key_data(jax.random.key(seed))
    return RunState(trained, optimizer.init(trained), jnp.zeros((), jnp.int32), key)


def computed(trained: Params, frozen: Params, scale: float, dtype: Any) -> Params:
    """All weights as they are computed with: joined, in the model's dtype."""
    return as_dtype(joined(frozen, trained, scale), dtype)


def as_dtype(params: Params, dtype: Any) -> Params:
    """Weights in `dtype`, but for those that are always float32."""

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf.astype(parameter_dtype([part.key for part in path], np.dtype(dtype)))

    return jax.tree_util.tree_map_with_path(cast, params)


def make_run_step(
    objective: Objective, settings: Settings, dtype: Any, shardings: Any = None
) -> Callable[[RunState, Given, Batch], tuple[RunState, dict[str, jax.Array]]]:
    """A jitted `(state, given, batch) -> (state, told)` that donates the state.

    `told` holds the objective's parts, means over the tokens that count, and "gradient_norm" before clipping, float32[]
    each.

    Args:
      dtype: of products and activations. shardings: of the state; None: as it comes.
    """
    optimizer, parts = optimizer_of(settings), settings.accumulate

    def step(state: RunState, given: Given, batch: Batch) -> tuple[RunState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        total = jnp.maximum(jnp.sum(counted(batch)), 1e-6)

        def part_loss(trained: Params, part: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            params = computed(trained, given.frozen, settings.scale, dtype)
            sums = objective(params, given.teacher, part, key, state.step)
            told = jax.tree.map(lambda x: x / total, sums)
            return told["loss"], told

        gradient = jax.grad(part_loss, has_aux=True)
        if parts == 1:
            gradients, told = gradient(state.params, batch, key)
        else:
            # Row i goes to part i mod parts: every device of a mesh gives its share to every part.
            split = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), batch)
            keys = jax.random.split(key, parts)

            def add(carry: Any, given_part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, carry, gradient(state.params, *given_part)), None

            one = jax.tree.map(lambda x: x[0], (split, keys))
            zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, state.params, *one))
            (gradients, told), _ = jax.lax.scan(add, zero, (split, keys))
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        told = {**told, "gradient_norm": optax.tree.norm(gradients)}
        return RunState(optax.apply_updates(state.params, updates), optimizer_state, state.step + 1, state.key), told

    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
