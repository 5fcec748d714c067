"""How calls are brought into the shape of the kernels for Hopper, and their gradient."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.mosaic_gpu_backward import BackwardConfig, backward, default_backward_config
from pallas_kernels.attention.mosaic_gpu_dq import TILE
from pallas_kernels.attention.mosaic_gpu_forward import ForwardConfig, default_forward_config, forward
from pallas_kernels.attention.mosaic_gpu_scores import Scores
from pallas_kernels.attention.spans import Spans, spans
from pallas_kernels.hopper import JAX
from pallas_kernels.tuning import Key, bucket, tuned

SERVES_FUSED = JAX >= (0, 11)
"""Under jax 0.10 fused gradients spilled registers at width 128, and `sums` needs jax 0.11: the two kernels serve."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is fixed when a call is traced.

    Attributes:
      padding: whether there may be keys that hold anything, NaN too, since nobody sees them.
    """

    scores: Scores
    forward: ForwardConfig
    backward: BackwardConfig
    padding: bool


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
    deterministic: bool,
) -> tuple[jax.Array, jax.Array]:
    """See `api.attention`. The forward pass is always deterministic."""
    padding = lengths is not None or positions is not None
    options = Options(Scores(float(scale), soft_cap), *_configs(q, k, v, deterministic), padding)
    queries, keys = q.shape[1], k.shape[1]
    of = spans(
        queries,
        keys,
        causal=causal,
        window=window,
        lengths=lengths,
        segment_ids=segment_ids,
        positions=positions,
        q_positions=q_positions,
    )
    if padding:
        # A weight of 0 does not silence a NaN.
        v = jnp.where(_readable(of)[:, :, None, None], v, 0)
    all_queries = _round_up(queries, math.lcm(options.forward.tile, TILE, options.backward.query_block))
    backward_keys = options.backward.keys(q.shape[3], v.shape[3], options.scores)
    all_keys = _round_up(keys, math.lcm(options.forward.block, backward_keys))
    of = of.padded(all_queries, all_keys)
    out, lse = _attend(options, _padded(q, all_queries), _padded(k, all_keys), _padded(v, all_keys), of)
    return out[:, :queries], jnp.swapaxes(lse, 1, 2)[:, :queries]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: Options, q: jax.Array, k: jax.Array, v: jax.Array, of: Spans) -> tuple[jax.Array, jax.Array]:
    return forward(q, k, v, of, options.scores, config=options.forward)


def _attend_forward(options: Options, q: jax.Array, k: jax.Array, v: jax.Array, of: Spans) -> tuple[Any, Any]:
    out, lse = forward(q, k, v, of, options.scores, config=options.forward)
    return (out, lse), (q, k, v, out, lse, of)


def _attend_backward(options: Options, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    q, k, v, out, lse, of = residuals
    if options.padding:
        # Scores of keys nobody sees are masked; only here is a slope of 0 multiplied by them.
        k = jnp.where(_readable(of)[:, :, None, None], k, 0)
    gradients = backward((q, k, v, out, lse), of, cotangents, options.scores, options.backward)
    return (*gradients, None)


_attend.defvjp(_attend_forward, _attend_backward)


def _configs(q: jax.Array, k: jax.Array, v: jax.Array, deterministic: bool) -> tuple[ForwardConfig, BackwardConfig]:
    """The heuristics' choices, with what the tuning table says of each kernel in their place."""
    fused = ("fused",) if SERVES_FUSED and not deterministic else ()
    widths = q.shape[3], v.shape[3]

    def tuned_to(*kernels: str) -> dict[str, Any]:
        keys = (Key(kernel, str(q.dtype), q.shape[3], 0, 0, bucket(k.shape[1]), 0) for kernel in kernels)
        return {name: value for key in keys for name, value in (tuned("attention", key) or {}).items()}

    return (
        dataclasses.replace(default_forward_config(*widths), **tuned_to("forward")),
        dataclasses.replace(default_backward_config(*widths), **tuned_to("dkv", "dq", *fused)),
    )


def _readable(of: Spans) -> jax.Array:
    """bool[B or 1, S]: keys that some query may see."""
    return (
        (of.positions >= 0)
        & (of.positions >= jnp.min(of.low, axis=1, keepdims=True))
        & (of.positions <= jnp.max(of.high, axis=1, keepdims=True))
    )


def _padded(x: jax.Array, tokens: int) -> jax.Array:
    """x [B, tokens so far, ...] with zeros up to `tokens`."""
    return x if x.shape[1] == tokens else jnp.pad(x, ((0, 0), (0, tokens - x.shape[1]), (0, 0), (0, 0)))


def _round_up(count: int, to: int) -> int:
    return math.ceil(count / to) * to
