"""Paged attention on Hopper through Mosaic GPU: packs queries, says what each row sees, runs the kernel, merges.

What depends on lengths and positions alone (`Sight`) is plain jnp: it is the same for all layers of a step, so the
compiler computes it once. The kernels are imported when first called: where no GPU is, nobody waits for Pallas.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import device
from pallas_kernels.merge import merge
from pallas_kernels.paged_attention.mosaic_plan import (
    BLOCK,
    CODES_AT_ONCE,
    Plan,
    attention_plan,
    groups_of,
    weights_plan,
)
from pallas_kernels.paged_attention.mosaic_scores import LOG2_E, Scoring
from pallas_kernels.paged_attention.reference import codes_per_byte
from pallas_kernels.tuning import Key, bucket, tuned

DTYPES = ("bfloat16", "float16")
CODES = ("int8", "float8_e4m3fn")
SCALE_BYTES = 4
"""Of one vector's float32 scale."""
COPY_ALIGNMENT = 128
"""Bytes at a multiple of which a tensor copy must land in shared memory; pages' scales land one behind the other."""


@dataclasses.dataclass(frozen=True)
class Sight:
    """What query rows see.

    Attributes:
      lower, upper: int32[B, K or 1, rows], the positions a row sees, from and before; nothing for padding.
      bounds: int32[2, B, K or 1, tiles], the blocks from and before which a tile sees anything.
      limit: int32[B, K or 1], slots in use.
      positions, holes: int32[B, K or 1, blocks * BLOCK] and [B, K or 1, blocks], or None where slots stand in order.
    """

    lower: jax.Array
    upper: jax.Array
    bounds: jax.Array
    limit: jax.Array
    positions: jax.Array | None
    holes: jax.Array | None


def sight(
    table: jax.Array,
    lengths: jax.Array,
    positions: jax.Array | None,
    q_positions: jax.Array,
    window: jax.Array | int | None,
    page: int,
    group: int,
    tiles: int,
    rows: int,
) -> Sight:
    """Of `tiles` tiles of `rows` query rows, `group` rows a token; the rest as `paged_attention` has it."""
    asked = jnp.repeat(jnp.maximum(q_positions, -1), group, axis=1)
    asked = jnp.pad(asked, ((0, 0), (0, tiles * rows - asked.shape[1])), constant_values=-1)[:, None]
    limit = jnp.minimum(lengths, table.shape[2] * page).astype(jnp.int32)
    asked = jnp.broadcast_to(asked, (*limit.shape, tiles * rows))
    upper = asked + 1
    lower = jnp.zeros_like(asked) if window is None else jnp.maximum(upper - window, 0).astype(jnp.int32)
    places, holes = None, None
    if positions is None:
        upper = jnp.minimum(upper, limit[..., None])
        ends = jnp.max(upper.reshape(*limit.shape, tiles, rows), axis=-1)
        begins = jnp.where(upper > lower, lower, jnp.iinfo(jnp.int32).max)
        begins = jnp.minimum(jnp.min(begins.reshape(*limit.shape, tiles, rows), axis=-1), ends)
    else:
        order = jnp.arange(table.shape[2] * page)
        held = jnp.repeat(table >= 0, page, axis=-1) & (order < limit[..., None])
        places = jnp.where(held, positions, -1).astype(jnp.int32)
        places = jnp.pad(places, ((0, 0), (0, 0), (0, -places.shape[2] % BLOCK)), constant_values=-1)
        holes = jnp.any(places.reshape(*limit.shape, -1, BLOCK) < 0, axis=-1).astype(jnp.int32)
        some = jnp.any(upper.reshape(*limit.shape, tiles, rows) > 0, axis=-1)
        ends = jnp.where(some, limit[..., None], 0)
        begins = jnp.zeros_like(ends)
    bounds = jnp.stack([begins // BLOCK, (ends + BLOCK - 1) // BLOCK]).astype(jnp.int32)
    return Sight(lower, upper.astype(jnp.int32), bounds, limit, places, holes)


def packed(q: jax.Array, kv_heads: int, rows: int) -> jax.Array:
    """q [B, T, H, D] -> [B, K, rows, D], tokens first, a KV head's query heads within."""
    batch, tokens, heads, width = q.shape
    q = jnp.moveaxis(q.reshape(batch, tokens, kv_heads, heads // kv_heads, width), 2, 1)
    q = q.reshape(batch, kv_heads, tokens * (heads // kv_heads), width)
    return jnp.pad(q, ((0, 0), (0, 0), (0, rows - q.shape[2]), (0, 0)))


def unpacked(x: jax.Array, tokens: int, heads: int) -> jax.Array:
    """[B, K, rows, ...] -> [B, T, H, ...]; rows beyond the last query are dropped."""
    batch, kv_heads = x.shape[:2]
    x = x[:, :, : tokens * heads // kv_heads].reshape(batch, kv_heads, tokens, heads // kv_heads, *x.shape[3:])
    return jnp.moveaxis(x, 1, 2).reshape(batch, tokens, heads, *x.shape[4:])


def unavailable() -> str | None:
    """Why the default device cannot run these kernels, or None."""
    return device.lacks("9.0")


def unsupported(**call: Any) -> str | None:
    """Why a call cannot be served whatever the device, or None."""
    q, pools = call["q"], {"k_pool": call["k_pool"]}
    if call.get("v_pool") is not None:
        pools["v_pool"] = call["v_pool"]
    for name in ("scale", "soft_cap"):
        if not isinstance(call.get(name), int | float | None):
            return f"takes a Python number as {name}"
    if q.dtype.name not in DTYPES:
        return f"queries must be one of {', '.join(DTYPES)}, got {q.dtype.name}"
    for name, pool in pools.items():
        scale, minimum = (call.get(f"{name[0]}_{part}") for part in ("scale", "min"))
        if pool.dtype.name == "uint8":
            if (reason := _unpackable(name, pool, scale, minimum, call)) is not None:
                return reason
            continue
        if minimum is not None or (scale is not None and scale.ndim != 4):
            return f"{name} has scales for groups of channels; this backend takes one scale per vector, and no minima"
        if scale is None and pool.dtype != q.dtype:
            return f"{name} is {pool.dtype.name}, and without scales it must be as the queries are, {q.dtype.name}"
        if scale is not None and pool.dtype.name not in CODES:
            return f"codes must be one of {', '.join(CODES)}, got a {name} of {pool.dtype.name}"
        if pool.dtype != call["k_pool"].dtype:
            return f"both pools must hold the same dtype, got {call['k_pool'].dtype.name} and {pool.dtype.name}"
        if pool.shape[-1] % 64:
            return f"channels must be a multiple of 64, got a {name} of {pool.shape[-1]}"
    page = call["k_pool"].shape[3]
    if page % BLOCK and (BLOCK % page or page < 8):
        return f"a page must hold 8, 16, 32 or a multiple of {BLOCK} slots, got {page}"
    if call.get("k_scale") is not None and call["k_scale"].ndim == 4 and page * SCALE_BYTES % COPY_ALIGNMENT:
        return f"the scales of a page of {page} slots fill no multiple of {COPY_ALIGNMENT} bytes"
    if "lse" in call:
        plan = weights_plan(q, call["k_pool"], call["block_table"])
        return None if plan.stages >= 2 else "queries and keys of this width do not fit in shared memory"
    in_key = "v_pool" not in pools
    if in_key and call.get("k_scale") is not None:
        return "values within keys that are codes"
    scales = {name: call.get(name) for name in ("k_scale", "v_scale")}
    plan = attention_plan(q, call["k_pool"], call.get("v_pool"), call["block_table"], call.get("value_dim"), **scales)
    if plan.columns % 64:
        return f"a value of {plan.value_width} channels: each of two warpgroups takes half, a multiple of 64"
    if plan.columns > 256:
        return f"a value of {plan.value_width} channels: its sums do not fit in registers"
    return None if plan.stages >= 2 else "keys and values of this width do not fit in shared memory"


def _unpackable(name: str, pool: Any, scale: Any, minimum: Any, call: dict[str, Any]) -> str | None:
    """Why codes that share bytes cannot be read, or None."""
    packed = codes_per_byte(call["q"], call["k_pool"])
    width, page = pool.shape[-1] * packed, pool.shape[3]
    if "lse" in call:
        return "attention weights from codes that share bytes"
    if "v_pool" not in call or call["v_pool"] is None:
        return "values within keys that are codes"
    if call["v_pool"].dtype != call["k_pool"].dtype:
        return "codes that share bytes in one of two pools"
    if packed not in (2, 4):
        return f"a byte must hold 2 codes of 4 bits or 4 of 2 bits, got {packed} of them"
    if width not in (64, 128):
        return f"codes that share bytes must be of 64 or 128 channels, got a {name} of {width}"
    if pool.shape[-1] % CODES_AT_ONCE:
        return f"codes that share bytes must fill a multiple of {CODES_AT_ONCE}, got a {name} of {pool.shape[-1]} bytes"
    if scale is None or minimum is None or scale.shape != minimum.shape or scale.ndim != 5:
        return f"codes that share bytes need scales and minima for groups of channels of a {name}"
    if scale.dtype != jnp.float16 or minimum.dtype != jnp.float16:
        return f"scales of groups of channels must be float16, got {scale.dtype.name}"
    groups = groups_of(pool, scale)
    if groups == 0:
        if name == "v_pool" or page < 32:
            return "scales per channel of a page must be those of keys, and the page must hold 32 slots or more"
        return None
    if width % groups or width // groups % CODES_AT_ONCE:
        return f"groups of channels that share a scale must be multiples of {CODES_AT_ONCE}, got {width // groups}"
    if min(page, BLOCK) * groups % 64:
        return f"the scales of a page of {page} slots with {groups} groups fill no multiple of {COPY_ALIGNMENT} bytes"
    return None


def paged_attention(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array | None,
    block_table: jax.Array,
    lengths: jax.Array,
    *,
    layer: jax.Array,
    positions: jax.Array | None,
    q_positions: jax.Array,
    window: jax.Array | int | None,
    soft_cap: float | None,
    scale: float,
    value_dim: int | None,
    k_scale: jax.Array | None,
    k_min: jax.Array | None,
    v_scale: jax.Array | None,
    v_min: jax.Array | None,
    config: Mapping[str, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.paged_attention`. config: "stages" and "splits" of `Plan`; None: as tuned, or what the plan makes."""
    batch, tokens, heads, width = q.shape
    kv_heads, page = max(block_table.shape[1], k_pool.shape[2]), k_pool.shape[3]
    if config is None and tokens == 1:
        kernel = "latent" if v_pool is None else "decode"
        slots = bucket(block_table.shape[2] * page)
        key = Key(kernel, k_pool.dtype.name, width, heads // kv_heads, page, slots, bucket(batch))
        config = tuned("paged_attention", key)
    plan = attention_plan(q, k_pool, v_pool, block_table, value_dim, k_scale=k_scale, v_scale=v_scale, **(config or {}))
    group = heads // kv_heads
    seen = sight(block_table, lengths, positions, q_positions, window, page, group, plan.tiles, plan.held_rows)
    operands = {
        "q": packed(q, kv_heads, plan.tiles * plan.rows),
        "k": k_pool,
        "v": v_pool,
        "table": block_table,
        "layer": layer,
        "bounds": seen.bounds,
        "lower": seen.lower if window is not None or positions is not None else None,
        "upper": seen.upper,
        "limit": seen.limit,
        "positions": seen.positions,
        "holes": seen.holes,
        **(
            {"k_scale": k_scale, "v_scale": v_scale}
            if plan.packed == 1
            else _scales(plan, k_scale, k_min, v_scale, v_min)
        ),
    }
    present = {name: value for name, value in operands.items() if value is not None}
    from pallas_kernels.paged_attention.mosaic_read import read

    outs, lses = read(plan, Scoring(scale, soft_cap, window is not None), present, q.dtype)
    lses = lses[..., : plan.rows] if plan.tiles == 1 else lses
    out, lse = (outs[0], lses[0]) if plan.parts == 1 else merge(outs, lses)
    return unpacked(out, tokens, heads).astype(q.dtype), unpacked(lse, tokens, heads)


def _scales(plan: Plan, *scales: jax.Array | None) -> dict[str, jax.Array]:
    """Those of parts of vectors, and minima, in rows that the copy engine takes."""
    found = {}
    for name, scale in zip(("k_step", "k_low", "v_step", "v_low"), scales, strict=True):
        assert scale is not None
        columns = plan.scales_of_page(name[0])[1]
        found[name] = scale.reshape(*scale.shape[:3], -1, columns)
    return found


def paged_weights(
    q: jax.Array,
    k_pool: jax.Array,
    block_table: jax.Array,
    lengths: jax.Array,
    *,
    lse: jax.Array,
    row_weights: jax.Array,
    layer: jax.Array,
    positions: jax.Array | None,
    q_positions: jax.Array,
    window: jax.Array | int | None,
    soft_cap: float | None,
    scale: float,
    k_scale: jax.Array | None,
    k_min: jax.Array | None,
    splits: int | None = None,
) -> jax.Array:
    """See `api.paged_weights`. splits: thread blocks that share one sequence; None: what the plan makes."""
    plan = weights_plan(q, k_pool, block_table, splits=splits)
    kv_heads = max(block_table.shape[1], k_pool.shape[2])
    group = q.shape[2] // kv_heads
    seen = sight(block_table, lengths, positions, q_positions, window, plan.page, group, plan.tiles, plan.rows)
    rows = plan.tiles * plan.rows
    some = jnp.isfinite(lse)
    weight = jnp.where(some, row_weights[..., None], 0.0).astype(jnp.float32)
    operands = {
        "q": packed(q, kv_heads, rows),
        "k": k_pool,
        "table": block_table,
        "layer": layer,
        "bounds": seen.bounds,
        "lower": seen.lower if window is not None or positions is not None else None,
        "upper": seen.upper,
        "limit": seen.limit,
        "positions": seen.positions,
        "holes": seen.holes,
        "k_scale": k_scale,
        "lse": packed(jnp.where(some, lse * LOG2_E, 0.0)[..., None], kv_heads, rows)[..., 0],
        "weight": packed(weight[..., None], kv_heads, rows)[..., 0],
    }
    present = {name: value for name, value in operands.items() if value is not None}
    slots = block_table.shape[2] * plan.page
    blocks = -(-slots // BLOCK)
    from pallas_kernels.paged_attention.mosaic_weights import weigh

    mass = weigh(plan, Scoring(scale, soft_cap, window is not None), present, blocks)
    # Blocks that a tile has no reason to read hold whatever was there.
    number = jnp.arange(blocks * BLOCK) // BLOCK
    begins, ends = (jnp.moveaxis(seen.bounds[side], -1, 0)[..., None] for side in (0, 1))
    return jnp.sum(jnp.where((number >= begins) & (number < ends), mass, 0.0), axis=0)[..., :slots]
