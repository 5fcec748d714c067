"""Where a cache lies on a mesh: pools by their KV heads, what belongs to sequences with these.

Any sequence may hold any page, so that pools and what is counted of pages lie on every device of the mesh's rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from kvjax.cache.codecs.calibrated import calibrated
from kvjax.cache.layout import GroupLayout
from kvjax.cache.state import Cache, Group
from kvjax.partition import AnyMesh, laid, mesh_of

ROWS_OF = dict.fromkeys(("table", "length", "position", "victim", "row_state", "settled"), "RB") | {"tail": "LBSK"}
"""The letters of the first axes of what belongs to sequences; of pages, counts and tables all is whole."""


def pinned(cache: Cache, mesh: AnyMesh | None = None) -> Cache:
    """The cache where it is to lie on a mesh; None: the one it lies on, and on a single device as it is.

    Left to the compiler, it would lie elsewhere after every program, and each would be compiled for all of these.
    """
    mesh = mesh_of(cache) if mesh is None else mesh
    if mesh is None:
        return cache

    def lie(axes: str, tree: Any) -> Any:
        return jax.tree.map(lambda leaf: laid(leaf, axes, mesh), tree)

    def group(held: Group) -> Group:
        names = [field.name for field in dataclasses.fields(held) if field.name != "layout"]
        axes = dict.fromkeys(names, "") | ROWS_OF | {name: pool_axes(held.layout) for name in ("k", "v")}
        return dataclasses.replace(held, **{name: lie(axes[name], getattr(held, name)) for name in names})

    return Cache(
        tuple(map(group, cache.groups)),
        lie("B", cache.seen),
        lie("B", cache.recurrent),
        tuple(map(group, cache.context)),
    )


def pool_axes(layout: GroupLayout) -> str:
    """The letters of a pool's first axes, as `kvjax.partition` takes them.

    A select sees the pool flat, as pages of single heads, and calibrated codecs are read by no kernel but block by
    block in plain products: such pools lie whole on all devices, or each step would gather them.
    """
    return "" if layout.select is not None or calibrated(layout.codec) else "PLK"


def as_pool(layout: GroupLayout, entries: Any) -> Any:
    """Entries [B, T, K, ...] as a pool takes them: whole where it is whole, or the compiler would split it to write."""
    mesh = mesh_of(entries)
    if mesh is None or pool_axes(layout):
        return entries
    return jax.tree.map(lambda leaf: laid(leaf, "", mesh), entries)
