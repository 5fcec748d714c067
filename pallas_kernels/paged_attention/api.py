"""Paged attention: validation and dispatch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import choose
from pallas_kernels.paged_attention import blocks, mosaic_gpu, reference, triton
from pallas_kernels.paged_attention.reference import numbers
from pallas_kernels.paged_attention.validation import validated
from pallas_kernels.validation import floats

BACKENDS = {
    "mosaic_gpu": vars(mosaic_gpu),
    "triton": vars(triton),
    "xla_blocks": vars(blocks),
    "xla": vars(reference),
}
TAKE_BITS = (None, "xla_blocks", "xla")
"""Backends whose pools may hold short floats as integers, as on CPUs. None, there, is one of these."""
READS_BY = {"tpu": "xla_blocks"}
"""Names that dense attention knows, and what reads pages under them. jax's own paged kernels for TPUs want heads before
pages, so that every call would copy the pool."""


def paged_attention(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array | None,
    block_table: jax.Array,
    lengths: jax.Array,
    *,
    layer: jax.Array,
    positions: jax.Array | None = None,
    q_positions: jax.Array | None = None,
    window: jax.Array | int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    value_dim: int | None = None,
    k_scale: jax.Array | None = None,
    k_min: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    v_min: jax.Array | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of q over the slots that a block table names (Kwon et al. 2023, 2309.06180).

    Args:
      q: [B, T, H, D], rotated. T = 1: decoding; T a chunk: prefill over pages.
      k_pool, v_pool: [P, layers_per_page, heads_per_page, page, D]; v_pool None: the value is the key's first value_dim
        columns (MLA). heads_per_page 1: each KV head has a row of its own. uint8 pools narrower than D hold n codes a
        byte in W = D / n bytes: byte i holds columns i, i + W, ... from its low bits up, of values as of keys.
        uint16 is taken for the bits of bfloat16, and uint8 of width D with a scale per vector and no minimum for those
        of float8_e4m3fn: CPUs hold these so, because they can scatter them.
      block_table: int32[B, K or 1, N], -1 is no page. lengths: int32[B, K or 1], slots in use, whatever their order;
        those beyond the table are not there.
      layer: int32[1], the layer's place within a page; traced, so that one compilation serves all layers.
      positions: int32[B, K or 1, N * page], where each slot's token stands, -1 skips it; None: the slot's own index.
      q_positions: int32[B, T], -1 is padding; None: the last T positions before `lengths`.
      window: a query sees positions less than this far back, its own included.
      k_scale, k_min, v_scale, v_min: the codec's scales, per vector float32[P, layers, heads, page] or grouped
        float16[P, layers, heads, page, D / group] with minima, or per channel of a whole page (of more than one slot)
        float16[P, layers, heads, 1, D] with minima.

    Returns:
      out [B, T, H, Dv] in q's dtype; lse float32[B, T, H], natural log. A query that sees nothing gets 0 and -inf.

    Raises:
      ValueError: an argument is not as described, or there is no such backend.
      NotImplementedError: the backend asked for cannot serve the call, for the reason given.
    """
    backend = READS_BY.get(backend or "", backend)
    if (v_pool is None) == (value_dim is None):
        raise ValueError("paged_attention takes a v_pool, or v_pool=None and value_dim")
    options: dict[str, Any] = dict(
        layer=layer,
        positions=positions,
        q_positions=q_positions,
        window=window,
        soft_cap=soft_cap,
        scale=scale,
        value_dim=value_dim,
        k_scale=k_scale,
        k_min=k_min,
        v_scale=v_scale,
        v_min=v_min,
    )
    pools = {"k_pool": k_pool} if v_pool is None else {"k_pool": k_pool, "v_pool": v_pool}
    block_table, lengths, options = validated(q, pools, block_table, lengths, options)
    options["q_positions"] = _queries(q, lengths, options["q_positions"])
    if backend not in TAKE_BITS:
        k_pool = numbers(k_pool, k_scale, k_min)
        v_pool = None if v_pool is None else numbers(v_pool, v_scale, v_min)
    call = choose(
        "paged_attention", BACKENDS, backend, q=q, k_pool=k_pool, v_pool=v_pool, block_table=block_table, **options
    )
    return call(q, k_pool, v_pool, block_table, lengths, **options)


def paged_weights(
    q: jax.Array,
    k_pool: jax.Array,
    block_table: jax.Array,
    lengths: jax.Array,
    *,
    lse: jax.Array,
    row_weights: jax.Array,
    layer: jax.Array,
    positions: jax.Array | None = None,
    q_positions: jax.Array | None = None,
    window: jax.Array | int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    k_scale: jax.Array | None = None,
    k_min: jax.Array | None = None,
    backend: str | None = None,
) -> jax.Array:
    """The attention mass each slot receives: a second pass with the final lse.

    Args:
      lse: float32[B, T, H] from `paged_attention` (after any merge). row_weights: float32[B, T].

    Returns:
      float32[B, K, S], summed over the query heads of each KV head and over rows; 0 in slots nobody sees.

    Raises:
      ValueError, NotImplementedError: as `paged_attention`.
    """
    backend = READS_BY.get(backend or "", backend)
    options: dict[str, Any] = dict(
        lse=lse,
        row_weights=row_weights,
        layer=layer,
        positions=positions,
        q_positions=q_positions,
        window=window,
        soft_cap=soft_cap,
        scale=scale,
        k_scale=k_scale,
        k_min=k_min,
    )
    block_table, lengths, options = validated(q, {"k_pool": k_pool}, block_table, lengths, options)
    options["q_positions"] = _queries(q, lengths, options["q_positions"])
    floats(lse, q.shape[:3], "lse")
    floats(row_weights, q.shape[:2], "row_weights")
    if backend not in TAKE_BITS:
        k_pool = numbers(k_pool, k_scale, k_min)
    call = choose("paged_weights", BACKENDS, backend, q=q, k_pool=k_pool, block_table=block_table, **options)
    return call(q, k_pool, block_table, lengths, **options)


def _queries(q: jax.Array, lengths: jax.Array, q_positions: jax.Array | None) -> jax.Array:
    if q_positions is not None:
        return q_positions
    return jnp.max(lengths, axis=1, keepdims=True) - q.shape[1] + jnp.arange(q.shape[1])
