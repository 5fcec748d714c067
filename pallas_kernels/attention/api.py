"""Dense attention: validation and dispatch."""

from __future__ import annotations

import jax

from pallas_kernels.attention import cudnn, mosaic_gpu, reference, triton
from pallas_kernels.dispatch import Backend, choose
from pallas_kernels.tuning import Key, bucket, tuned

BACKENDS = {"cudnn": vars(cudnn), "mosaic_gpu": vars(mosaic_gpu), "triton": vars(triton), "xla": vars(reference)}
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
      positions, q_positions: int32[B, S] and int32[B, T], -1 is padding; None: 0, 1, ... with queries at the end.
      scale: None is D ** -0.5. soft_cap: scores become cap * tanh(scores / cap).
      deterministic: gradients are the same bits in every run, which may take longer.

    Returns:
      out [B, T, H, Dv] in q's dtype; lse float32[B, T, H], natural log. A query that sees nothing gets 0 and -inf.
    """
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention takes q[B,T,H,D], k[B,S,K,D], v[B,S,K,Dv]; got {q.shape}, {k.shape}, {v.shape}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of KV heads, got {q.shape[2]} and {k.shape[2]}")
    if window is not None and not causal:
        raise ValueError("a window needs causal=True")
    options = dict(
        causal=causal,
        window=window,
        soft_cap=soft_cap,
        lengths=lengths,
        segment_ids=segment_ids,
        positions=positions,
        q_positions=q_positions,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        deterministic=deterministic,
    )
    return choose("attention", _by_speed(q, k), backend, q=q, k=k, v=v, **options)(q, k, v, **options)


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
    """
    options = dict(
        lse=lse,
        row_weights=row_weights,
        window=window,
        soft_cap=soft_cap,
        positions=positions,
        q_positions=q_positions,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )
    if backend in BACKENDS and backend not in WEIGHTS_BACKENDS:
        backend = "xla"
    return choose("attention_weights", WEIGHTS_BACKENDS, backend, q=q, k=k, **options)(q, k, **options)
