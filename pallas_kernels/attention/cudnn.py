"""Dense attention by cuDNN, through jax.

jax's own rule ignores the cotangent of the log-sum-exp, which sinks and merged partial results depend on, and its
public function rounds the log-sum-exp to the inputs' dtype: hence a rule of our own around what lies below it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.device import compute_capability, lacks


def unavailable() -> str | None:
    """Why the default device cannot run cuDNN's attention."""
    return lacks(least="8.0")


def unsupported(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    window: jax.Array | int | None,
    soft_cap: float | None,
    segment_ids: jax.Array | None,
    positions: jax.Array | None,
    q_positions: jax.Array | None,
    scale: float,
    deterministic: bool,
    **call: object,
) -> str | None:
    """Why a call of `attention` cannot be served, whatever the device."""
    if {q.dtype, k.dtype, v.dtype} not in ({jnp.dtype("bfloat16")}, {jnp.dtype("float16")}):
        return f"takes bfloat16 or float16 throughout, got {q.dtype}, {k.dtype} and {v.dtype}"
    width = q.shape[3]
    most = 128 if compute_capability() is not None and lacks(least="9.0") else 256
    if width != v.shape[3]:
        return f"takes keys and values of one width, got {width} and {v.shape[3]}"
    if width > most or width % 8:
        return f"takes widths up to {most} in steps of 8, got {width}"
    if 0 in q.shape or 0 in k.shape:
        return f"takes no empty arrays, got {q.shape} and {k.shape}"
    if causal and q.shape[1] != k.shape[1]:
        return f"takes as many causal queries as keys, got {q.shape[1]} and {k.shape[1]}"
    if not causal and q.shape[1] > k.shape[1]:
        return f"takes no more queries than keys, got {q.shape[1]} and {k.shape[1]}"
    for name, value in (
        ("soft_cap", soft_cap),
        ("segment_ids", segment_ids),
        ("positions", positions),
        ("q_positions", q_positions),
    ):
        if value is not None:
            return f"takes no {name}"
    if not (window is None or (isinstance(window, int) and window > 0)):
        return f"takes a positive Python number as window, got {window}"
    if not isinstance(scale, int | float) or scale <= 0:
        return f"takes a positive Python number as scale, got {scale}"
    if deterministic:
        return "does not promise that gradients are the same from run to run"
    return None


@dataclasses.dataclass(frozen=True)
class Options:
    """What is fixed when a call is traced."""

    causal: bool
    window: int | None
    scale: float


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    window: int | None,
    lengths: jax.Array | None,
    scale: float,
    **call: object,
) -> tuple[jax.Array, jax.Array]:
    """See `api.attention`."""
    options = Options(causal, window, float(scale))
    if lengths is None:
        return _attend(options, q, k, v, None)
    # Padding may hold anything, NaN too, and a weight of 0 does not silence a NaN.
    inside = (jnp.arange(k.shape[1]) < lengths[:, None])[:, :, None, None]
    # What cuDNN makes of a sequence without a key is not documented: it gets one, and its result is replaced.
    out, lse = _attend(options, q, jnp.where(inside, k, 0), jnp.where(inside, v, 0), jnp.maximum(lengths, 1))
    some = (lengths > 0)[:, None, None]
    if window is not None:
        last = jnp.arange(q.shape[1])[None, :, None] - window
        some = some & (last < lengths[:, None, None] - 1)
    return jnp.where(some[..., None], out, 0), jnp.where(some, lse, -jnp.inf)


def _cudnn(
    options: Options, q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """out [B,T,H,D] and lse float32[B,T,H]; its own rule gives the gradients of out."""
    # A private module: the public function rounds the log-sum-exp to the dtype of the output.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    masks = {
        (False, False): MaskType.NO_MASK,
        (False, True): MaskType.CAUSAL,
        (True, False): MaskType.PADDING,
        (True, True): MaskType.PADDING_CAUSAL,
    }
    sizes: dict[str, Any] = {}
    if lengths is not None:
        sizes = dict(q_seqlen=jnp.full(q.shape[:1], q.shape[1], jnp.int32), kv_seqlen=lengths.astype(jnp.int32))
    out, lse = dot_product_attention(
        q,
        k,
        v,
        scale=options.scale,
        mask_type=masks[lengths is not None, options.causal],
        sliding_window_length=options.window,
        return_residual=True,
        **sizes,
    )
    return out, jnp.swapaxes(lse, 1, 2).astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    options: Options, q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    return _cudnn(options, q, k, v, lengths)


def _forward(options: Options, q: Any, k: Any, v: Any, lengths: Any) -> tuple[Any, Any]:
    arrays = tuple(x if x is None else x.value for x in (q, k, v, lengths))
    outputs, pull_back = jax.vjp(lambda q, k, v: _cudnn(options, q, k, v, arrays[3]), *arrays[:3])
    return outputs, (pull_back, *arrays)


def _backward(options: Options, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    pull_back, q, k, _, lengths = residuals
    dout, dlse = cotangents
    zero = jax.custom_derivatives.SymbolicZero
    dout = jnp.zeros(q.shape, q.dtype) if isinstance(dout, zero) else dout
    dq, dk, dv = pull_back((dout, jnp.zeros(q.shape[:3], jnp.float32)))
    if not isinstance(dlse, zero):
        # d lse / d score is the probability, so the rest is attention too: to the keys as values, and its transpose.
        (mean, _), spread = jax.vjp(lambda values: _cudnn(options, q, k, values, lengths), k)
        change = options.scale * dlse[..., None]
        dq = dq + (change * mean).astype(dq.dtype)
        dk = dk + spread(((change * q).astype(q.dtype), jnp.zeros(q.shape[:3], jnp.float32)))[0]
    return dq, dk, dv, None


_attend.defvjp(_forward, _backward, symbolic_zeros=True)
