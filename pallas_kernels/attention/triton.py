"""Dense attention through Triton, for NVIDIA GPUs of compute capability 8.0 and later: forward and backward.

The backward pass is deterministic: one kernel for the gradients of keys and values, by blocks of keys, and one for
those of queries (FlashAttention-2, Dao 2023, 2307.08691, without its atomic additions).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import device, triton_call
from pallas_kernels.tuning import Key, bucket, tuned

LARGE = 160000
"""Bytes of shared memory of a program, from which the larger tiles fit."""
Ints = tuple[jax.Array | None, ...]
"""lengths, segment_ids, positions, q_positions, window: each int32, or None."""


def unavailable() -> str | None:
    """Why the default device cannot run these kernels, or None."""
    return device.lacks(least=triton_call.LEAST)


def unsupported(**call: Any) -> str | None:
    """Why a call cannot be served whatever the device, or None."""
    q, k, v = call["q"], call["k"], call.get("v")
    if (reason := triton_call.absent()) is not None:
        return reason
    if v is None:
        return "has no kernel for attention_weights"
    if q.dtype.name not in triton_call.DTYPES or {k.dtype, v.dtype} != {q.dtype}:
        return f"takes {' or '.join(triton_call.DTYPES)} throughout, got {q.dtype}, {k.dtype} and {v.dtype}"
    if 0 in q.shape or 0 in k.shape:
        return f"takes no empty arrays, got {q.shape} and {k.shape}"
    for width in (q.shape[3], v.shape[3]):
        if width % 16 or not 16 <= width <= 256:
            return f"widths must be multiples of 16 up to 256, got {width}"
    for name in ("scale", "soft_cap"):
        if not isinstance(call.get(name), int | float | None):
            return f"takes a Python number as {name}"
    return None


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    window: jax.Array | int | None,
    soft_cap: float | None,
    lengths: jax.Array | None,
    segment_ids: jax.Array | None,
    positions: jax.Array | None,
    q_positions: jax.Array | None,
    scale: float,
    deterministic: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `api.attention`."""
    reach = None if window is None else jnp.asarray(window, jnp.int32).reshape(1)
    batch, tokens, keys = q.shape[0], q.shape[1], k.shape[1]
    if positions is not None:
        positions = jnp.broadcast_to(positions, (batch, keys))
    if q_positions is not None:
        q_positions = jnp.broadcast_to(q_positions, (batch, tokens))
    given = (lengths, segment_ids, positions, q_positions, reach)
    ints = tuple(None if x is None else jnp.asarray(x).astype(jnp.int32) for x in given)
    return _attention((bool(causal), float(scale), None if soft_cap is None else float(soft_cap)), q, k, v, ints)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    how: tuple[bool, float, float | None], q: jax.Array, k: jax.Array, v: jax.Array, ints: Ints
) -> tuple[jax.Array, jax.Array]:
    from pallas_kernels.attention.triton_kernel import attention_kernel

    batch, tokens, heads, width = q.shape
    value = v.shape[3]
    # What spills no register on an H100, and what fits into less shared memory.
    rows, columns, warps, stages = (128, 64, 8, 3) if max(width, value) <= 128 else (64, 64, 8, 2)
    if triton_call.shared_memory() < LARGE:
        rows, columns, stages = (64, 64, 2) if max(width, value) <= 128 else (32, 32, 2)
    key = Key("triton_forward", q.dtype.name, width, 0, 0, bucket(k.shape[1]), 0)
    if (chosen := tuned("attention", key)) is not None:
        rows, columns, warps, stages = (chosen[name] for name in ("rows", "columns", "warps", "stages"))
    rows = min(rows, triton_call.power_of_two(tokens))
    out, lse = triton_call.launch(
        attention_kernel,
        [q, k, v, *_present(ints, q)],
        [
            jax.ShapeDtypeStruct((batch, tokens, heads, value), q.dtype),
            jax.ShapeDtypeStruct((batch, tokens, heads), jnp.float32),
        ],
        (-(-tokens // rows), heads, batch),
        warps=warps if rows > 32 else 4,
        stages=stages,
        **_constants(how, q, k, v, ints),
        BLOCK_M=rows,
        BLOCK_N=columns,
    )
    return out, lse


def _forward(
    how: tuple[bool, float, float | None], q: jax.Array, k: jax.Array, v: jax.Array, ints: Ints
) -> tuple[Any, Any]:
    out, lse = _attention(how, q, k, v, ints)
    return (out, lse), (q, k, v, ints, out, lse)


def _backward(how: tuple[bool, float, float | None], kept: Any, gradients: Any) -> tuple[Any, ...]:
    from pallas_kernels.attention.triton_kernel import key_gradients_kernel, query_gradients_kernel

    q, k, v, ints, out, lse = kept
    dout, dlse = gradients
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    delta = delta - jnp.where(jnp.isfinite(lse), dlse, 0.0)
    arguments = [q, k, v, dout.astype(q.dtype), lse, delta, *_present(ints, q)]
    constants = _constants(how, q, k, v, ints)
    batch, tokens, heads, _ = q.shape
    length, kv_heads = k.shape[1:3]
    wide = max(q.shape[3], v.shape[3])
    # What spills no register on an H100, and what fits into less shared memory.
    key_rows, key_columns = (64, 64) if wide <= 64 else (32, 64) if wide <= 128 else (32, 32)
    rows, columns = (64, 64) if wide <= 128 else (64, 32)
    if triton_call.shared_memory() < LARGE:
        key_rows, key_columns, rows, columns = (32, 64, 64, 32) if wide <= 128 else (16, 32, 32, 16)
    warps = 4 if wide <= 64 else 8
    dk, dv = triton_call.launch(
        key_gradients_kernel,
        arguments,
        [jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        (-(-length // key_columns), kv_heads, batch),
        warps=warps,
        stages=2,
        **constants,
        BLOCK_M=key_rows,
        BLOCK_N=key_columns,
    )
    (dq,) = triton_call.launch(
        query_gradients_kernel,
        arguments,
        [jax.ShapeDtypeStruct(q.shape, q.dtype)],
        (-(-tokens // rows), heads, batch),
        warps=warps,
        stages=2,
        **constants,
        BLOCK_M=rows,
        BLOCK_N=columns,
    )
    return dq, dk, dv, None


_attention.defvjp(_forward, _backward)


def _present(ints: Ints, other: jax.Array) -> list[jax.Array]:
    """A parameter that a call does not need gets any array."""
    return [other if x is None else x for x in ints]


def _constants(
    how: tuple[bool, float, float | None], q: jax.Array, k: jax.Array, v: jax.Array, ints: Ints
) -> dict[str, Any]:
    """What all kernels know when they are compiled."""
    causal, scale, soft_cap = how
    main, rest = triton_call.two_parts(q.shape[3])
    lengths, segment_ids, positions, q_positions, window = ints
    return dict(
        TOKENS=q.shape[1],
        KEYS=k.shape[1],
        HEADS=q.shape[2],
        GROUP=q.shape[2] // k.shape[2],
        WIDTH=q.shape[3],
        MAIN=main,
        REST=rest,
        VALUE=v.shape[3],
        VALUE_BLOCK=triton_call.power_of_two(v.shape[3]),
        SCALE=scale,
        SOFT_CAP=soft_cap,
        CAUSAL=causal,
        WINDOWED=window is not None,
        RAGGED=lengths is not None,
        SEGMENTED=segment_ids is not None,
        POSITIONED=positions is not None,
        Q_POSITIONED=q_positions is not None,
    )
