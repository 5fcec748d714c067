"""Keys and values of a call as its codec stores and reads them, where that may differ by layer, head and position."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kvjax.cache.codecs import Encoded
from kvjax.cache.codecs.calibrated import calibrated
from kvjax.cache.codecs.packed import FINITE
from kvjax.cache.state import Group, Tail
from kvjax.typing import Rotate

Tables = dict[str, jax.Array]
"""What one layer's coding goes by; {} for codecs that were not calibrated."""


def tables_of(group: Group, index: int | jax.Array) -> Tables:
    """The tables of the layer at `index`."""
    return jax.tree.map(lambda table: jax.lax.dynamic_index_in_dim(table, index, keepdims=False), group.tables)


def encoded(
    codec: Any, tables: Tables, k: jax.Array, v: jax.Array | None, positions: jax.Array, rotate: Rotate
) -> tuple[Encoded, Encoded | None]:
    """k [B, T, K, D] unrotated and v [B, T, K, Dv] (None: it lies in the key) as they are stored."""
    if calibrated(codec):
        return codec.encode_keys(k, tables), None if v is None else codec.encode_values(v, tables)
    return codec.encode(rotate(k, positions)), None if v is None else codec.encode(v)


def read_back(
    codec: Any,
    tables: Tables,
    first: Tail,
    key: Encoded,
    value: Encoded | None,
    positions: jax.Array,
    rotate: Rotate,
    value_dim: int,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """What is read of encoded tokens [B, T, K, ...] at positions int32[B, T]: keys rotated, values.

    first: the exact first tokens of the layer, "k" and "v" -> [B, first, K, *].
    """
    if not calibrated(codec):
        keys = codec.decode(key, dtype)
        return keys, keys[..., :value_dim] if value is None else codec.decode(value, dtype)

    def exact(x: jax.Array, name: str) -> jax.Array:
        by_head = with_first(jnp.swapaxes(x, 1, 2), first.get(name), positions[:, None])
        return jnp.swapaxes(by_head, 1, 2)

    keys = exact(codec.decode_keys(key, tables, dtype), "k")
    values = keys[..., :value_dim] if value is None else exact(codec.decode_values(value, tables, dtype), "v")
    return rotate(keys, positions), values


def with_first(x: jax.Array, first: jax.Array | None, positions: jax.Array) -> jax.Array:
    """x [B, K, n, D] at positions int32[B, K or 1, n], of the first tokens what first [B, m, K, D] holds of them."""
    if first is None:
        return x
    count = first.shape[1]
    place = jnp.broadcast_to(jnp.clip(positions, 0, count - 1), x.shape[:3])
    exact = jnp.take_along_axis(jnp.swapaxes(first, 1, 2), place[..., None], axis=2)
    return jnp.where(((positions >= 0) & (positions < count))[..., None], exact.astype(x.dtype), x)


def known(group: Group, rotate: Rotate | None) -> Rotate:
    """`rotate`, without which a select cannot read what a calibrated codec holds."""
    if rotate is None:
        raise ValueError(f"{group.layout.codec!r} holds keys unrotated: a select needs the layer's `rotate`, got None")
    return rotate


def turned(k: jax.Array, where: jax.Array, rotate: Rotate) -> jax.Array:
    """k [B, K, S, D] turned to where int32[B, K or 1, S]."""
    if where.shape[1] == 1:
        return jnp.swapaxes(rotate(jnp.swapaxes(k, 1, 2), where[:, 0]), 1, 2)
    slots, width = k.shape[2:]
    return rotate(k.reshape(-1, slots, 1, width), where.reshape(-1, slots)).reshape(k.shape)


class Where(NamedTuple):
    """Whose pages [...] are, each of one head.

    Attributes:
      layer, head, sequence: int32[...] or broadcast to that; a layer by its index in the group.
      position: int32[..., page], the token in each slot, -1 for none.
      rotate: that of all these layers.
    """

    layer: jax.Array | int
    head: jax.Array
    sequence: jax.Array
    position: jax.Array
    rotate: Rotate


def read_pages(group: Group, k: Encoded, v: Encoded | None, where: Where) -> tuple[jax.Array, jax.Array]:
    """What is read of pages, leaves [..., page, *], of any layers: keys [..., page, D] rotated, values [..., page, Dv].

    Both in the model's dtype. Only for codecs that were calibrated.
    """
    layout, position = group.layout, where.position
    codec: Any = layout.codec
    dtype, lead = jnp.dtype(layout.dtype), position.shape[:-1]
    index, head, sequence = (jnp.broadcast_to(x, lead) for x in (where.layer, where.head, where.sequence))

    def table(array: jax.Array) -> jax.Array:
        """Of each page's layer, beside its slots and channels: [L, K, D] -> [..., 1, D], [L, n] -> [n, ..., 1, 1]."""
        if array.ndim == 3:
            return array[index, head][..., None, :]
        return jnp.moveaxis(array[index], -1, 0)[..., None, None]

    def exact(x: jax.Array, name: str) -> jax.Array:
        first = group.tail.get(name)
        if first is None:
            return x
        count = first.shape[2]
        place = jnp.clip(position, 0, count - 1)
        found = first[index[..., None], sequence[..., None], place, head[..., None]]
        return jnp.where(((position >= 0) & (position < count))[..., None], found.astype(x.dtype), x)

    tables = {name: table(array) for name, array in group.tables.items()}
    keys = exact(codec.decode_keys(k, tables, dtype), "k")
    values = keys[..., : layout.spec.value_dim]
    if v is not None:
        values = exact(codec.decode_values(v, tables, dtype), "v")
    by_page = keys.reshape(-1, position.shape[-1], 1, keys.shape[-1])
    return where.rotate(by_page, position.reshape(by_page.shape[:2])).reshape(keys.shape), values


def first_of(group: Group, index: int | jax.Array) -> Tail:
    """The exact first tokens of the layer at `index`, "k", "v" -> [B, first, K, *]; {} where the codec keeps none."""
    if not calibrated(group.layout.codec):
        return {}
    return jax.tree.map(lambda held: jax.lax.dynamic_index_in_dim(held, index, keepdims=False), group.tail)


def noted(first: Tail, k: jax.Array, v: jax.Array | None, positions: jax.Array) -> Tail:
    """`first_of` with those of the new tokens k, v [B, T, K, *] at positions int32[B, T] that are among the first."""
    new = {"k": k, "v": v}
    batch = jnp.arange(positions.shape[0])[:, None]

    def one(name: str, held: jax.Array) -> jax.Array:
        count = held.shape[1]
        place = jnp.where((positions >= 0) & (positions < count), positions, count)
        values: Any = new[name]
        half = jnp.clip(values.astype(jnp.float32), -FINITE, FINITE).astype(held.dtype)
        return held.at[batch, place].set(half, mode="drop")

    return {name: one(name, held) for name, held in first.items()}


def keep_first(group: Group, index: int | jax.Array, first: Tail) -> Group:
    """The group with the first tokens of one layer replaced."""
    if not first:
        return group
    where = jnp.asarray(index, jnp.int32).reshape(1)
    tail = {name: held.at[where].set(first[name][None]) for name, held in group.tail.items()}
    return dataclasses.replace(group, tail=tail)
