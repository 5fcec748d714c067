"""Training from random weights by a `Recipe`, with a checkpoint now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from kvjax.config import ModelConfig
from kvjax.model import Model
from kvjax.train.checkpoint import load_state, save_state
from kvjax.train.initial import initial_params
from kvjax.train.recipe import Recipe
from kvjax.train.step import forward, make_train_step, start


def train_from_scratch(
    config: ModelConfig,
    recipe: Recipe,
    code: np.ndarray,
    end_token: int,
    checkpoint: str | Path,
    *,
    save_every: float = 60.0,
    report: Callable[[int, float], None] | None = None,
) -> Model:
    """The model, float32, after all steps of the recipe; goes on from the checkpoint, if there is one.

    A run that was cut short ends with the same weights as one that was not: batch n is a function of (seed, n) alone.

    Args:
      code: int32[N], training text; end_token: what separates files in it.
      checkpoint: a file, replaced whenever `save_every` seconds are over, and removed by nobody.
      report: is told steps taken and the loss of the last.

    Raises:
      CheckpointError: the checkpoint is damaged or of another model.
      ConfigError: the text is shorter than a row.
    """
    optimizer, mixture = recipe.optimizer(), recipe.mixture(code, end_token)
    logits = forward(config, scan=False)
    state = start(initial_params(config, recipe.seed), optimizer)
    if Path(checkpoint).exists():
        state = load_state(checkpoint, state)
    steps, saved = {}, time.monotonic()
    for step in range(int(state.step), recipe.steps):
        phase = mixture.phase(step)
        if phase not in steps:
            steps[phase] = make_train_step(logits, optimizer, recipe.parts(phase))
        tokens, weights = mixture.batch(step)
        state, metrics = steps[phase](state, jnp.asarray(tokens), jnp.asarray(weights))
        if report is not None:
            report(step + 1, float(metrics["loss"]))
        if step + 1 == recipe.steps or time.monotonic() - saved > save_every:
            save_state(checkpoint, state)
            saved = time.monotonic()
    return Model(config, state.params)
