"""Attention on a mesh that is only described: each device is given its own sequences and heads, and nothing twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import pallas_kernels
from kvjax.attention import sharded
from kvjax.partition import mesh_of

MESH = AbstractMesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
TOKENS, WIDTH, PAGES = 16, 8, 11


def lying(mesh: AbstractMesh | None, *shapes: tuple[int, ...] | None, dtype: Any = jnp.float32) -> list[Any]:
    """Shapes of arrays on a mesh, whole as far as their types tell: how they are split is the compiler's to know."""
    where = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return [None if shape is None else jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape in shapes]


def bodies(jaxpr: Any) -> Iterator[Any]:
    """The functions that `shard_map`s in a jaxpr have each device run, in order."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "shard_map":
            yield equation.params["jaxpr"]
        else:
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from bodies(inner)


def shares(function: Callable[..., Any], *arguments: Any) -> list[tuple[list[Any], list[Any]]]:
    """Of each `shard_map` in a function, the shapes a device is given, and those it makes."""
    traced = jax.jit(function).trace(*arguments)
    return [([v.aval.shape for v in b.invars], [v.aval.shape for v in b.outvars]) for b in bodies(traced.jaxpr.jaxpr)]


@pytest.mark.parametrize(("batch", "heads", "kv_heads", "mine"), [
    pytest.param(4, 8, 4, (2, 2, 1), id="sequences and heads"),
    pytest.param(3, 8, 4, (3, 2, 1), id="sequences that do not divide stay whole"),
    pytest.param(4, 8, 2, (2, 8, 2), id="KV heads that do not divide stay whole with their query heads"),
    pytest.param(4, 8, 1, (2, 2, 1), id="one KV head serves any query heads"),
    pytest.param(4, 6, 1, (2, 6, 1), id="query heads that do not divide stay whole"),
])  # fmt: skip
def test_a_device_attends_with_its_sequences_and_heads(
    batch: int, heads: int, kv_heads: int, mine: tuple[int, int, int]
) -> None:
    q, k = lying(MESH, (batch, TOKENS, heads, WIDTH), (batch, TOKENS, kv_heads, WIDTH))
    ids, window = lying(MESH, (batch, TOKENS), (), dtype=jnp.int32)

    def call(q: jax.Array, k: jax.Array, ids: jax.Array, window: jax.Array) -> Any:
        return sharded.attention(q, k, k, segment_ids=ids, window=window)

    ((given, made),) = shares(call, q, k, ids, window)
    rows, some, few = mine
    assert sorted(given) == sorted([(), (rows, TOKENS), (rows, TOKENS, some, WIDTH), *[(rows, TOKENS, few, WIDTH)] * 2])
    assert made == [(rows, TOKENS, some, WIDTH), (rows, TOKENS, some)]


@pytest.mark.parametrize(("rows_per_head", "kv_heads", "pool", "table", "heads"), [
    pytest.param(False, 4, 1, 1, 2, id="pages of all heads"),
    pytest.param(True, 4, 1, 1, 2, id="rows per head"),
    pytest.param(False, 2, 2, 1, 8, id="heads that do not divide"),
    pytest.param(False, 1, 1, 1, 2, id="one head"),
])  # fmt: skip
def test_pools_are_split_by_heads_or_tables_are(
    rows_per_head: bool, kv_heads: int, pool: int, table: int, heads: int
) -> None:
    shape = (PAGES, 2, 1 if rows_per_head else kv_heads, 4, WIDTH)
    rows = kv_heads if rows_per_head else 1
    q, k_pool, scale = lying(MESH, (4, 1, 8, WIDTH), shape, shape[:4])
    block_table, lengths, layer = lying(MESH, (4, rows, 3), (4, rows), (1,), dtype=jnp.int32)

    def call(q: jax.Array, pool: jax.Array, scale: jax.Array, *rest: jax.Array) -> Any:
        block_table, lengths, layer = rest
        return sharded.paged_attention(
            q, pool, pool, block_table, lengths, layer=layer, k_scale=scale, v_scale=scale, backend="xla"
        )

    ((given, made),) = shares(call, q, k_pool, scale, block_table, lengths, layer)
    assert given.count((PAGES, 2, pool, 4, WIDTH)) == 2
    assert given.count((PAGES, 2, pool, 4)) == 2
    assert (2, table, 3) in given
    assert made == [(2, 1, heads, WIDTH), (2, 1, heads)]


def test_weights_that_are_sums_over_query_heads_keep_these_together() -> None:
    q, lse, row_weights = lying(MESH, (4, 1, 8, WIDTH), (4, 1, 8), (4, 1))

    def call(q: jax.Array, pool: jax.Array, *rest: jax.Array) -> jax.Array:
        block_table, lengths, layer, lse, row_weights = rest
        return sharded.paged_weights(
            q, pool, block_table, lengths, lse=lse, row_weights=row_weights, layer=layer, backend="xla"
        )

    for kv_heads, mine in ((4, 2), (1, 8)):
        (pool,) = lying(MESH, (PAGES, 2, kv_heads, 4, WIDTH))
        table = lying(MESH, (4, 1, 3), (4, 1), (1,), dtype=jnp.int32)
        ((given, made),) = shares(call, q, pool, *table, lse, row_weights)
        assert (2, 1, mine, WIDTH) in given
        assert made == [(2, 1, 12)]


def test_all_axes_of_rows_split_sequences() -> None:
    mesh = AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    for batch, mine in ((8, 2), (6, 3), (2, 1), (5, 5)):
        (q,) = lying(mesh, (batch, TOKENS, 4, WIDTH))
        assert shares(lambda q: sharded.attention(q, q, q), q)[0][1][0] == (mine, TOKENS, 2, WIDTH)


@pytest.mark.parametrize("mesh", [
    None,
    pytest.param(AbstractMesh((1, 1), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2), id="one device"),
])  # fmt: skip
def test_without_a_mesh_a_call_traces_to_what_it_was(mesh: AbstractMesh | None) -> None:
    (q,) = lying(mesh, (2, TOKENS, 4, WIDTH))

    def program(attention: Callable[..., Any]) -> str:
        return str(jax.jit(lambda q: attention(q, q, q, window=5)).trace(q).jaxpr)

    assert program(sharded.attention) == program(pallas_kernels.attention)


def test_inside_a_shard_map_of_ones_own_nothing_is_split_again() -> None:
    (q,) = lying(MESH, (4, TOKENS, 8, WIDTH))
    spec = PartitionSpec("data", None, "tensor")

    def call(q: jax.Array) -> Any:
        assert mesh_of(q) is None
        return sharded.attention(q, q, q)[0]

    mapped = jax.shard_map(call, mesh=MESH, in_specs=spec, out_specs=spec, check_vma=False)
    assert len(shares(mapped, q)) == 1


def test_what_is_made_from_arrays_on_a_mesh_lies_on_it() -> None:
    weight, x = lying(MESH, (WIDTH, WIDTH), (4, TOKENS, 8, WIDTH))
    (plain,) = lying(None, (4, TOKENS, 8, WIDTH))

    def layers(weight: jax.Array, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            q = jnp.where(x > 0, x @ weight, 0.0)
            return sharded.attention(q, q, x)[0], None

        return jax.lax.scan(layer, x, length=2)[0]

    # Also where it comes from the weights alone, as when tokens come from the host.
    for arguments in ((weight, x), (weight, plain)):
        assert len(shares(jax.grad(lambda *a: jnp.sum(layers(*a) ** 2)), *arguments)) >= 2
