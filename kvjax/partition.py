"""Which axes of arrays are split over a device mesh, and functions that run on every device's share.

XLA splits plain products over a mesh by itself. A kernel it knows nothing of: it would gather all its operands on every
device. Inside `jax.shard_map` each device calls the kernel on its own sequences and heads instead.

Nothing passes a mesh along: the types of arrays say which one they lie on, while tracing too, and what is made from
them inherits it. Where they lie on none, a function that is `partitioned` is what it was before.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

ROWS = ("data", "fsdp")
"""Mesh axes that sequences are split over."""
HEADS = "tensor"
"""The mesh axis that heads are split over."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
AnyMesh = Mesh | AbstractMesh
Split = Mapping[str, tuple[int, tuple[str, ...]]]
"""Axis letter -> its size, and the mesh axes that it is split over."""


def mesh_of(tree: Any) -> AnyMesh | None:
    """The mesh that arrays lie on; None: one device, or axes that are not the compiler's to split (a `shard_map`)."""
    for leaf in jax.tree.leaves(tree):
        # Of a traced array only the type says where it lies; of others it names no devices.
        holder = jax.typeof(leaf) if isinstance(leaf, jax.core.Tracer) else leaf
        mesh = getattr(getattr(holder, "sharding", None), "mesh", None)
        if mesh is not None and mesh.size > 1:
            return mesh if all(kind == AxisType.Auto for kind in mesh.axis_types) else None
    return None


def laid(x: jax.Array, axes: str, mesh: AnyMesh) -> jax.Array:
    """`x`, to lie on the mesh as the letters of its first axes say; those without a letter stay whole."""
    where = NamedSharding(mesh, _spec(axes, x.shape, _split({"x": axes}, {"x": x}, mesh, whole=True)))
    return jax.lax.with_sharding_constraint(x, where)


def partitioned(
    function: Callable[Arguments, Result], axes: Mapping[str, str], out: str | tuple[str, ...]
) -> Callable[Arguments, Result]:
    """`function`, run by each device of the mesh that its arrays lie on, on its own sequences and heads.

    Letters are those of `kvjax.typing`: B is split over "data" and "fsdp", H and K together over "tensor", each where
    that divides it; all other axes are whole on every device, and so is an axis of 1 where other arrays have more (a
    block table that all heads share). A single KV head serves any share of the query heads, but in results that sum
    over these.

    Args:
      axes: per argument, the letters of its first axes. out: those of each result.
    """
    signature = inspect.signature(function)
    by_name: Callable[..., Result] = function

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        mesh = mesh_of((args, kwargs))
        if mesh is None:
            return function(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        arrays = {name: x for name, x in given.items() if isinstance(x, jax.Array | np.ndarray)}
        rest = {name: x for name, x in given.items() if name not in arrays}
        outs = (out,) if isinstance(out, str) else out
        split = _split(axes, arrays, mesh, whole=all("H" in letters for letters in outs))
        specs = {name: _spec(axes.get(name, ""), x.shape, split) for name, x in arrays.items()}
        results = tuple(PartitionSpec(*(split.get(letter, (0, None))[1] for letter in letters)) for letters in outs)
        # Kernels say nothing of which axes their results vary over, and one that knows of no mesh needs none left.
        run = jax.shard_map(
            lambda arrays: by_name(**arrays, **rest),
            mesh=mesh,
            in_specs=(specs,),
            out_specs=results[0] if isinstance(out, str) else results,
            check_vma=False,
        )
        return run(arrays)

    return call


def _split(axes: Mapping[str, str], arrays: Mapping[str, Any], mesh: AnyMesh, *, whole: bool) -> Split:
    """What the letters of these arrays are split over. whole: results have query heads apart, not their sum."""
    sizes: dict[str, int] = {}
    for name, x in arrays.items():
        for letter, size in zip(axes.get(name, ""), x.shape, strict=False):
            sizes[letter] = max(sizes.get(letter, 1), size)
    ways = mesh.shape.get(HEADS, 1)
    kv_heads, heads = sizes.get("K", 1), sizes.get("H", ways)
    rows: tuple[str, ...] = ()
    for name in ROWS:
        if name in mesh.shape and sizes.get("B", 1) % (mesh.shape[name] * _ways(rows, mesh)) == 0:
            rows = (*rows, name)
    by_heads = (HEADS,) if ways > 1 else ()
    shared = by_heads if kv_heads % ways == 0 else ()
    asked = shared or (by_heads if whole and kv_heads == 1 and heads % ways == 0 else ())
    over = {"B": rows, "K": shared, "H": asked}
    return {letter: (sizes[letter], over[letter]) for letter in over if letter in sizes and over[letter]}


def _ways(names: tuple[str, ...], mesh: AnyMesh) -> int:
    return int(np.prod([mesh.shape[name] for name in names], dtype=int))


def _spec(axes: str, shape: tuple[int, ...], split: Split) -> PartitionSpec:
    """An axis smaller than its letter says is one that all share."""
    sides = zip(axes, shape, strict=False)
    return PartitionSpec(*(split[x][1] if x in split and size == split[x][0] else None for x, size in sides))
