"""Paged attention in plain jnp, a block of pages at a time: time follows the lengths, not the width of the table.

The loop makes as many trips as the longest sequence needs, and each reads what fits a processor's cache. It has no
gradient; `reference` has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.reference import codes_per_byte, dequantised, seen_and_held
from pallas_kernels.softmax import column_weights, heads_last, scores, weighted

BLOCK_ELEMENTS = {"cpu": 2**18}
"""Elements of keys and values together that one trip works on; what a core's second-level cache holds."""
ELSEWHERE = 2**25
"""The same for accelerators, where a trip must keep the whole chip busy."""


def unsupported(**call: object) -> str | None:
    """Serves every call."""
    return None


@dataclasses.dataclass(frozen=True)
class Pages:
    """The table cut into blocks of `pages` pages.

    Attributes:
      table: int32[B, K or 1, blocks * pages], padded with -1.
      lengths: int32[B, K or 1], 0 for sequences without a query.
      positions: int32[B, K or 1, blocks * pages * page] or None, as `api.paged_attention` takes them.
      first, last: int32[], the blocks from and before which anything may be visible.
    """

    table: jax.Array
    lengths: jax.Array
    positions: jax.Array | None
    first: jax.Array
    last: jax.Array
    pages: int
    page: int

    @property
    def slots(self) -> int:
        """Slots of a block."""
        return self.pages * self.page

    def block(self, number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of one block: its table, the lengths left for it, and where its slots' tokens stand."""
        table = jax.lax.dynamic_slice_in_dim(self.table, number * self.pages, self.pages, 2)
        begin = number * self.slots
        if self.positions is None:
            where = jnp.broadcast_to(begin + jnp.arange(self.slots), (*table.shape[:2], self.slots))
        else:
            where = jax.lax.dynamic_slice_in_dim(self.positions, begin, self.slots, 2)
        return table, self.lengths - begin, where


def cut(
    q: jax.Array,
    k_pool: jax.Array,
    table: jax.Array,
    lengths: jax.Array,
    positions: jax.Array | None,
    q_positions: jax.Array,
    window: jax.Array | int | None,
) -> Pages:
    """Chooses the block and finds which blocks this call has to read."""
    batch, _, _, width = q.shape
    page, entries = k_pool.shape[3], table.shape[2]
    kv_heads = max(table.shape[1], k_pool.shape[2])
    per_slot = batch * 2 * kv_heads * width
    budget = BLOCK_ELEMENTS.get(jax.default_backend(), ELSEWHERE)
    pages = min(max(budget // (per_slot * page), 1), entries)
    missing = -entries % pages
    slots = pages * page
    asked = q_positions >= 0
    # A table may be given shorter than the row: a block beyond it would be the last one, read again.
    lengths = jnp.minimum(jnp.where(jnp.any(asked, axis=1)[:, None], lengths, 0), entries * page)
    first = jnp.zeros((), jnp.int32)
    if window is not None and positions is None:
        earliest = jnp.min(jnp.where(asked, q_positions, entries * page)) - window + 1
        first = jnp.maximum(earliest, 0).astype(jnp.int32) // slots
    return Pages(
        table=jnp.pad(table, ((0, 0), (0, 0), (0, missing)), constant_values=-1),
        lengths=lengths,
        positions=None
        if positions is None
        else jnp.pad(positions, ((0, 0), (0, 0), (0, missing * page)), constant_values=-1),
        first=first,
        # A table may be cut to its first pages (sinks), whatever the lengths say.
        last=jnp.minimum((jnp.max(lengths) + slots - 1) // slots, (entries + missing) // pages),
        pages=pages,
        page=page,
    )


Fetch = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""A block's table int32[B, K or 1, n] and where its slots' tokens stand -> keys and values [B, K, S, D]."""


def attend_blocks(
    cuts: Pages,
    q: jax.Array,
    kv_heads: int,
    value_dim: int,
    fetch: Fetch,
    *,
    q_positions: jax.Array,
    window: jax.Array | int | None,
    soft_cap: float | None,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Attention to whatever `fetch` gives of each block: a softmax kept up from block to block.

    (Milakov and Gimelshein 2018, 1805.02867.) Returns out [B, T, H, Dv] and lse float32[B, T, H].
    """
    batch, tokens, heads, _ = q.shape
    rows = (batch, kv_heads, heads // kv_heads, tokens)

    def trip(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, out = carry
        table, left, where = cuts.block(number)
        k, v = fetch(table, where)
        mask, held = seen_and_held(table, left, where, q_positions, window, cuts.page)
        # Unused slots may hold anything, NaN too, and a weight of 0 does not silence a NaN.
        v = jnp.where(held[..., None], v, 0)
        masked = jnp.where(mask, scores(q, k, scale, soft_cap), -jnp.inf)
        higher = jnp.maximum(top, jnp.max(masked, axis=-1))
        shift = jnp.where(jnp.isfinite(higher), higher, 0.0)
        weights = jnp.exp(masked - shift[..., None])
        fade = jnp.exp(top - shift)
        added = weighted(weights, v)
        return higher, total * fade + jnp.sum(weights, axis=-1), out * fade[..., None] + added

    nothing = (jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros((*rows, value_dim)))
    top, total, out = jax.lax.fori_loop(cuts.first, cuts.last, trip, nothing)
    some = total != 0
    out = jnp.where(some[..., None], out / jnp.where(some, total, 1.0)[..., None], 0.0)
    lse = jnp.where(some, jnp.log(jnp.where(some, total, 1.0)) + jnp.where(jnp.isfinite(top), top, 0.0), -jnp.inf)
    return heads_last(out.astype(q.dtype)), heads_last(lse)


def weigh_blocks(
    cuts: Pages,
    q: jax.Array,
    kv_heads: int,
    fetch_keys: Callable[[jax.Array, jax.Array], jax.Array],
    slots: int,
    *,
    lse: jax.Array,
    row_weights: jax.Array,
    q_positions: jax.Array,
    window: jax.Array | int | None,
    soft_cap: float | None,
    scale: float,
) -> jax.Array:
    """The attention mass each of the table's slots receives, of what `fetch_keys` gives: float32[B, K, slots]."""

    def trip(number: jax.Array, mass: jax.Array) -> jax.Array:
        table, left, where = cuts.block(number)
        mask, _ = seen_and_held(table, left, where, q_positions, window, cuts.page)
        some = column_weights(q, fetch_keys(table, where), mask, lse, row_weights, scale, soft_cap)
        return jax.lax.dynamic_update_slice_in_dim(mass, some, number * cuts.slots, 2)

    mass = jnp.zeros((q.shape[0], kv_heads, cuts.table.shape[2] * cuts.page))
    return jax.lax.fori_loop(cuts.first, cuts.last, trip, mass)[..., :slots]


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
) -> tuple[jax.Array, jax.Array]:
    """See `api.paged_attention`."""
    cuts = cut(q, k_pool, block_table, lengths, positions, q_positions, window)
    kv_heads = max(block_table.shape[1], k_pool.shape[2])
    packed = codes_per_byte(q, k_pool)
    width = v_pool.shape[-1] * packed if v_pool is not None else value_dim or 0

    def fetch(table: jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array]:
        k = dequantised(k_pool, k_scale, k_min, table, layer, q.dtype, packed)
        if v_pool is None:
            return k, k[..., :width]
        return k, dequantised(v_pool, v_scale, v_min, table, layer, q.dtype, packed)

    return attend_blocks(
        cuts, q, kv_heads, width, fetch, q_positions=q_positions, window=window, soft_cap=soft_cap, scale=scale
    )


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
    """See `api.paged_weights`."""
    cuts = cut(q, k_pool, block_table, lengths, positions, q_positions, window)
    kv_heads = max(block_table.shape[1], k_pool.shape[2])
    packed = codes_per_byte(q, k_pool)

    def fetch_keys(table: jax.Array, where: jax.Array) -> jax.Array:
        return dequantised(k_pool, k_scale, k_min, table, layer, q.dtype, packed)

    return weigh_blocks(
        cuts,
        q,
        kv_heads,
        fetch_keys,
        block_table.shape[2] * cuts.page,
        lse=lse,
        row_weights=row_weights,
        q_positions=q_positions,
        window=window,
        soft_cap=soft_cap,
        scale=scale,
    )
