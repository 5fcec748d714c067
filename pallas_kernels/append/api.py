"""Writing new keys and values: turn keys to their positions, quantise, scatter into pages. XLA does it, as one fusion.

There is no kernel of our own: none is written before a measurement on a GPU says that it would be faster.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

from pallas_kernels.append import reference


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
    """
    rows, heads_per_page = block_table.shape[1], pools.k.shape[2]
    if slots.shape != (k.shape[0], rows, k.shape[1]) or positions.shape != k.shape[:2]:
        raise ValueError(
            f"append takes slots {(k.shape[0], rows, k.shape[1])} and positions {k.shape[:2]}, "
            f"got {slots.shape} and {positions.shape}"
        )
    if k.shape[2] != max(rows, heads_per_page) or (rows > 1 and heads_per_page != 1):
        raise ValueError(f"{k.shape[2]} KV heads do not fit {rows} rows and {heads_per_page} heads per page")
    if (v is None) != (pools.v is None):
        raise ValueError("append takes values if and only if there is a pool for them")
    return Pools(*reference.append(*pools, k, v, block_table, slots, positions, layer=layer, frequencies=frequencies))
