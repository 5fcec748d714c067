"""Dense attention on Hopper: what the kernels serve."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.spans import MOST_SEGMENTED
from pallas_kernels.device import lacks

WIDTHS = ((64, 64), (128, 128), (192, 128), (256, 256))
"""Key and value widths whose kernels are compiled and checked."""


def unavailable() -> str | None:
    """Why the default device cannot run these kernels."""
    return lacks("9.0")


def unsupported(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    soft_cap: float | None,
    segment_ids: jax.Array | None,
    positions: jax.Array | None,
    q_positions: jax.Array | None,
    scale: float,
    **call: object,
) -> str | None:
    """Why a call of `attention` cannot be served, whatever the device."""
    if {q.dtype, k.dtype, v.dtype} not in ({jnp.dtype("bfloat16")}, {jnp.dtype("float16")}):
        return f"takes bfloat16 or float16 throughout, got {q.dtype}, {k.dtype} and {v.dtype}"
    if (q.shape[3], v.shape[3]) not in WIDTHS:
        known = ", ".join(f"{key}/{value}" for key, value in WIDTHS)
        return f"takes key/value widths {known}, got {q.shape[3]}/{v.shape[3]}"
    if 0 in q.shape or 0 in k.shape:
        return f"takes no empty arrays, got {q.shape} and {k.shape}"
    if not isinstance(scale, int | float) or scale <= 0:
        return f"takes a positive Python number as scale, got {scale}"
    if soft_cap is not None and not (isinstance(soft_cap, int | float) and soft_cap > 0):
        return f"takes a positive Python number as soft_cap, got {soft_cap}"
    if segment_ids is not None and (positions is not None or q_positions is not None):
        return "takes segment_ids or positions, not both"
    if segment_ids is not None and (q.shape[1] != k.shape[1] or k.shape[1] > MOST_SEGMENTED):
        return f"takes segment_ids for up to {MOST_SEGMENTED} tokens that attend to themselves, got {k.shape[1]}"
    return None


def attention(q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
    """See `api.attention`. The forward pass is always deterministic."""
    # Here and not above: whoever has no such GPU need not load Mosaic.
    from pallas_kernels.attention.mosaic_gpu_call import attention as call

    return call(q, k, v, **options)
