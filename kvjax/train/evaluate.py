"""What a model has learnt: nats per token on held-out text, recall by depth, copying."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.errors import ConfigError
from kvjax.train.loss import token_losses
from kvjax.train.probes import Predict, copy_probe, recall_probe, right_tokens
from kvjax.typing import Params

Logits = Callable[[Params, jax.Array], jax.Array]


@functools.lru_cache(maxsize=8)
def _likeliest(logits: Logits) -> Callable[[Params, jax.Array], jax.Array]:
    """Jitted once per model, so that measuring again during a run compiles nothing."""
    return jax.jit(lambda params, tokens: jnp.argmax(logits(params, tokens), axis=-1))


@functools.lru_cache(maxsize=8)
def _window_losses(logits: Logits) -> Callable[[Params, jax.Array], jax.Array]:
    """As `_likeliest`: float32[B], the mean loss of each row."""
    return jax.jit(lambda params, tokens: token_losses(logits(params, tokens), tokens).mean(axis=1))


def predictor(logits: Logits, params: Params) -> Predict:
    """The likeliest next tokens under plain attention."""
    return lambda tokens: np.asarray(_likeliest(logits)(params, jnp.asarray(tokens)))


def nats_per_token(
    logits: Logits, params: Params, tokens: np.ndarray, length: int, rows: int = 4, limit: int | None = None
) -> float:
    """Mean loss over consecutive windows of `length` tokens; each window's first token is given, not predicted.

    Args:
      tokens: int32[N]. limit: windows at most, spread evenly over `tokens`; None: all that fit.
    """
    count = len(tokens) // length
    if count < 1:
        raise ConfigError(f"{len(tokens)} tokens hold no window of {length}; give a longer text or a shorter window")
    chosen = np.arange(count) if limit is None or limit >= count else np.linspace(0, count - 1, limit).astype(int)
    found: list[np.ndarray] = []
    for first in range(0, len(chosen), rows):
        batch = [tokens[i * length : (i + 1) * length] for i in chosen[first : first + rows]]
        # A last, short batch is filled with its first window, so that nothing compiles again.
        full = np.stack(batch + [batch[0]] * (rows - len(batch)))
        found.append(np.asarray(_window_losses(logits)(params, jnp.asarray(full)))[: len(batch)])
    return float(np.concatenate(found).mean())


def recall_by_depth(
    predict: Predict,
    code: np.ndarray,
    length: int,
    depths: Sequence[float],
    count: int = 32,
    distractors: int = 4,
    seed: int = 0,
) -> dict[float, float]:
    """Depth -> the fraction of `count` questions whose whole answer comes out (`kvjax.train.probes.recall_probe`)."""
    rng = np.random.default_rng(seed)
    result = {}
    for depth in depths:
        probes = [recall_probe(length, depth, code, rng, distractors) for _ in range(count)]
        result[depth] = float(np.mean([right.all() for right in right_tokens(predict, probes)]))
    return result


def copy_accuracy(predict: Predict, length: int, count: int = 32, seed: int = 0) -> float:
    """The fraction of tokens of random-letter copies that come out (`kvjax.train.probes.copy_probe`)."""
    rng = np.random.default_rng(seed)
    probes = [copy_probe(length, rng) for _ in range(count)]
    return float(np.mean(np.concatenate(right_tokens(predict, probes))))
