"""Writing new keys and values: turn keys to their positions, quantise, scatter into pages. XLA does it, as one fusion.

There is no kernel of our own: none is written before a measurement on a GPU says that it would be faster.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.append import reference
from pallas_kernels.validation import floats, integers


class Pools(NamedTuple):
    """Where keys and values lie; a scale per vector if they are int8 codes.

    Attributes:
      k, v: [P, layers_per_page, heads_per_page, page, D]; v None: the value lies within the key.
      k_scale, v_scale: float32[P, layers_per_page, heads_per_page, page] or None.
    """

    k: jax.Array
    v: jax.Array | None
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None


def append(
    pools: Pools,
    k: jax.Array,
    v: jax.Array | None,
    block_table: jax.Array,
    slots: jax.Array,
    positions: jax.Array,
    *,
    layer: jax.Array,
    frequencies: jax.Array,
) -> Pools:
    """The pools with new keys, turned to their positions, and new values in their slots.

    Donate the pools, or carry them through a loop: else each call copies them.

    Args:
      k: [B, T, K, D], unrotated; v: [B, T, K, Dv].
      block_table: int32[B, K or 1, N], -1 is no page. slots: int32[B, K or 1, T], -1 is not stored; no two tokens of
        a sequence in the same slot. What has no page is dropped.
      positions: int32[B, T]. layer: int32[1], the layer's place within a page.
      frequencies: float32[R / 2], radians per position of each pair (i, i + R / 2) of the last R channels.

    Raises:
      ValueError: an argument is not as described.
    """
    block_table, slots, positions, layer = _validate(
        pools, k, v, block_table, slots, positions, layer=layer, frequencies=frequencies
    )
    return Pools(*reference.append(*pools, k, v, block_table, slots, positions, layer=layer, frequencies=frequencies))


def _validate(
    pools: Pools,
    k: jax.Array,
    v: jax.Array | None,
    table: jax.Array,
    slots: jax.Array,
    positions: jax.Array,
    *,
    layer: jax.Array,
    frequencies: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """block_table, slots, positions and layer as int32."""
    if k.ndim != 4 or table.ndim != 3 or pools.k.ndim != 5:
        raise ValueError(
            "append takes k[B,T,K,D], block_table[B,K or 1,N] and pools [P,layers,heads,page,D]; "
            f"got {k.shape}, {table.shape} and {pools.k.shape}"
        )
    batch, tokens, kv_heads, width = k.shape
    rows, heads_per_page = table.shape[1], pools.k.shape[2]
    if kv_heads != max(rows, heads_per_page) or (rows > 1 and heads_per_page != 1):
        raise ValueError(f"{kv_heads} KV heads do not fit {rows} rows and {heads_per_page} heads per page")
    if (v is None) != (pools.v is None):
        raise ValueError("append takes values if and only if there is a pool for them")
    for name, new, pool, scale in (("k", k, pools.k, pools.k_scale), ("v", v, pools.v, pools.v_scale)):
        if new is None or pool is None:
            continue
        if new.shape[:3] != k.shape[:3] or pool.shape != (*pools.k.shape[:4], new.shape[-1]):
            raise ValueError(
                f"a pool must be {(*pools.k.shape[:4], 'D')} for new vectors {(*k.shape[:3], 'D')}, "
                f"got {name} {new.shape} and its pool {pool.shape}"
            )
        if (scale is not None) != (pool.dtype == jnp.int8):
            raise ValueError(f"a pool of int8, and no other, takes a scale per vector; the {name} pool is {pool.dtype}")
        if scale is not None:
            floats(scale, pool.shape[:4], f"{name}_scale")
    if frequencies.ndim != 1 or 2 * frequencies.shape[0] > width:
        raise ValueError(
            f"frequencies must be of up to {width // 2} pairs of a key's channels, got {frequencies.shape}"
        )
    return (
        integers(table, (batch, rows, table.shape[2]), "block_table"),
        integers(slots, (batch, rows, tokens), "slots"),
        integers(positions, (batch, tokens), "positions"),
        integers(layer, (1,), "layer"),
    )
