"""Who sees whom, as numbers a kernel can compare: each query sees the keys whose position lies in its span.

Causality, windows, lengths, segments and padding all become one test, `low <= position <= high`, and which blocks of
keys a tile of queries has to read follows from the blocks' least and greatest positions, whatever their order.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

NOBODY = -1
EVERYTHING = 2**31 - 1
MOST_SEGMENTED = 46340
"""Tokens with segment ids: a segment's number times the count of tokens must fit 32 bits."""


class Spans(NamedTuple):
    """Positions of keys and what each query sees of them; the first axis is 1 where sequences do not differ.

    Attributes:
      positions: int32[B or 1, S], -1 for a key nobody sees.
      low, high: int32[B or 1, T]; low > high for a query that sees nothing.
    """

    positions: jax.Array
    low: jax.Array
    high: jax.Array

    def padded(self, queries: int, keys: int) -> Spans:
        """With queries that see nothing and keys nobody sees at the end, to these numbers."""

        def pad(x: jax.Array, to: int, value: int) -> jax.Array:
            return jnp.pad(x, ((0, 0), (0, to - x.shape[1])), constant_values=value)

        return Spans(pad(self.positions, keys, NOBODY), pad(self.low, queries, 0), pad(self.high, queries, NOBODY))


def spans(
    queries: int,
    keys: int,
    *,
    causal: bool,
    window: jax.Array | int | None,
    lengths: jax.Array | None,
    segment_ids: jax.Array | None,
    positions: jax.Array | None,
    q_positions: jax.Array | None,
) -> Spans:
    """Arguments as in `api.attention`, for T queries and S keys."""
    order = jnp.arange(keys, dtype=jnp.int32)[None]
    where = order if positions is None else positions.astype(jnp.int32)
    asking = jnp.arange(keys - queries, keys, dtype=jnp.int32)[None]
    asking = asking if q_positions is None else q_positions.astype(jnp.int32)
    low, high = jnp.zeros_like(asking), asking
    if not causal:
        high = jnp.where(asking >= 0, EVERYTHING, NOBODY)
    elif window is not None:
        # A window may be as large as an int32 can be: subtract from what cannot be negative.
        low = jnp.maximum(jnp.maximum(asking, 0) - jnp.maximum(jnp.asarray(window, jnp.int32) - 1, 0), 0)
        high = jnp.where(jnp.asarray(window) > 0, asking, NOBODY)
    if lengths is not None:
        where = jnp.where(order < lengths[:, None], where, NOBODY)
    if segment_ids is not None:
        # Equal ids get one number below S, so that number * S + position tells segments apart and keeps the order.
        number = jax.vmap(lambda ids: jnp.searchsorted(jnp.sort(ids), ids))(segment_ids).astype(jnp.int32) * keys
        where = jnp.where(where >= 0, where + number, NOBODY)
        low = low + number
        high = jnp.where(high >= 0, jnp.minimum(high, keys - 1) + number, NOBODY)
    return Spans(where, low, high)


def key_blocks(of: Spans, tile: int, block: int) -> jax.Array:
    """Which blocks of keys each tile of queries reads: int32[B or 1, tiles, 4] = (first, last, plain, masked).

    Some query of the tile may see blocks first to last - 1, and none sees any other. Blocks plain to masked - 1 are
    among them, and every query that sees anything sees all of them: they need no mask.
    """
    return _ranges(*_seen(of, tile, block))


def query_tiles(of: Spans, tile: int, block: int) -> jax.Array:
    """The other way round: which tiles of queries each block of keys meets, int32[B or 1, blocks, 4]."""
    some, every = _seen(of, tile, block)
    return _ranges(jnp.swapaxes(some, 1, 2), jnp.swapaxes(every, 1, 2))


def _seen(of: Spans, tile: int, block: int) -> tuple[jax.Array, jax.Array]:
    """bool[B or 1, tiles, blocks]: whether a tile and a block meet at all, and whether wherever they meet they see."""
    low, high = (x.reshape(x.shape[0], -1, tile) for x in (of.low, of.high))
    where = of.positions.reshape(of.positions.shape[0], -1, block)
    idle = low > high
    least, most = jnp.min(jnp.where(where >= 0, where, EVERYTHING), axis=2), jnp.max(where, axis=2)

    def over(x: jax.Array, fill: int, reduce: str) -> jax.Array:
        return getattr(jnp, reduce)(jnp.where(idle, fill, x), axis=2)[:, :, None]

    some = (most[:, None] >= over(low, EVERYTHING, "min")) & (least[:, None] <= over(high, NOBODY, "max"))
    every = (jnp.min(where, axis=2)[:, None] >= over(low, 0, "max")) & (most[:, None] <= over(high, EVERYTHING, "min"))
    return some & (most[:, None] >= 0), every


def _ranges(some: jax.Array, every: jax.Array) -> jax.Array:
    """The first and last that are in `some`, and the first run among them that is in `every`."""
    count = some.shape[2]
    index = jnp.arange(count, dtype=jnp.int32)
    any_at_all = jnp.any(some, axis=2)
    first = jnp.where(any_at_all, jnp.argmax(some, axis=2), 0)
    last = jnp.where(any_at_all, count - jnp.argmax(some[:, :, ::-1], axis=2), 0)
    inside = every & (index >= first[:, :, None]) & (index < last[:, :, None])
    plain = jnp.where(jnp.any(inside, axis=2), jnp.argmax(inside, axis=2), last)
    beyond = ~inside & (index >= plain[:, :, None])
    masked = jnp.where(jnp.any(beyond, axis=2), jnp.argmax(beyond, axis=2), count)
    return jnp.stack([first, last, plain, jnp.maximum(masked, plain)], axis=2).astype(jnp.int32)
