"""Where a cache lies on a mesh: pools by their KV heads, everything else whole on every device."""

from __future__ import annotations

import dataclasses

import jax

from kvjax.cache.codecs.waiting import waits
from kvjax.cache.layout import GroupLayout
from kvjax.cache.state import Cache, Group
from kvjax.partition import AnyMesh, laid, mesh_of


def pool_axes(layout: GroupLayout) -> str:
    """The letters of a pool's first axes, as `kvjax.partition` takes them.

    A select reads pages of single heads by number, and a codec that waits writes them so: across devices, both would
    gather the pool.
    """
    return "" if layout.select is not None or waits(layout.codec) else "PLK"


def pinned(cache: Cache, mesh: AnyMesh | None = None) -> Cache:
    """The cache where it is to lie on a mesh; None: the one it lies on, and on a single device as it is.

    Left to the compiler, it would lie elsewhere after every program, and each would be compiled for all of these.
    """
    mesh = mesh_of(cache) if mesh is None else mesh
    if mesh is None:
        return cache

    def whole(leaf: jax.Array) -> jax.Array:
        return laid(leaf, "", mesh)

    def group(held: Group) -> Group:
        axes = pool_axes(held.layout)
        k, v = jax.tree.map(lambda leaf: laid(leaf, axes, mesh), (held.k, held.v))
        return dataclasses.replace(jax.tree.map(whole, held), k=k, v=v)

    return Cache(
        tuple(map(group, cache.groups)),
        whole(cache.seen),
        jax.tree.map(whole, cache.recurrent),
        tuple(map(group, cache.context)),
    )
