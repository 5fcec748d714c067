"""What a call of paged attention must be like, whichever backend serves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from pallas_kernels.validation import heads_of, integers, not_empty, number, window_of

BITS = ("uint16", "uint8", "int8")
"""Integers that pools may hold: bits of bfloat16, of float8_e4m3fn or codes, and codes."""


def validated(
    q: Any, pools: Mapping[str, Any], table: Any, lengths: Any, options: Mapping[str, Any]
) -> tuple[Any, Any, dict[str, Any]]:
    """The table, the lengths and the options as backends take them: int32, and Python numbers where they are known.

    Args:
      pools: "k_pool", and "v_pool" if there is one. options: of `api.paged_attention` or of `api.paged_weights`.

    Raises:
      ValueError: what was given, and what is allowed.
    """
    k_pool = pools["k_pool"]
    if q.ndim != 4 or any(pool.ndim != 5 for pool in pools.values()) or table.ndim != 3:
        given = [jnp.shape(x) for x in (q, *pools.values(), table)]
        raise ValueError(
            "paged attention takes q[B,T,H,D], pools [P,layers,heads,page,D] and block_table[B,K or 1,N]; "
            f"got {', '.join(map(str, given[:-1]))} and {given[-1]}"
        )
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q must be of a floating-point dtype, got {q.dtype}")
    not_empty({"q": q, **pools, "block_table": table})
    batch, tokens, heads, _ = q.shape
    rows, entries = table.shape[1:]
    if rows > 1 and k_pool.shape[2] != 1:
        raise ValueError(f"a row per head needs heads_per_page 1, got {k_pool.shape[2]}")
    heads_of(heads, max(rows, k_pool.shape[2]))
    table = integers(table, (batch, rows, entries), "block_table")
    lengths = integers(lengths, (batch, rows), "lengths")
    found = dict(options)
    found["layer"] = integers(options["layer"], (1,), "layer")
    if options["positions"] is not None:
        found["positions"] = integers(options["positions"], (batch, rows, entries * k_pool.shape[3]), "positions")
    if options["q_positions"] is not None:
        found["q_positions"] = integers(options["q_positions"], (batch, tokens), "q_positions")
    found["window"] = window_of(options["window"])
    found["scale"] = q.shape[-1] ** -0.5 if options["scale"] is None else number(options["scale"], "scale")
    if options["soft_cap"] is not None:
        found["soft_cap"] = number(options["soft_cap"], "soft_cap", positive=True)
    _check_pools(q, pools, options)
    return table, lengths, found


def _check_pools(q: Any, pools: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    k_pool = pools["k_pool"]
    width, held = q.shape[-1], k_pool.shape[-1]
    packed = width // held if k_pool.dtype == jnp.uint8 else 1
    if packed not in (1, 2, 4, 8) or held * packed != width:
        raise ValueError(
            f"keys must be as wide as queries, {width}, or codes of uint8 that fill 1/2, 1/4 or 1/8 of it in bytes; "
            f"got a k_pool of {k_pool.dtype} and width {held}"
        )
    for name, pool in pools.items():
        if pool.shape[:4] != k_pool.shape[:4]:
            raise ValueError(f"v_pool must be {(*k_pool.shape[:4], 'Dv')} as k_pool is, got {pool.shape}")
        scale, low = (options.get(f"{name[0]}_{part}") for part in ("scale", "min"))
        if not jnp.issubdtype(pool.dtype, jnp.floating) and pool.dtype.name not in BITS:
            raise ValueError(f"{name} must hold floating-point numbers or one of {', '.join(BITS)}, got {pool.dtype}")
        if scale is None and pool.dtype.name in ("int8", "uint8"):
            raise ValueError(f"a {name} of {pool.dtype} holds codes, which need a {name[0]}_scale")
        _check_scales(name[0], pool.shape, packed, scale, low)
    if "v_pool" not in pools and any(options.get(name) is not None for name in ("v_scale", "v_min")):
        raise ValueError("v_scale and v_min are of a v_pool, and there is none")
    value_dim = options.get("value_dim")
    if value_dim is not None and not 1 <= value_dim <= width:
        raise ValueError(f"value_dim must be within the key's {width} columns, got {value_dim}")


def _check_scales(name: str, pool: tuple[int, ...], packed: int, scale: Any, low: Any) -> None:
    if scale is None:
        if low is not None:
            raise ValueError(f"{name}_min needs a {name}_scale")
        return
    channels = pool[4] * packed
    by_vector, by_page = pool[:4], (*pool[:3], 1, channels)
    grouped = scale.ndim == 5 and scale.shape[:4] == pool[:4] and scale.shape[4] > 0 and not channels % scale.shape[4]
    if not (scale.shape in (by_vector, by_page) or grouped):
        raise ValueError(
            f"{name}_scale must be per vector {by_vector}, for groups of channels {(*pool[:4], 'groups')} of which "
            f"there are a divisor of {channels}, or per channel of a page {by_page}; got {scale.shape}"
        )
    if low is not None and (low.shape != scale.shape or scale.ndim == 4):
        raise ValueError(
            f"{name}_min must be of the shape of {name}_scale, which must be for groups of channels or per channel of "
            f"a page; got {low.shape} and {scale.shape}"
        )
    for part, array in (("scale", scale), ("min", low)):
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name}_{part} must be of a floating-point dtype, got {array.dtype}")
