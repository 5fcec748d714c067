"""Merging partial attention results: split-K, shared prefixes, sinks, pages elsewhere (Dao et al. 2023)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def merge(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Joins attention over disjoint sets of keys.

    Args:
      outs: [I, ..., D], the normalised result over each set.
      lses: float32[I, ...], the log-sum-exp of each set's scores; -inf for an empty set.

    Returns:
      out [..., D] in the dtype of `outs` and lse float32[...]; 0 and -inf where every set is empty.

    Raises:
      ValueError: the two do not fit each other.
    """
    if outs.ndim != lses.ndim + 1 or outs.shape[:-1] != lses.shape or 0 in lses.shape[:1]:
        raise ValueError(
            f"merge takes outs [I, ..., D] and lses [I, ...], I at least 1; got {outs.shape}, {lses.shape}"
        )
    top = jnp.max(lses, axis=0)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(lses - top)
    total = jnp.sum(weights, axis=0)
    # An empty set's `out` is 0 by contract, but a caller's may be NaN: 0 * NaN would spoil the sum.
    terms = jnp.where(weights[..., None] > 0, weights[..., None] * outs.astype(jnp.float32), 0.0)
    out = jnp.sum(terms, axis=0) / jnp.where(total > 0, total, 1.0)[..., None]
    return out.astype(outs.dtype), jnp.log(total) + top
