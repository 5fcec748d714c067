"""What a select remembers of pages: made anew of whatever a page holds each time it is written, or loses something."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from kvjax.cache.calibrated import Where, known, read_pages
from kvjax.cache.codecs import Encoded
from kvjax.cache.codecs.calibrated import calibrated
from kvjax.cache.placement import pinned
from kvjax.cache.put import put
from kvjax.cache.state import Cache, Group, with_victims
from kvjax.cache.write import layer_rows, place_in_page, write
from kvjax.typing import Rotate


def store(
    group: Group,
    index: int | jax.Array,
    slots: jax.Array,
    k: Encoded,
    v: Encoded | None,
    rotate: Rotate | None = None,
) -> Group:
    """`write`, and what the group's select remembers of the pages written to.

    rotate: the layer's, for a codec that holds keys unrotated.
    """
    return renewed(write(group, index, _ordered(group, slots), k, v), index, slots, rotate)


def _ordered(group: Group, slots: jax.Array) -> jax.Array:
    """`slots`, but known only once the page state is.

    It was read from the pool that comes to be written: without that order the compiler keeps the old pool for the
    reader and copies all of it. So little is looked at that it costs nothing, and the compiler cannot see through it.
    """
    for leaf in group.page_state.values():
        one = jax.lax.bitcast_convert_type(leaf[(slice(1),) * leaf.ndim].astype(jnp.float32), jnp.uint32)
        slots = slots + ((one.reshape(()) >> 31) >> 1).astype(slots.dtype)
    return slots


def page_numbers(group: Group, table: jax.Array, index: int | jax.Array) -> jax.Array:
    """Pages of table int32[r, B, n] of the layer at `index`, per KV head, as `flat` numbers them: int32[B, K, n].

    No page (-1) counts as the first one.
    """
    layers, heads = group.layout.layers_per_page, group.layout.heads_per_page
    pages = jnp.maximum(jnp.moveaxis(table, 0, 1), 0) * layers + place_in_page(group, index)
    return pages * heads + jnp.arange(heads)[:, None]


def flat(leaf: jax.Array) -> jax.Array:
    """[P, layers_per_page, heads_per_page, ...] -> [X, ...]: the pages of one layer and head each, in place."""
    return leaf.reshape(math.prod(leaf.shape[:3]), *leaf.shape[3:])


def touched(group: Group, table: jax.Array, slots: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which entries of table int32[r, B, N] the slots int32[r, B, T] lie in: int32[r, B, n], and bool: really.

    The slots of one call follow one another, if need be round a ring, so that n follows from T.
    """
    width, tokens, size = table.shape[2], slots.shape[2], group.layout.page_size
    number = jnp.where(slots >= 0, slots // size, width)
    if tokens == 1:
        listed = number
    else:
        row, batch = jnp.arange(table.shape[0])[:, None, None], jnp.arange(table.shape[1])[None, :, None]
        marked = jnp.zeros(table.shape, bool).at[row, batch, number].set(True, mode="drop")
        most = min(width, tokens, -(-tokens // size) + 2)
        listed = jnp.sort(jnp.where(marked, jnp.arange(width), width), axis=-1)[..., :most]
    entries = jnp.take_along_axis(table, jnp.minimum(listed, width - 1), axis=-1)
    return jnp.minimum(listed, width - 1), (listed < width) & (entries >= 0)


def renewed(group: Group, index: int | jax.Array, slots: jax.Array, rotate: Rotate | None = None) -> Group:
    """The group, the state of those pages renewed that slots int32[r, B, T] of the layer at `index` were written to.

    rotate: as `store` takes it.
    """
    layout = group.layout
    if layout.select is None:
        return group
    table = layer_rows(group, group.table, index)
    entries, real = touched(group, table, slots)
    pages = page_numbers(group, jnp.take_along_axis(table, entries, axis=-1), index)

    def stored(pool: jax.Array) -> jax.Array:
        return flat(pool)[pages]

    v = None if group.v is None else jax.tree.map(stored, group.v)
    k = jax.tree.map(stored, group.k)
    if not calibrated(layout.codec):
        keys, values = decoded(group, k, v)
    held = layer_rows(group, group.position, index)
    held = held.reshape(*held.shape[:2], -1, layout.page_size)
    position = jnp.take_along_axis(held, entries[..., None], axis=2)
    if calibrated(layout.codec):
        by_head = jnp.broadcast_to(jnp.moveaxis(position, 0, 1), (*pages.shape, layout.page_size))
        head, sequence = jnp.arange(pages.shape[1])[:, None], jnp.arange(pages.shape[0])[:, None, None]
        keys, values = read_pages(group, k, v, Where(index, head, sequence, by_head, known(group, rotate)))
    filled = jnp.broadcast_to(jnp.moveaxis(position >= 0, 0, 1), keys.shape[:-1])
    state = layout.select.summary(keys, values, filled)
    layers, heads = layout.layers_per_page, layout.heads_per_page
    written = jnp.broadcast_to(jnp.moveaxis(real, 0, 1), pages.shape)
    target = jnp.where(written, pages // (layers * heads), group.num_pages)  # out of range: dropped

    def kept(old: jax.Array, new: jax.Array) -> jax.Array:
        # Not flat: where axes are of size 1 the compiler was seen to copy all of it into another layout.
        return put(old, (target, pages // heads % layers, pages % heads), new)

    return dataclasses.replace(group, page_state=jax.tree.map(kept, group.page_state, state))


PAGES_PER_TRIP = 16
"""Pages whose state is renewed per trip of a loop, in one layer: a bound on its temporaries, whatever the pool."""


def ended(cache: Cache, rotate: Rotate | None = None) -> Cache:
    """What ends a step, or a prompt: `with_victims`, and state renewed of pages from which tokens left for good.

    rotate: of all layers that a select reads, for a codec that holds keys unrotated.
    """
    after = with_victims(cache)
    groups = tuple(emptied(old, new, rotate) for old, new in zip(cache.groups, after.groups, strict=True))
    return pinned(dataclasses.replace(after, groups=groups))


def emptied(before: Group, group: Group, rotate: Rotate | None) -> Group:
    """The group, its state renewed of pages with slots that `before` still had filled; where none has, at no cost."""
    layout = group.layout
    if layout.select is None or group.position is before.position:
        return group
    select, size, layers = layout.select, layout.page_size, layout.layers_per_page
    gone = (before.position >= 0) & (group.position < 0)
    lost = jnp.any(gone.reshape(*group.table.shape, size), axis=-1) & (group.table >= 0)
    most = -(-lost.size // PAGES_PER_TRIP) * PAGES_PER_TRIP
    count = jnp.sum(lost, dtype=jnp.int32)
    listed = jax.lax.cond(
        count > 0,
        lambda: jnp.nonzero(lost.reshape(-1), size=most, fill_value=lost.size)[0].astype(jnp.int32),
        lambda: jnp.full(most, lost.size, jnp.int32),
    )
    _, batch, width = group.table.shape
    table, held_at = group.table.reshape(-1), group.position.reshape(-1, size)
    filled = held_at >= 0

    def more(carry: tuple) -> jax.Array:
        return carry[0] < -(-count // PAGES_PER_TRIP) * layers

    def renew(carry: tuple) -> tuple:
        # Pools go through the loop, so that whatever writes to them next waits for it.
        trip, k, v, state = carry
        entries = jax.lax.dynamic_slice_in_dim(listed, trip // layers * PAGES_PER_TRIP, PAGES_PER_TRIP)
        real = entries < lost.size
        entries = jnp.minimum(entries, lost.size - 1)
        pages, layer = table[entries], jnp.broadcast_to(trip % layers, entries.shape)

        def stored(pool: jax.Array) -> jax.Array:
            return pool[jnp.maximum(pages, 0), layer]

        some_k, some_v = jax.tree.map(stored, k), None if v is None else jax.tree.map(stored, v)
        if calibrated(layout.codec):
            row, sequence = entries // (width * batch), entries // width % batch
            index = row // layout.rows_per_layer * layers + layer
            heads = layout.heads_per_page
            head = row[:, None] % layout.rows_per_layer * heads + jnp.arange(heads)
            position = jnp.broadcast_to(held_at[entries][:, None], (*head.shape, size))
            where = Where(index[:, None], head, sequence[:, None], position, known(group, rotate))
            keys, values = read_pages(group, some_k, some_v, where)
        else:
            keys, values = decoded(group, some_k, some_v)
        held = jnp.broadcast_to(filled[entries][:, None], keys.shape[:-1])
        target = jnp.where(real, pages, group.num_pages)  # out of range: dropped

        def kept(old: jax.Array, new: jax.Array) -> jax.Array:
            return put(old, (target, layer), new)

        return trip + 1, k, v, jax.tree.map(kept, state, select.summary(keys, values, held))

    first = jnp.zeros((), jnp.int32)
    _, k, v, state = jax.lax.while_loop(more, renew, (first, group.k, group.v, group.page_state))
    return dataclasses.replace(group, k=k, v=v, page_state=state)


def decoded(group: Group, k: Encoded, v: Encoded | None) -> tuple[jax.Array, jax.Array]:
    """Stored entries [..., *] -> keys [..., D] and values [..., Dv] in the model's dtype."""
    layout = group.layout
    keys = layout.codec.decode(k, jnp.dtype(layout.dtype))
    if v is None:
        return keys, keys[..., : layout.spec.value_dim]
    return keys, layout.codec.decode(v, jnp.dtype(layout.dtype))
