"""A batch of rows to train on, and what of it counts."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.errors import RequestError


class Batch(NamedTuple):
    """Rows of tokens; without the rest, each row is one document.

    Attributes:
      tokens: int32[B, T].
      segments: int32[B, T]: tokens of equal numbers are one document, which sees no other; 0 is padding.
      positions: int32[B, T]: each token's place in its document.
      weights: float32[B, T]: how much predicting each token counts; None: all alike.
    """

    tokens: Any
    segments: Any = None
    positions: Any = None
    weights: Any = None


def counted(batch: Batch) -> jax.Array:
    """float32[B, T-1]: how much predicting token t+1 from token t counts; never across documents, nor of padding."""
    weights = jnp.ones(batch.tokens.shape, jnp.float32) if batch.weights is None else batch.weights
    counts = weights[:, 1:].astype(jnp.float32)
    if batch.segments is None:
        return counts
    return counts * ((batch.segments[:, 1:] == batch.segments[:, :-1]) & (batch.segments[:, 1:] != 0))


def as_batch(given: Any, batch_size: int, vocab_size: int) -> Batch:
    """What a caller hands over as a batch: a `Batch`, a dict of its fields, or int32[B, T]; checked, as NumPy arrays.

    Raises:
      RequestError: it is none of these, has other shapes, or tokens outside the vocabulary.
    """
    if isinstance(given, dict):
        unknown = sorted(given.keys() - set(Batch._fields))
        if unknown or "tokens" not in given:
            raise RequestError(f"a batch has tokens and maybe {Batch._fields[1:]}, got {sorted(given)}")
        given = Batch(**given)
    batch = given if isinstance(given, Batch) else Batch(given)
    tokens = np.asarray(batch.tokens)
    if tokens.ndim != 2 or tokens.shape[0] != batch_size or tokens.shape[1] < 2 or tokens.dtype.kind not in "iu":
        raise RequestError(
            f"a batch must hold integers of shape [{batch_size}, T >= 2], got {tokens.dtype}{list(tokens.shape)}"
        )
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise RequestError(
            f"tokens must be 0 to {vocab_size - 1}, got {tokens.min()} to {tokens.max()}; padding is any token with "
            "segment 0 or weight 0"
        )
    kinds = {"segments": np.int32, "positions": np.int32, "weights": np.float32}
    rest = {name: getattr(batch, name) for name in kinds}
    arrays = {name: None if x is None else np.asarray(x, kinds[name]) for name, x in rest.items()}
    for name, array in arrays.items():
        if array is not None and array.shape != tokens.shape:
            raise RequestError(f"a batch's {name} must have the shape of its tokens, {tokens.shape}; got {array.shape}")
    return Batch(tokens.astype(np.int32), **arrays)
