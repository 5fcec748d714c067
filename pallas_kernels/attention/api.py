"""Dense attention: validation and dispatch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import cudnn, mosaic_gpu, reference, tpu, triton
from pallas_kernels.dispatch import Backend, choose
from pallas_kernels.tuning import Key, bucket, tuned
from pallas_kernels.validation import floats, heads_of, integers, not_empty, number, same_dtype, window_of

BACKENDS = {
    "cudnn": vars(cudnn),
    "mosaic_gpu": vars(mosaic_gpu),
    "triton": vars(triton),
    "tpu": vars(tpu),
    "xla": vars(reference),
}
WEIGHTS_BACKENDS = {"xla": vars(reference)}
"""The second pass is plain jnp, whichever backend the first pass takes."""


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = True,
    window: jax.Array | int | None = None,
    soft_cap: float | None = None,
    lengths: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    q_positions: jax.Array | None = None,
    scale: float | None = None,
    deterministic: bool = False,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """softmax(q k^T * scale) v over the visible keys, and the log-sum-exp of the scores. Differentiable.

    Args:
      q: [B, T, H, D]; k: [B, S, K, D]; v: [B, S, K, Dv]; query head h reads KV head h // (H / K).
      causal: a query sees keys at positions up to its own; `window` then limits how far back (its own counts).
      lengths: int32[B], keys from there on are padding. segment_ids: int32[B, T] (T = S), equal ids see each other.
      positions, q_positions: int32[B or 1, S] and int32[B or 1, T], -1 is padding; None: 0, 1, ... with queries at the
        end, so that of more causal queries than keys the first see nothing.
      scale: None is D ** -0.5. soft_cap: scores become cap * tanh(scores / cap).
      deterministic: gradients are the same bits in every run, which may take longer.

    Returns:
      out [B, T, H, Dv] in q's dtype; lse float32[B, T, H], natural log. A query that sees nothing gets 0 and -inf.

    Raises:
      ValueError: an argument is not as described, or there is no such backend.
      NotImplementedError: the backend asked for cannot serve the call, for the reason given.
    """
    _check_shapes(q, k, v)
    same_dtype(q=q, k=k, v=v)
    if window is not None and not causal:
        raise ValueError("a window needs causal=True")
    batch, tokens, keys = q.shape[0], q.shape[1], k.shape[1]
    if not causal and q_positions is None and tokens > keys:
        # At the end of fewer keys the first would stand before all, as padding does.
        q_positions = jnp.arange(tokens)[None]
    options = dict(
        causal=causal,
        window=window_of(window),
        soft_cap=None if soft_cap is None else number(soft_cap, "soft_cap", positive=True),
        lengths=None if lengths is None else integers(lengths, (batch,), "lengths"),
        segment_ids=None if segment_ids is None else integers(segment_ids, (batch, tokens), "segment_ids"),
        **_positions(batch, tokens, keys, positions, q_positions),
        scale=q.shape[-1] ** -0.5 if scale is None else number(scale, "scale"),
        deterministic=deterministic,
    )
    if segment_ids is not None and tokens != keys:
        raise ValueError(f"segment_ids need as many queries as keys, got {tokens} and {keys}")
    return choose("attention", _by_speed(q, k), backend, q=q, k=k, v=v, **options)(q, k, v, **options)


def _check_shapes(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    alike = all(x.ndim == 4 for x in (q, k, v)) and q.shape[::3] == k.shape[::3] and k.shape[:3] == v.shape[:3]
    if not alike:
        raise ValueError(f"attention takes q[B,T,H,D], k[B,S,K,D], v[B,S,K,Dv]; got {q.shape}, {k.shape}, {v.shape}")
    not_empty({"q": q, "k": k, "v": v})
    heads_of(q.shape[2], k.shape[2])


def _positions(
    batch: int, tokens: int, keys: int, positions: jax.Array | None, q_positions: jax.Array | None
) -> dict[str, Any]:
    """Both as int32, where they are given."""
    return {
        name: None if given is None else integers(given, ((batch, 1), count), name)
        for name, given, count in (("positions", positions, keys), ("q_positions", q_positions, tokens))
    }


def _by_speed(q: jax.Array, k: jax.Array) -> dict[str, Backend]:
    """The backends, the one that the tuning table found fastest for such a call before the others."""
    key = Key("backend", str(q.dtype), q.shape[3], 0, 0, bucket(k.shape[1]), 0)
    fastest = (tuned("attention", key) or {}).get("name")
    return dict(sorted(BACKENDS.items(), key=lambda item: item[0] != fastest))


def attention_weights(
    q: jax.Array,
    k: jax.Array,
    *,
    lse: jax.Array,
    row_weights: jax.Array,
    window: jax.Array | int | None = None,
    soft_cap: float | None = None,
    positions: jax.Array | None = None,
    q_positions: jax.Array | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> jax.Array:
    """The attention mass each key receives: a second pass with the final lse.

    Args:
      lse: float32[B, T, H] from `attention`. row_weights: float32[B, T], how much each query row counts.
      backend: as `attention` takes it, so that one name serves both passes: a backend that has no such pass leaves it
        to `xla`, which reads what any of them wrote.

    Returns:
      float32[B, K, S], summed over the query heads of each KV head and over rows.

    Raises:
      ValueError: an argument is not as described, or there is no such backend.
    """
    _check_shapes(q, k, k)
    same_dtype(q=q, k=k)
    floats(lse, q.shape[:3], "lse")
    floats(row_weights, q.shape[:2], "row_weights")
    options = dict(
        lse=lse,
        row_weights=row_weights,
        window=window_of(window),
        soft_cap=None if soft_cap is None else number(soft_cap, "soft_cap", positive=True),
        **_positions(q.shape[0], q.shape[1], k.shape[1], positions, q_positions),
        scale=q.shape[-1] ** -0.5 if scale is None else number(scale, "scale"),
    )
    if backend in BACKENDS and backend not in WEIGHTS_BACKENDS:
        backend = "xla"
    return choose("attention_weights", WEIGHTS_BACKENDS, backend, q=q, k=k, **options)(q, k, **options)
