"""The exact newest tokens of a codec that waits: beside the pages, a ring per sequence, layer and head.

A token in slot s lies at s mod ring. What a fork shares of it is copied with the sequence, and both code it to the same
bytes, so that a page of shared tokens may be written by either.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.cache.codecs import KIVI, Encoded
from kvjax.cache.layout import GroupLayout
from kvjax.cache.policies.protocol import EMPTY
from kvjax.cache.put import put
from kvjax.cache.selects import Beside
from kvjax.cache.selects.protocol import PageState
from kvjax.cache.state import Group
from kvjax.cache.write import layer_rows, place_in_page
from kvjax.partition import partitioned


def codec_of(layout: GroupLayout) -> KIVI:
    """The group's codec, which waits."""
    codec: Any = layout.codec
    return codec


def coded(group: Group, length: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many keys and values are coded once `length` tokens are held and their step is over."""
    residual = codec_of(group.layout).residual
    keys = jnp.maximum(length - length % residual, 0)
    return keys, keys if group.v is None else jnp.maximum(length - residual, 0)


def shortest(group: Group, length: jax.Array) -> jax.Array:
    """The fewest tokens that rows of `length` int32[...] can be cut back to and be as if they had never held more.

    What would not be coded yet must still lie in the ring: a page keeps only codes. With values apart from the keys,
    that is one token less, or any number while nothing has left the ring.
    """
    codec = codec_of(group.layout)
    oldest = jnp.maximum(length - codec.ring, 0)
    keys = -(-oldest // codec.residual) * codec.residual
    values = 0 if group.layout.spec.value_in_key else jnp.where(oldest > 0, oldest + codec.residual, 0)
    return jnp.maximum(keys, values)


def ring_slots(group: Group, length: jax.Array) -> jax.Array:
    """Which slot each place of the ring holds, length [...] -> int32[..., ring]; negative for none."""
    ring = codec_of(group.layout).ring
    newest = length[..., None] - 1
    return newest - (newest - jnp.arange(ring)) % ring


def put_exact(group: Group, index: int | jax.Array, slots: jax.Array, k: Encoded, v: Encoded | None) -> Group:
    """Keeps new keys and values [B, T, K, *] of the layer at `index` in slots int32[r, B, T]; slot -1 is dropped."""
    batch, ring = jnp.arange(slots.shape[1])[None, :, None], codec_of(group.layout).ring
    place = jnp.where(slots >= 0, slots % ring, ring)
    layer = jnp.full(slots.shape, index, jnp.int32)

    def one(held: jax.Array, new: jax.Array) -> jax.Array:
        if slots.shape[0] == 1:
            return put(held, (layer[0], batch[0], place[0]), new)
        head = jnp.arange(slots.shape[0])[:, None, None]
        return put(held, (layer, batch, place, head), jnp.moveaxis(new, 2, 0))

    tail = {"k": one(group.tail["k"], k.values)}
    if v is not None:
        tail["v"] = one(group.tail["v"], v.values)
    return dataclasses.replace(group, tail=tail)


def put_prompt(group: Group, index: int | jax.Array, slots: jax.Array, k: jax.Array, v: jax.Array | None) -> Group:
    """Stores a fresh prompt's keys and values [B, T, K, *], of which slots int32[r, B, T] stay: coded, and the tail."""
    layout, codec = group.layout, codec_of(group.layout)
    size, heads, count = layout.page_size, k.shape[2], k.shape[1]
    width = -(-count // size) * size
    row, batch = jnp.arange(slots.shape[0])[:, None, None], jnp.arange(slots.shape[1])[None, :, None]
    target = jnp.where(slots >= 0, slots, width)
    order = jnp.zeros((*slots.shape[:2], width), jnp.int32)
    order = order.at[row, batch, target].set(jnp.arange(count, dtype=jnp.int32), mode="drop")
    order = jnp.broadcast_to(jnp.moveaxis(order, 0, 2), (slots.shape[1], width, heads))
    length = _by_head(layer_rows(group, group.length, index), heads)
    keys_coded, values_coded = coded(group, length)
    table = layer_rows(group, group.table, index)
    table = jnp.broadcast_to(jnp.moveaxis(table, 0, 1), (table.shape[1], heads, table.shape[2]))
    layer, head = place_in_page(group, index), jnp.arange(heads) if layout.heads_per_page > 1 else jnp.zeros(heads, int)

    def by_slot(x: jax.Array) -> jax.Array:
        """[B, T, K, D] -> [B, K, S, D], the tokens in the order of slots."""
        return jnp.moveaxis(jnp.take_along_axis(x, order[..., None], axis=1), 1, 2)

    def page_of(entry: jax.Array, due: jax.Array) -> jax.Array:
        """Pages of table entries int32[n] where due bool[B, K, n]; out of range, and so dropped, elsewhere."""
        page = table.at[:, :, entry].get(mode="fill", fill_value=EMPTY)
        return jnp.where(due & (page >= 0), page, group.num_pages)

    def ring(held: jax.Array, x: jax.Array) -> jax.Array:
        slot = jnp.clip(ring_slots(group, length), 0, width - 1)
        newest = jnp.moveaxis(jnp.take_along_axis(x, slot[..., None], axis=2), 1, 2)
        return held.at[jnp.asarray(index, jnp.int32).reshape(1)].set(newest[None].astype(held.dtype))

    keys = by_slot(k)
    pages = jnp.arange(width // size)
    page = page_of(pages, (pages + 1) * size <= keys_coded[..., None])
    codes = codec.code_keys(keys.reshape(*keys.shape[:2], -1, size, keys.shape[-1]))
    where = (page, layer, head[:, None])
    new_k = jax.tree.map(lambda pool, leaf: put(pool, where, leaf), group.k, codes)
    tail, new_v, state = {"k": ring(group.tail["k"], keys)}, None, group.page_state
    values = None if v is None else by_slot(v)
    if layout.select is not None:
        exact = None if values is None else values.reshape(*codes.values.shape[:4], -1)
        summed = _summary(group, codes, exact)
        state = jax.tree.map(lambda old, new: put(old, where, new), state, summed)
    if values is not None:
        slot = jnp.arange(width)
        page = page_of(slot // size, slot < values_coded[..., None])
        there = (page, layer, head[:, None], slot % size)
        new_v = jax.tree.map(lambda pool, leaf: put(pool, there, leaf), group.v, codec.code_values(values))
        tail["v"] = ring(group.tail["v"], values)
    return dataclasses.replace(group, k=new_k, v=new_v, tail=tail, page_state=state)


def _summary(group: Group, codes: Encoded, v: jax.Array | None) -> PageState:
    """What the select remembers of pages: of coded keys [..., group, *] and of values [..., group, Dv], still exact.

    These it counts as they will be coded: what a page holds is then told by no sequence's length, and may be shared.
    """
    layout, codec = group.layout, codec_of(group.layout)
    assert layout.select is not None
    dtype = jnp.dtype(layout.dtype)
    keys = codec.read_keys(codes, dtype)
    if v is None:
        values = keys[..., : layout.spec.value_dim]
    else:
        values = codec.read_values(codec.code_values(v), dtype)
    return layout.select.summary(keys, values, jnp.ones(keys.shape[:-1], bool))


def settled(group: Group, active: jax.Array, order: jax.Array | int) -> Group:
    """Codes, in all layers, what is due once a step is over, for the sequences active bool[B] in it.

    order: zero, known once every layer has read.
    """
    layout, codec = group.layout, codec_of(group.layout)
    layers, heads, size = len(layout.layers), layout.spec.kv_heads, layout.page_size
    layer, batch = jnp.arange(layers)[:, None, None], jnp.arange(active.shape[0])[:, None]
    head = jnp.arange(heads)
    row = {"shared": 0 * layer, "layer": layer, "head": layer * heads + head}[layout.policy.rows]
    row = jnp.broadcast_to(row, (layers, active.shape[0], heads))
    length = group.length[row, batch]
    place = layer if layout.policy.rows == "shared" else 0 * layer
    within = head if layout.heads_per_page > 1 else 0 * head

    def page_of(entry: jax.Array, due: jax.Array, rows: jax.Array, sequences: jax.Array) -> jax.Array:
        page = group.table.at[rows, sequences, jnp.maximum(entry, 0)].get(mode="fill", fill_value=EMPTY)
        return jnp.where(due & (page >= 0), page, group.num_pages) + order

    due = (length > 0) & (length % codec.residual == 0) & active[:, None]
    slots = length[..., None] - codec.residual + jnp.arange(codec.residual)
    starts = slots[..., ::size]

    def code() -> Encoded:
        keys = group.tail["k"][layer[..., None], batch[..., None], slots % codec.ring, head[:, None]]
        return codec.code_keys(keys.reshape(*starts.shape, size, keys.shape[-1]))

    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(code))
    codes = jax.lax.cond(jnp.any(due), code, lambda: nothing)
    page = page_of(starts // size, due[..., None], row[..., None], batch[..., None])
    where = (page, place[..., None], within[:, None])
    new_k = jax.tree.map(lambda pool, leaf: put(pool, where, leaf), group.k, codes)

    def remember(index: jax.Array, state: PageState) -> PageState:
        """What the select remembers of the pages coded now, of one layer."""
        rings = slots[index] % codec.ring
        k, v = (
            x[index, batch[..., None], rings, head[:, None]].reshape(*starts.shape[1:], size, -1)
            for x in (group.tail["k"], group.tail.get("v", group.tail["k"]))
        )
        new = _summary(group, codec.code_keys(k), None if group.v is None else v)
        there = (page[index], jnp.broadcast_to(place, page[..., 0].shape)[index][..., None], within[:, None])
        return jax.tree.map(lambda old, leaf: put(old, there, leaf), state, new)

    if layout.select is not None:
        # A loop, so that steps that code no keys pay nothing for it.
        trips = jnp.where(jnp.any(due), layers, 0) + order
        group = dataclasses.replace(group, page_state=jax.lax.fori_loop(0, trips, remember, group.page_state))
    if group.v is None:
        return dataclasses.replace(group, k=new_k)
    slot = length - codec.ring
    value = codec.code_values(group.tail["v"][layer, batch, slot % codec.ring, head])
    page = page_of(slot // size, (slot >= 0) & active[:, None], row, batch)
    there = (page, place, within, jnp.maximum(slot, 0) % size)
    new_v = jax.tree.map(lambda pool, leaf: put(pool, there, leaf), group.v, value)
    return dataclasses.replace(group, k=new_k, v=new_v)


def newest(group: Group, index: int | jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """What one layer's step reads beside the pages: keys and values [B, ring, K, *], and positions int32[B, K, ring].

    Values are exact; of their keys the older ones may be coded already, and are read from the pages. Position -1: read
    from the pages altogether, or nothing.
    """
    layout, codec = group.layout, codec_of(group.layout)
    heads = layout.spec.kv_heads
    layer = jnp.asarray(index, jnp.int32).reshape(1)
    keys = group.tail["k"][layer][0].astype(dtype)
    values = None if group.v is None else group.tail["v"][layer][0].astype(dtype)
    length = layer_rows(group, group.length, index)
    slots = ring_slots(group, length)
    keys_coded, values_coded = coded(group, length - 1)
    position = jnp.take_along_axis(layer_rows(group, group.position, index), jnp.maximum(slots, 0), axis=2)
    position = jnp.where((slots >= 0) & (slots >= values_coded[..., None]), position, EMPTY)
    position = jnp.broadcast_to(jnp.moveaxis(position, 0, 1), (position.shape[1], heads, position.shape[2]))
    if group.v is None:
        return keys, None, position
    inside = jnp.maximum(slots, 0)
    page = jnp.maximum(
        jnp.take_along_axis(layer_rows(group, group.table, index), inside // layout.page_size, axis=2), 0
    )
    place, offset = place_in_page(group, index), (inside % layout.page_size)[..., None]
    assert group.k.scale is not None
    assert group.k.minimum is not None
    stored = Encoded(
        _picked(group.k.values, page, place, offset),
        _picked(group.k.scale, page, place, 0),
        _picked(group.k.minimum, page, place, 0),
    )
    from_pages = jnp.moveaxis(jnp.broadcast_to(slots < keys_coded[..., None], (heads, *slots.shape[1:])), 0, 2)
    return jnp.where(from_pages[..., None], codec.read_keys(stored, dtype), keys), values, position


def _picked_of_heads(pool: jax.Array, page: jax.Array, place: jax.Array, offset: jax.Array | int) -> jax.Array:
    """What lies at page int32[r, B, n] and offset int32[r, B, n, 1] of the layer at place int32[1]: [B, n, K, *]."""
    # Every head by an index of its own, and heads_per_page 1 where each has a row.
    found = pool[page[..., None], place, jnp.arange(pool.shape[2]), offset]
    return found[0] if found.shape[0] == 1 else jnp.moveaxis(found[..., 0, :], 0, 2)


# The compiler would gather a pool whose heads are named by number.
_picked = partitioned(_picked_of_heads, {"pool": "PLK", "page": "KB", "offset": "KB"}, "BSK")


def beside(group: Group, index: int | jax.Array, tail: tuple[jax.Array, jax.Array | None, jax.Array]) -> Beside:
    """What `newest` found, as the group's select is told of it."""
    layout, codec = group.layout, codec_of(group.layout)
    keys, values, position = tail
    keys = jnp.moveaxis(keys, 2, 1)
    held = (position >= 0)[..., None]
    if values is None:
        total = jnp.sum(jnp.where(held, keys[..., : layout.spec.value_dim].astype(jnp.float32), 0), axis=2)
        return Beside(keys, position, total)
    length = layer_rows(group, group.length, index)
    # Keys are coded by whole pages, values one by one: of the page that these have come to, all values are remembered.
    values_coded = coded(group, length - 1)[1]
    remembered = ring_slots(group, length) < (-(-values_coded // layout.page_size) * layout.page_size)[..., None]
    remembered = jnp.broadcast_to(jnp.moveaxis(remembered, 0, 1), position.shape)[..., None]
    values = jnp.moveaxis(values, 2, 1)
    later = codec.read_values(codec.code_values(values), jnp.dtype(layout.dtype)).astype(jnp.float32)
    total = jnp.sum(jnp.where(held, values.astype(jnp.float32) - jnp.where(remembered, later, 0), 0), axis=2)
    return Beside(keys, position, total)


def _by_head(rows: jax.Array, heads: int) -> jax.Array:
    """[r, B] -> [B, K]."""
    return jnp.broadcast_to(rows.T, (rows.shape[1], heads))
