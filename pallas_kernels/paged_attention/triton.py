"""Paged attention through Triton, for NVIDIA GPUs of compute capability 8.0 and later.

One kernel serves decoding and chunks, shared rows and a row per head, keys with values inside (MLA), codes with a scale
per vector, and codes that share bytes with a scale and a minimum per group of channels or channel of a page. A long
row is split over programs (Flash-Decoding, Dao et al. 2023) and their parts are merged by XLA.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import device, triton_call
from pallas_kernels.merge import merge
from pallas_kernels.paged_attention.reference import codes_per_byte
from pallas_kernels.tuning import Key, bucket, tuned

CODES = ("int8", "float8_e4m3fn", "float8_e5m2")
MULTIPROCESSORS = 132
"""Of an H100. A split is made only as far as programs are fewer than a few per multiprocessor."""
PROGRAMS_EACH = 2
LEAST_BLOCKS = 4
"""Blocks a split has at least in the longest row a table can hold: each split costs a partial result."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a call is cut up.

    Attributes:
      rows, slots: of a program's tile: packed queries, and slots read at once.
      splits: programs that share one sequence's slots.
      warps, stages: warps of a program, and blocks in flight.
    """

    rows: int
    slots: int
    splits: int
    warps: int
    stages: int


def unavailable() -> str | None:
    """Why the default device cannot run these kernels, or None."""
    return device.lacks(least=triton_call.LEAST)


def unsupported(**call: Any) -> str | None:
    """Why a call cannot be served whatever the device, or None."""
    q, pools = call["q"], [call["k_pool"], call.get("v_pool")]
    if (reason := triton_call.absent()) is not None:
        return reason
    for name in ("scale", "soft_cap"):
        if not isinstance(call.get(name), int | float | None):
            return f"takes a Python number as {name}"
    if q.dtype.name not in triton_call.DTYPES:
        return f"queries must be one of {', '.join(triton_call.DTYPES)}, got {q.dtype.name}"
    for name, pool in zip("kv", pools, strict=True):
        if pool is None:
            continue
        scale = call.get(f"{name}_scale")
        if scale is None and pool.dtype.name not in triton_call.DTYPES:
            return f"a {name}_pool of {pool.dtype.name} needs a scale per vector"
        if pool.dtype.name == "uint8":
            if (reason := _unpackable(name, call)) is not None:
                return reason
            continue
        if scale is not None and (scale.ndim != 4 or call.get(f"{name}_min") is not None):
            return f"{name}_scale must be one number per vector, got shape {scale.shape}"
        if scale is not None and pool.dtype.name not in CODES:
            return f"codes must be one of {', '.join(CODES)}, got {pool.dtype.name}"
        if pool.dtype.name.startswith("float8") and triton_call.target() < 89:
            return f"{pool.dtype.name} needs compute capability 8.9 or later"
        if pool.shape[-1] % 16 or not 16 <= pool.shape[-1] <= 640:
            return f"widths must be multiples of 16 up to 640, got {pool.shape[-1]}"
    if call.get("v_pool") is not None and (call["v_pool"].dtype.name == "uint8") != (
        call["k_pool"].dtype.name == "uint8"
    ):
        return "codes that share bytes must be in both pools or in none"
    if call.get("value_dim") is not None and call["value_dim"] > 512:
        return f"values must be 512 wide at most, got {call['value_dim']}"
    return None


def _unpackable(name: str, call: dict[str, Any]) -> str | None:
    """Why codes that share bytes cannot be read, or None."""
    q, pool = call["q"], call[f"{name}_pool"]
    scale, low = call.get(f"{name}_scale"), call.get(f"{name}_min")
    packed = codes_per_byte(q, call["k_pool"])
    width, page = pool.shape[-1] * packed, pool.shape[3]
    if packed not in (2, 4):
        return f"a byte must hold 2 codes of 4 bits or 4 of 2 bits, got {packed} of them"
    if scale is None or low is None or scale.shape != low.shape or scale.ndim != 5:
        return f"codes that share bytes need a {name}_scale and a {name}_min for each group of channels"
    if pool.shape[-1] % 8 or not 16 <= width <= 640:
        return f"codes that share bytes must fill a multiple of 8 bytes, of up to 640 channels; got {width} channels"
    by_page = scale.shape[3] != page
    if by_page and (page & (page - 1) or scale.shape[-1] != width):
        return f"scales per channel of a page need pages of a power of two, got {page} slots and scales {scale.shape}"
    if not by_page and width % scale.shape[-1]:
        return f"{name}_scale must be of groups that divide {width} channels, got {scale.shape[-1]} of them"
    return None


def tiles(
    rows: int,
    programs: int,
    slots: int,
    width: int,
    slot_bytes: int,
    coded: bool,
    packed: bool = False,
    by_page: bool = False,
    memory: int = 232448,
) -> Tiles:
    """What is used where nothing was measured: what keeps keys in flight and spills no register on an H100.

    Args:
      rows: packed queries of one KV head. programs: B * K. slots: of the longest row. width: of keys or values, the
        wider. slot_bytes: of a key and a value in the queries' dtype. coded: the pool holds codes, whose conversion
        takes registers. packed: several to a byte, with scales for parts of a vector, which take more.
        by_page: with scales for channels of a page, which take most. memory: bytes of shared memory of a program.
    """
    least = triton_call.power_of_two(rows)
    if packed and width > 256:
        shape = (16, 16, 8, 1 if by_page else 2)
    elif packed and width > 128 and least > 16:
        shape = (min(least, 32), 16, 8, 2)
    elif width > 256:
        shape = (min(least, 32), 32, 8, 2 if coded else 3)
    elif width > 128:
        shape = (16, 32, 4, 4) if least <= 16 else (min(least, 32), 32, 8, 2) if coded else (min(least, 64), 64, 8, 2)
    elif least <= 32:
        shape = (least, 64, 8 if coded or least > 16 else 4, 4)
    else:
        shape = (min(least, 128), 32 if coded else 64, 8 if least > 64 else 4, 3)
    block_m, block_n, warps, stages = shape
    while stages > 2 and stages * block_n * slot_bytes + 2 * block_m * width > memory:
        stages -= 1
    while block_n > 16 and stages * block_n * slot_bytes + 2 * block_m * width > memory:
        block_n //= 2
    wanted = -(-MULTIPROCESSORS * PROGRAMS_EACH // (programs * -(-rows // block_m)))
    splits = max(min(wanted, -(-slots // block_n) // LEAST_BLOCKS), 1)
    return Tiles(block_m, block_n, splits, warps, stages)


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
    cut: Tiles | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.paged_attention`. cut: how the call is cut up, None for what was tuned or a rule of thumb."""
    from pallas_kernels.paged_attention.triton_kernel import paged_attention_kernel

    batch, tokens, heads, width = q.shape
    shape = _shape(q, k_pool, block_table)
    kv_heads = heads // shape["GROUP"]
    value = v_pool.shape[-1] if v_pool is not None else value_dim
    assert value is not None
    packed = shape["PACKED"]
    value *= packed if v_pool is not None else 1
    values, v_scale, v_min = (k_pool, k_scale, k_min) if v_pool is None else (v_pool, v_scale, v_min)
    value_main, value_rest = triton_call.power_of_two(value), 0
    if packed > 1:
        value_main, value_rest = _parts(values.shape[-1] * packed, packed)
    if cut is None:
        cut = tiles(
            rows=tokens * shape["GROUP"],
            programs=batch * kv_heads,
            slots=shape["ENTRIES"] * shape["PAGE"],
            width=max(width, value),
            slot_bytes=2 * (width + (0 if v_pool is None else value)),
            coded=k_scale is not None or v_scale is not None,
            packed=packed > 1,
            by_page=packed > 1 and _coding("K", k_pool, k_scale, packed)["K_GROUP"] == 0,
            memory=triton_call.shared_memory(),
        )
        if tokens == 1:
            slots = bucket(shape["ENTRIES"] * shape["PAGE"])
            decode = Key("triton_decode", k_pool.dtype.name, width, shape["GROUP"], shape["PAGE"], slots, bucket(batch))
            cut = dataclasses.replace(cut, **(tuned("paged_attention", decode) or {}))
    out_dtype = q.dtype if cut.splits == 1 else jnp.dtype(jnp.float32)
    outs, lses = triton_call.launch(
        paged_attention_kernel,
        # A parameter that a call does not need gets any array.
        [
            _woven(q, shape["PACKED"]),
            k_pool,
            values,
            *_ints(block_table, lengths, layer),
            *_ints(lengths if positions is None else positions, q_positions, _or(window, lengths)),
            lengths if k_scale is None else k_scale,
            lengths if v_scale is None else v_scale,
            lengths if k_min is None else k_min,
            lengths if v_min is None else v_min,
        ],
        [
            jax.ShapeDtypeStruct((cut.splits, batch, tokens, heads, value), out_dtype),
            jax.ShapeDtypeStruct((cut.splits, batch, tokens, heads), jnp.float32),
        ],
        (-(-tokens * shape["GROUP"] // cut.rows) * cut.splits, kv_heads, batch),
        warps=cut.warps,
        stages=cut.stages,
        BATCH=batch,
        **shape,
        VALUE=value,
        VALUE_BLOCK=value_main,
        VALUE_REST=value_rest,
        VALUE_STRIDE=values.shape[-1],
        VALUE_IN_KEY=v_pool is None and (packed > 1 or value == shape["MAIN"]),
        SCALE=float(scale),
        SOFT_CAP=None if soft_cap is None else float(soft_cap),
        WINDOWED=window is not None,
        POSITIONED=positions is not None,
        K_SCALED=k_scale is not None,
        V_SCALED=v_scale is not None,
        **_coding("K", k_pool, k_scale, packed),
        **_coding("V", values, v_scale, packed),
        SPLITS=cut.splits,
        BLOCK_M=cut.rows,
        BLOCK_N=cut.slots,
    )
    if cut.splits == 1:
        return outs[0], lses[0]
    out, lse = merge(outs, lses)
    return out.astype(q.dtype), lse


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
) -> jax.Array:
    """See `api.paged_weights`. A program holds a block of slots and goes over all rows: no two add to one number."""
    from pallas_kernels.paged_attention.triton_kernel import paged_weights_kernel

    batch, tokens, heads, width = q.shape
    shape = _shape(q, k_pool, block_table)
    kv_heads, slots = heads // shape["GROUP"], shape["ENTRIES"] * shape["PAGE"]
    block_m = min(64 if width <= 128 else 32, triton_call.power_of_two(tokens * shape["GROUP"]))
    block_n = 64 if width <= 256 else 32
    (mass,) = triton_call.launch(
        paged_weights_kernel,
        [
            _woven(q, shape["PACKED"]),
            k_pool,
            *_ints(block_table, lengths, layer),
            *_ints(lengths if positions is None else positions, q_positions, _or(window, lengths)),
            lengths if k_scale is None else k_scale,
            lengths if k_min is None else k_min,
            lse.astype(jnp.float32),
            row_weights.astype(jnp.float32),
        ],
        [jax.ShapeDtypeStruct((batch, kv_heads, slots), jnp.float32)],
        (-(-slots // block_n), kv_heads, batch),
        warps=4,
        stages=2,
        **shape,
        SCALE=float(scale),
        SOFT_CAP=None if soft_cap is None else float(soft_cap),
        WINDOWED=window is not None,
        POSITIONED=positions is not None,
        K_SCALED=k_scale is not None,
        **_coding("K", k_pool, k_scale, shape["PACKED"]),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
    )
    return mass


def _shape(q: jax.Array, k_pool: jax.Array, block_table: jax.Array) -> dict[str, int]:
    """What both kernels know of their arguments' shapes."""
    tokens, heads, width = q.shape[1:]
    layers, page_heads, page = k_pool.shape[1:4]
    packed = codes_per_byte(q, k_pool)
    main, rest = _parts(width, packed)
    return dict(
        TOKENS=tokens,
        HEADS=heads,
        GROUP=heads // max(block_table.shape[1], page_heads),
        ROWS=block_table.shape[1],
        ENTRIES=block_table.shape[2],
        LAYERS=layers,
        PAGE_HEADS=page_heads,
        PAGE=page,
        WIDTH=width,
        MAIN=main,
        REST=rest,
        PACKED=packed,
    )


def _woven(q: jax.Array, packed: int) -> jax.Array:
    """q with the channels whose codes share a byte side by side, as the kernel has them of a pool."""
    if packed == 1:
        return q
    return q.reshape(*q.shape[:-1], packed, -1).swapaxes(-1, -2).reshape(q.shape)


def _parts(width: int, packed: int) -> tuple[int, int]:
    """MAIN + REST tile columns of vectors of `width` channels, `packed` of them in a byte."""
    main, rest = triton_call.two_parts(width // packed)
    return main * packed, rest * packed


def _coding(name: str, pool: jax.Array, scale: jax.Array | None, packed: int) -> dict[str, int]:
    """Channels that share a scale, 0 for those of a page; and over how many bytes all their codes' scales are the same.

    Runs are powers of two, as everything in a tile.
    """
    if packed == 1 or scale is None or scale.shape[3] != pool.shape[3]:
        return {f"{name}_GROUP": 0, f"{name}_RUN": 1}
    group = pool.shape[-1] * packed // scale.shape[-1]
    shared = math.gcd(group, pool.shape[-1])
    return {f"{name}_GROUP": group, f"{name}_RUN": shared & -shared}


def _or(window: jax.Array | int | None, other: jax.Array) -> jax.Array:
    return other if window is None else jnp.asarray(window).reshape(1)


def _ints(*arrays: jax.Array) -> list[jax.Array]:
    return [array.astype(jnp.int32) for array in arrays]
