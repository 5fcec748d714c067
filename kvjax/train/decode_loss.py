"""What a model loses on held-out text when it is served: along the decode path, with the cache it will have."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from kvjax.cache.config import CacheConfig
from kvjax.errors import ConfigError
from kvjax.generate.score import score
from kvjax.model import Model
from kvjax.train.loss import token_losses


def decode_loss(
    model: Model, rows: np.ndarray, cache: CacheConfig = CacheConfig(), prompt_length: int | None = None, batch: int = 8
) -> float:
    """Mean nats per token after the prompt, one token a step through the same code as `kvjax.generate`.

    Args:
      rows: int32[N, T]. prompt_length: tokens of each row that go through prefill, and are not counted; None: half.
      batch: rows at once.
    """
    prompt_length = rows.shape[1] // 2 if prompt_length is None else prompt_length
    if not 1 <= prompt_length < rows.shape[1]:
        raise ConfigError(f"prompt_length must be 1 to {rows.shape[1] - 1}, got {prompt_length}")
    found: list[np.ndarray] = []
    for first in range(0, len(rows), batch):
        some = rows[first : first + batch]
        # A last, short batch is filled up, so that nothing compiles again.
        full = np.concatenate([some, np.repeat(some[:1], batch - len(some), axis=0)])
        logits = score(model, full, cache, path="decode", prompt_length=prompt_length)
        losses = token_losses(logits, jnp.asarray(full))[:, prompt_length - 1 :]
        found.append(np.asarray(losses.mean(axis=1))[: len(some)])
    return float(np.concatenate(found).mean())
