"""The shapes at which the Triton kernels of paged attention are checked. Making the list needs no triton."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.checks.case import Case
from pallas_kernels.checks.numerics import TOLERANCES
from pallas_kernels.paged_attention.api import paged_attention, paged_weights

DEVICES = ("8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "12.0")
LAYERS, LAYER = 2, 1


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call's shape, and which options it takes.

    Attributes:
      codes: what the pool holds if it is quantised. value: the width of values within keys; 0: a pool of their own.
      ragged: sequences have different lengths, one of them none. ordered: no positions are given.
      pages: of the pool; None: as many as the table names.
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
    value: int = 0
    row_per_head: bool = False
    window: int | None = None
    soft_cap: float | None = None
    ragged: bool = False
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
    def element_bytes(self) -> int:
        """Of what a pool holds."""
        return jnp.dtype(self.codes or self.dtype).itemsize

    @property
    def scale(self) -> float:
        """What scores are multiplied with."""
        return float(self.width) ** -0.5


def inputs(shape: Shape) -> Callable[[int], tuple[Any, ...]]:
    """q, k_pool, v_pool or None, table, lengths, layer, positions or None, q_positions, k_scale, v_scale or None."""

    def make(seed: int) -> tuple[Any, ...]:
        keys = iter(jax.random.split(jax.random.key(seed), 10))
        count = shape.batch * shape.rows * shape.entries
        pages = shape.pages or count + 3
        lead = (pages, LAYERS, shape.kv_heads // shape.rows, shape.page)
        table = jax.random.choice(next(keys), pages, (count,), replace=False).astype(jnp.int32)
        lengths = jnp.full((shape.batch, shape.rows), shape.slots - 1, jnp.int32)
        if shape.ragged:
            lengths = jnp.maximum(lengths - jnp.arange(shape.batch)[:, None] * (shape.slots // (shape.batch - 1)), 0)

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

        def pool() -> tuple[jax.Array, jax.Array | None]:
            """NaN wherever nothing may be read."""
            values = jax.random.normal(next(keys), (*lead, shape.width), jnp.dtype(shape.dtype))
            if shape.codes is None:
                return jnp.where(readable[:, None, None, :, None], values, jnp.nan).astype(values.dtype), None
            # Codes that use most of their type's range, and scales that bring them back to about one.
            scales = jax.random.uniform(next(keys), lead, minval=0.5 / 40, maxval=1.5 / 40)
            return (values * 40.0).round().astype(shape.codes), jnp.where(readable[:, None, None], scales, jnp.nan)

        k, k_scale = pool()
        v, v_scale = (None, None) if shape.value else pool()
        layer = jnp.full(1, LAYER, jnp.int32)
        return q, k, v, table, lengths, layer, positions, q_positions, k_scale, v_scale

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
            backend=backend,
        )

    return call


def case(name: str, shape: Shape, size: Any = "full", operation: str = "paged_attention") -> Case:
    """One case. Bytes and arithmetic are those of full lengths; a window's or a ragged batch's are not counted."""
    call = attend if operation == "paged_attention" else weigh
    slots = shape.batch * shape.slots * shape.kv_heads
    weights = operation == "paged_weights"
    vectors = 1 if shape.value or weights else 2
    per_slot = vectors * (shape.width * shape.element_bytes + (4 if shape.codes else 0))
    widths = shape.width + (0 if weights else shape.value or shape.width)
    plain = shape.window is None and not shape.ragged
    return Case(
        name=f"triton {name}",
        operation=operation,
        backend="triton",
        size=size,
        inputs=inputs(shape),
        call=call(shape, "triton"),
        # Whatever the pool holds is read in the queries' dtype.
        reference=lambda q, *rest: call(shape, "xla")(q.astype(jnp.float32), *rest),
        tolerance=TOLERANCES[shape.dtype],
        flops=2.0 * shape.batch * shape.tokens * shape.heads * shape.slots * widths if plain else None,
        bytes_moved=float(slots * per_slot) + (4.0 * slots if weights else 0.0) if plain else None,
        device=DEVICES if shape.codes != "float8_e4m3fn" else DEVICES[3:],
        baseline=call(shape, "xla"),
    )


TINY = Shape(batch=3, heads=4, kv_heads=2, width=32, page=16, entries=5, dtype="float16", ragged=True)
"""For Triton's interpreter, which has no bfloat16 products."""
SMALL = {
    "decode": TINY,
    "decode rows per head, window, soft cap": dataclasses.replace(TINY, row_per_head=True, window=20, soft_cap=5.0),
    "decode positions, window": dataclasses.replace(TINY, ordered=False, window=90),
    "decode mla": dataclasses.replace(TINY, kv_heads=1, width=80, value=64),
    "decode mla, value beyond a power of two": dataclasses.replace(TINY, kv_heads=1, width=80, value=48),
    "decode int8": dataclasses.replace(TINY, codes="int8"),
    "decode mla fp8": dataclasses.replace(TINY, kv_heads=1, width=80, value=64, codes="float8_e4m3fn"),
    "decode group of 3, page of 8": dataclasses.replace(TINY, heads=6, page=8, entries=9),
    "chunk": dataclasses.replace(TINY, tokens=20),
}
LATENT = Shape(batch=16, heads=128, kv_heads=1, width=576, value=512)
FULL = {
    **{f"decode d{width}": Shape(width=width) for width in (64, 128, 256)},
    "decode d96": Shape(width=96, heads=8),
    "decode d128 f16": Shape(dtype="float16"),
    "decode d128 page 16": Shape(page=16, entries=512),
    "decode d128 one sequence of 32k": Shape(batch=1, entries=512),
    "decode d128 group of 1": Shape(kv_heads=32, entries=64),
    "decode d128 group of 32": Shape(kv_heads=1, heads=32, entries=512),
    "decode d128 ragged": Shape(ragged=True),
    "decode d128 rows per head": Shape(row_per_head=True),
    "decode d128 window, soft cap": Shape(window=1000, soft_cap=30.0),
    "decode d128 positions": Shape(ordered=False),
    "decode d64 int8": Shape(width=64, codes="int8"),
    "decode d128 int8": Shape(codes="int8"),
    "decode d128 fp8": Shape(codes="float8_e4m3fn"),
    "decode d256 int8": Shape(width=256, codes="int8"),
    **{f"decode mla {heads} heads": dataclasses.replace(LATENT, heads=heads) for heads in (16, 32, 64, 128)},
    "decode mla 16 heads int8": dataclasses.replace(LATENT, heads=16, codes="int8"),
    "decode mla 128 heads int8": dataclasses.replace(LATENT, codes="int8"),
    "decode mla 128 heads fp8": dataclasses.replace(LATENT, codes="float8_e4m3fn"),
    **{f"chunk d{width}": Shape(batch=2, tokens=512, width=width) for width in (64, 128, 256)},
    "chunk d128 int8": Shape(batch=2, tokens=512, codes="int8"),
    "chunk d128 window, soft cap": Shape(batch=2, tokens=512, window=1000, soft_cap=30.0),
    "chunk d128 positions": Shape(batch=2, tokens=512, ordered=False),
    "chunk d128 of 8 tokens": Shape(tokens=8),
    "chunk d256 int8": Shape(batch=2, tokens=512, width=256, codes="int8"),
    "chunk mla": dataclasses.replace(LATENT, batch=1, heads=16, tokens=512),
    # More than 2^31 elements: addresses need 64 bits.
    "decode d128 pool of 2^31 elements and more": Shape(pages=17000, kv_heads=8, value=128),
}
WEIGHTS = {
    "weights d128": Shape(),
    "weights d128 rows per head, positions": Shape(row_per_head=True, ordered=False),
    "weights d256 int8": Shape(width=256, codes="int8"),
    "weights d128 chunk": Shape(batch=2, tokens=64),
    "weights mla": dataclasses.replace(LATENT, batch=4),
}


def cases() -> Iterable[Case]:
    """All of them, the small ones first."""
    yield from (case(f"{name} small", shape, "small") for name, shape in SMALL.items())
    for name in ("decode", "decode positions, window", "decode int8", "chunk"):
        yield case(f"weights {name} small", SMALL[name], "small", "paged_weights")
    yield from (case(name, shape) for name, shape in FULL.items())
    yield from (case(name, shape, operation="paged_weights") for name, shape in WEIGHTS.items())
