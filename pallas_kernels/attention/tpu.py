"""Dense attention on TPUs: jax's own splash attention, forward and backward.

Splash takes one sequence, heads first, whole blocks and no scale, so queries are scaled, rows and columns padded, and
the batch mapped over; a scale that is no power of two rounds queries once more, to their dtype. Lengths and segments
become its segment ids.

It gives the log-sum-exp only where it is not differentiated, hence a rule of our own: the gradients of `out` are
splash's. Where the log-sum-exp is used too, as by learned sinks and merged partial results, its gradient is attention
again, one more forward and backward pass; under a soft cap it is not, and plain jnp makes the scores of all pairs for
it. Gradients of `out` alone pay for neither, nor, without lengths, for a log-sum-exp.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.device import default_device
from pallas_kernels.softmax import heads_last, log_sum_exp, scores, visible

LANES = 128
"""Columns of a register; splash is tested for widths of one or two of them."""
WIDEST = 256
BLOCK = 512
"""Most rows of queries, or of keys, at once; half as many where their gradients would crowd the vector memory."""
NOTHING = -1e38
"""Splash gives a query that sees nothing the mean value, and a log-sum-exp below this."""


def unavailable() -> str | None:
    """Why the default device cannot run these kernels."""
    platform = default_device().platform
    return None if platform == "tpu" else f"needs a TPU; the default device is a {platform}"


def unsupported(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: jax.Array | int | None,
    soft_cap: float | None,
    positions: jax.Array | None,
    q_positions: jax.Array | None,
    **call: object,
) -> str | None:
    """Why a call of `attention` cannot be served, whatever the device."""
    if {q.dtype, k.dtype, v.dtype} not in ({jnp.dtype("bfloat16")}, {jnp.dtype("float32")}):
        return f"takes bfloat16 or float32 throughout, got {q.dtype}, {k.dtype} and {v.dtype}"
    if 0 in q.shape or 0 in k.shape:
        return f"takes no empty arrays, got {q.shape} and {k.shape}"
    for width in (q.shape[3], v.shape[3]):
        if width > WIDEST:
            return f"takes widths up to {WIDEST}, got {width}"
    for name, value in (("positions", positions), ("q_positions", q_positions)):
        if value is not None:
            return f"takes no {name}: what a block of its mask holds must be known while tracing"
    for name, number in (("window", window), ("soft_cap", soft_cap)):
        if not isinstance(number, int | float | None):
            return f"takes a Python number as {name}"
    return None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is fixed when a call is traced.

    Attributes:
      tokens, keys: before padding. rows, columns: queries and keys of a block.
    """

    causal: bool
    window: int | None
    soft_cap: float | None
    tokens: int
    keys: int
    rows: int
    columns: int


Ids = tuple[jax.Array, jax.Array] | None
"""int32[B, T] and int32[B, S]: a query sees keys of its own number."""


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
    lengths: jax.Array | None,
    segment_ids: jax.Array | None,
    scale: float,
    **call: object,
) -> tuple[jax.Array, jax.Array]:
    """See `api.attention`."""
    tokens, keys = q.shape[1], k.shape[1]
    if causal and tokens > keys:
        # The first stand before all keys. Splash divides zero by zero in a block of such queries alone.
        none = tokens - keys
        given: dict[str, Any] = dict(window=window, soft_cap=soft_cap, lengths=lengths, segment_ids=None, scale=scale)
        out, lse = attention(q[:, none:], k, v, causal=True, **given)
        before = ((0, 0), (none, 0), (0, 0))
        return jnp.pad(out, (*before, (0, 0))), jnp.pad(lse, before, constant_values=-jnp.inf)
    if lengths is not None:
        # Padding may hold anything, NaN too, and a weight of 0 does not silence a NaN.
        inside = (jnp.arange(keys) < lengths[:, None])[:, :, None, None]
        k, v = jnp.where(inside, k, 0), jnp.where(inside, v, 0)
    wide = _up(max(q.shape[3], v.shape[3]), LANES) * q.dtype.itemsize > 2 * LANES
    most = BLOCK // 2 if wide else BLOCK
    plan = Plan(causal, window, soft_cap, tokens, keys, _block(tokens, most), _block(keys, most))
    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
    padded = [_padded(x, rows) for x, rows in ((scaled, plan.rows), (k, plan.columns), (v, plan.columns))]
    ids = _ids(plan, padded[0].shape[2], padded[1].shape[2], q.shape[0], lengths, segment_ids)
    out, lse = _attend(plan, *padded, ids)
    out, lse = (jnp.swapaxes(x, 1, 2)[:, :tokens] for x in (out, lse))
    out = out[..., : v.shape[3]]
    if lengths is None:
        # Every query sees its own position at least.
        return out, lse
    seen = lse > NOTHING
    return jnp.where(seen[..., None], out, 0), jnp.where(seen, lse, -jnp.inf)


def _block(rows: int, most: int) -> int:
    """The size of blocks of at most `most` rows, such that few are padding."""
    blocks = -(-rows // most)
    return _up(-(-rows // blocks), LANES)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


def _padded(x: jax.Array, block: int) -> jax.Array:
    """[B, T, H, D] -> [B, H, T', D'] of whole blocks and registers."""
    rows, columns = (_up(x.shape[axis], step) - x.shape[axis] for axis, step in ((1, block), (3, LANES)))
    return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, rows), (0, columns)))


def _ids(
    plan: Plan, rows: int, columns: int, batch: int, lengths: jax.Array | None, segment_ids: jax.Array | None
) -> Ids:
    """What hides padding and other segments, of `rows` queries and `columns` keys; None: causality hides enough."""
    if lengths is None and segment_ids is None and (plan.causal or plan.keys == columns):
        return None
    asking = jnp.zeros((batch, plan.tokens), jnp.int32) if segment_ids is None else segment_ids
    held = jnp.zeros((batch, plan.keys), jnp.int32) if segment_ids is None else segment_ids
    # A number that no segment of the row has; none has both ends of int32.
    low, high = (f(asking, axis=1, keepdims=True) for f in (jnp.min, jnp.max))
    nobody = jnp.where(low > jnp.iinfo(jnp.int32).min, low - 1, high + 1)
    if lengths is not None:
        held = jnp.where(jnp.arange(plan.keys) < lengths[:, None], held, nobody)
    fill = jnp.broadcast_to(nobody, (batch, columns - plan.keys))
    return jnp.pad(asking, ((0, 0), (0, rows - plan.tokens)), mode="edge"), jnp.concatenate([held, fill], axis=1)


def _splash(plan: Plan, residuals: bool, ids: Ids) -> Callable[..., Any]:
    """q [B, H, T, D], k [B, K, S, D], v [B, K, S, Dv], padded -> out [B, H, T, Dv]; with residuals lse [B, H, T] too.

    Only without residuals it has gradients.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    def call(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        shape, offset = (q.shape[2], k.shape[2]), plan.keys - plan.tokens
        mask: splash.Mask
        if not plan.causal:
            mask = splash.FullMask(shape)
        elif plan.window is None:
            mask = splash.CausalMask(shape, offset)
        else:
            mask = splash.LocalMask(shape, (plan.window - 1, 0), offset)
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([mask] * q.shape[1]),
            block_sizes=splash.BlockSizes(
                block_q=plan.rows,
                block_kv=plan.columns,
                block_q_dkv=plan.rows,
                block_kv_dkv=plan.columns,
                block_q_dq=plan.rows,
                block_kv_dq=plan.columns,
            ),
            save_residuals=residuals,
            attn_logits_soft_cap=plan.soft_cap,
        )
        if ids is None:
            return jax.vmap(kernel)(q, k, v)
        return jax.vmap(kernel)(q, k, v, splash.SegmentIds(*ids))

    return call


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, ids: Ids) -> tuple[jax.Array, jax.Array]:
    out, (lse,) = _splash(plan, True, ids)(q, k, v)
    return out, lse


def _forward(plan: Plan, q: Any, k: Any, v: Any, ids: Any) -> tuple[Any, Any]:
    q, k, v = (x.value for x in (q, k, v))
    ids = None if ids is None else tuple(x.value for x in ids)
    out, pull_back = jax.vjp(_splash(plan, False, ids), q, k, v)
    # The same call as the one that vjp makes: XLA may merge the two, and drops this one if nobody uses its result.
    _, lse = _attend(plan, q, k, v, ids)
    return (out, lse), (pull_back, q, k, ids)


def _backward(plan: Plan, kept: Any, cotangents: Any) -> tuple[Any, ...]:
    pull_back, q, k, ids = kept
    dout, dlse = cotangents
    dq, dk, dv = pull_back(jnp.zeros(dout.shape, dout.dtype) if _zero(dout) else dout)
    if not _zero(dlse):
        more = _through_lse(plan, q, k, ids, dlse)
        dq, dk = dq + more[0], dk + more[1]
    return dq, dk, dv, None


_attend.defvjp(_forward, _backward, symbolic_zeros=True)


def _zero(cotangent: Any) -> bool:
    return isinstance(cotangent, jax.custom_derivatives.SymbolicZero)


def _through_lse(plan: Plan, q: jax.Array, k: jax.Array, ids: Ids, dlse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """dq and dk of the log-sum-exps, given their gradients float32[B, H, T]."""
    if plan.soft_cap is None:
        # d lse / d score is the probability: attention to the keys as values, and its transpose.
        mean, spread = jax.vjp(lambda values: _splash(plan, False, ids)(q, k, values), k)
        change = dlse[..., None]
        return (change * mean).astype(q.dtype), spread((change * q).astype(q.dtype))[0]

    mask = jnp.broadcast_to(jnp.arange(k.shape[2]) < plan.keys, (1, q.shape[2], k.shape[2]))
    if plan.causal:
        asking = jnp.arange(q.shape[2]) + plan.keys - plan.tokens
        mask = mask & visible(jnp.arange(k.shape[2]), asking, plan.window)
    if ids is not None:
        mask = mask & (ids[0][:, :, None] == ids[1][:, None, :])

    def plain(q: jax.Array, k: jax.Array) -> jax.Array:
        masked = jnp.where(mask[:, None, None], scores(jnp.swapaxes(q, 1, 2), k, 1.0, plan.soft_cap), -jnp.inf)
        return jnp.swapaxes(heads_last(log_sum_exp(masked)), 1, 2)

    dq, dk = jax.vjp(plain, q, k)[1](dlse)
    return dq, dk
