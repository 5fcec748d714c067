"""What the cases of paged attention are made of: a call's shape, its arguments, and the call itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.api import paged_attention, paged_weights
from pallas_kernels.paged_attention.reference import dequantised

LAYERS, LAYER = 2, 1
BITS = {"int4": 4, "kivi4": 4, "kivi2": 2}
"""Of codes that share bytes: int4 and KIVI's values have a scale and a minimum per group of channels, KIVI's keys per
channel of a page."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call's shape, and which options it takes.

    Attributes:
      codes: what the pool holds if it is quantised: a dtype, or one of `BITS`. group: channels that share a scale.
      value: the width of values within keys; 0: a pool of their own.
      ragged: sequences have different lengths, one of them none. lengths: theirs, where they are told.
      ordered: no positions are given. pages: of the pool; None: as many as the table names.
    """

    batch: int = 8
    tokens: int = 1
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    page: int = 64
    entries: int = 128
    dtype: str = "bfloat16"
    codes: str | None = None
    group: int = 32
    value: int = 0
    row_per_head: bool = False
    window: int | None = None
    soft_cap: float | None = None
    ragged: bool = False
    lengths: tuple[int, ...] | None = None
    ordered: bool = True
    pages: int | None = None

    @property
    def rows(self) -> int:
        """Of the table, for each sequence."""
        return self.kv_heads if self.row_per_head else 1

    @property
    def slots(self) -> int:
        """Of a table's row."""
        return self.entries * self.page

    @property
    def vector_bytes(self) -> float:
        """Of a key or a value in the pool, scales included: of KIVI's keys a slot's share of its page's."""
        if self.codes is None:
            return self.width * jnp.dtype(self.dtype).itemsize
        if self.codes in BITS:
            shared = self.page if self.by_page else self.group
            return self.width * (BITS[self.codes] / 8 + 4 / shared)
        return self.width * jnp.dtype(self.codes).itemsize + 4

    @property
    def by_page(self) -> bool:
        """Whether keys have a scale per channel of a page."""
        return self.codes in ("kivi4", "kivi2")

    @property
    def scale(self) -> float:
        """What scores are multiplied with."""
        return float(self.width) ** -0.5


def around_a_page(shape: Shape) -> Shape:
    """The shape with sequences whose lengths are none, one, about a page and more."""
    page = shape.page
    lengths = (2 * page + 5, page + 1, page, page - 1, 1, 0)
    return dataclasses.replace(shape, batch=len(lengths), entries=3, lengths=lengths, ragged=True)


def inputs(shape: Shape) -> Callable[[int], tuple[Any, ...]]:
    """q, k_pool, v_pool, table, lengths, layer, positions, q_positions, k_scale, v_scale, k_min, v_min; None if absent.

    NaN is wherever nothing may be read: in pools, and in scales and minima.
    """

    def make(seed: int) -> tuple[Any, ...]:
        keys = iter(jax.random.split(jax.random.key(seed), 10))
        count = shape.batch * shape.rows * shape.entries
        pages = shape.pages or count + 3
        lead = (pages, LAYERS, shape.kv_heads // shape.rows, shape.page)
        table = jax.random.choice(next(keys), pages, (count,), replace=False).astype(jnp.int32)
        lengths = jnp.full((shape.batch, shape.rows), shape.slots - 1, jnp.int32)
        if shape.ragged:
            lengths = jnp.maximum(lengths - jnp.arange(shape.batch)[:, None] * (shape.slots // (shape.batch - 1)), 0)
        if shape.lengths is not None:
            lengths = jnp.broadcast_to(jnp.asarray(shape.lengths, jnp.int32)[:, None], lengths.shape)

        q = jax.random.normal(next(keys), (shape.batch, shape.tokens, shape.heads, shape.width), jnp.dtype(shape.dtype))
        positions = None
        q_positions = lengths[:, :1] - shape.tokens + jnp.arange(shape.tokens)
        if not shape.ordered:
            # A cache that overwrites slots in any order, with holes; queries stand behind everything.
            order = jax.random.permutation(next(keys), 2 * shape.slots)[: shape.slots].astype(jnp.int32)
            order = jnp.where(jnp.arange(shape.slots) % 7 == 3, -1, order)
            positions = jnp.broadcast_to(order, (shape.batch, shape.rows, shape.slots))
            q_positions = jnp.broadcast_to(2 * shape.slots + jnp.arange(shape.tokens), (shape.batch, shape.tokens))
        table = table.reshape(shape.batch, shape.rows, shape.entries)
        held = jnp.arange(shape.slots) < lengths[..., None]
        if positions is not None:
            held = held & (positions >= 0)
        readable = jnp.zeros((pages, shape.page), bool).at[table].set(held.reshape(*table.shape, shape.page))

        def packed(by_page: bool) -> tuple[jax.Array, ...]:
            """Codes that share bytes, scale and minimum: numbers of about one around zero."""
            bits = BITS[shape.codes or ""]
            codes = jax.random.bits(next(keys), (*lead, shape.width * bits // 8), jnp.uint8)
            grouped = (*lead[:3], 1, shape.width) if by_page else (*lead, shape.width // shape.group)
            told = jnp.any(readable, axis=1, keepdims=True) if by_page else readable
            scale = jax.random.uniform(next(keys), grouped, minval=0.5, maxval=1.5) * (3.4 / (2**bits - 1))
            low = jax.random.uniform(next(keys), grouped, minval=-0.6, maxval=-0.4) * (2**bits - 1) * scale
            return codes, *(
                jnp.where(told[:, None, None, :, None], part, jnp.nan).astype(jnp.float16) for part in (scale, low)
            )

        def pool(by_page: bool = False) -> tuple[jax.Array | None, ...]:
            """Values, scale and minimum."""
            if shape.codes in BITS:
                return packed(by_page)
            values = jax.random.normal(next(keys), (*lead, shape.width), jnp.dtype(shape.dtype))
            if shape.codes is None:
                return jnp.where(readable[:, None, None, :, None], values, jnp.nan).astype(values.dtype), None, None
            # Codes that use most of their type's range, and scales that bring them back to about one.
            scales = jax.random.uniform(next(keys), lead, minval=0.5 / 40, maxval=1.5 / 40)
            return (
                (values * 40.0).round().astype(shape.codes),
                jnp.where(readable[:, None, None], scales, jnp.nan),
                None,
            )

        k, k_scale, k_min = pool(shape.by_page)
        v, v_scale, v_min = (None, None, None) if shape.value else pool()
        layer = jnp.full(1, LAYER, jnp.int32)
        return q, k, v, table, lengths, layer, positions, q_positions, k_scale, v_scale, k_min, v_min

    return make


def attend(shape: Shape, backend: str) -> Callable[..., Any]:
    """`paged_attention` on such arguments."""

    def call(
        q: Any, k: Any, v: Any, table: Any, lengths: Any, layer: Any, positions: Any, at: Any, *scales: Any
    ) -> Any:
        return paged_attention(
            q,
            k,
            v,
            table,
            lengths,
            layer=layer,
            positions=positions,
            q_positions=at,
            window=shape.window,
            soft_cap=shape.soft_cap,
            scale=shape.scale,
            value_dim=shape.value or None,
            k_scale=scales[0],
            v_scale=scales[1],
            k_min=scales[2],
            v_min=scales[3],
            backend=backend,
        )

    return call


def weigh(shape: Shape, backend: str) -> Callable[..., Any]:
    """`paged_weights` on such arguments. Any log-sum-exp will do: one of the size of a real one, the same for all."""

    def call(
        q: Any, k: Any, v: Any, table: Any, lengths: Any, layer: Any, positions: Any, at: Any, *scales: Any
    ) -> Any:
        lse = jnp.full(q.shape[:3], jnp.log(float(shape.slots)) + 0.5, jnp.float32)
        return paged_weights(
            q,
            k,
            table,
            lengths,
            lse=lse,
            row_weights=1.0 / (1.0 + jnp.arange(shape.batch * shape.tokens, dtype=jnp.float32).reshape(q.shape[:2])),
            layer=layer,
            positions=positions,
            q_positions=at,
            window=shape.window,
            soft_cap=shape.soft_cap,
            scale=shape.scale,
            k_scale=scales[0],
            k_min=scales[2],
            backend=backend,
        )

    return call


def exact(shape: Shape, call: Callable[..., Callable[..., Any]]) -> Callable[..., Any]:
    """`attend` or `weigh` by plain jnp in float32, from what the pool holds as it is read in the queries' dtype."""
    if shape.codes not in BITS:
        return lambda q, *rest: call(shape, "xla")(q.astype(jnp.float32), *rest)

    def reference(q: Any, k: Any, v: Any, table: Any, lengths: Any, layer: Any, positions: Any, *rest: Any) -> Any:
        at, k_scale, v_scale, k_min, v_min = rest
        heads, page = max(table.shape[1], k.shape[2]), k.shape[3]

        def by_head(rows: Any) -> Any:
            return None if rows is None else jnp.broadcast_to(rows, (rows.shape[0], heads, *rows.shape[2:]))

        def read(pool: Any, scale: Any, low: Any) -> Any:
            """A pool of what the codes say, each page of each head by itself."""
            packed = 8 // BITS[shape.codes or ""]
            values = dequantised(pool, scale, low, table, layer, q.dtype, packed)
            return values.reshape(-1, 1, 1, page, values.shape[-1])

        wide = by_head(table)
        dense = jnp.where(wide >= 0, jnp.arange(wide.size).reshape(wide.shape), -1)
        k = read(k, k_scale, k_min)
        v = None if v is None else read(v, v_scale, v_min)
        arguments = q.astype(jnp.float32), k, v, dense, by_head(lengths), jnp.zeros(1, jnp.int32), by_head(positions)
        return call(shape, "xla")(*arguments, at, None, None, None, None)

    return reference
