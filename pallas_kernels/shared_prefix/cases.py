"""The shapes at which attention over shared prefixes is checked, for any backend of paged attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.checks.case import Case
from pallas_kernels.checks.numerics import TOLERANCES
from pallas_kernels.shared_prefix import reference
from pallas_kernels.shared_prefix.api import shared_prefix

LAYERS, LAYER, PAGE = 2, 1, 64


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call's shape. `groups` of equal size share prefixes of `prefix` slots; each sequence has `own` slots more.

    Attributes:
      sharers: packed into one product. value: the width of values within keys; 0: a pool of their own.
      codes: pools hold int8 with a scale per vector.
    """

    batch: int = 32
    groups: int = 1
    prefix: int = 8192
    own: int = 512
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    value: int = 0
    sharers: int = 16
    dtype: str = "bfloat16"
    page: int = PAGE
    codes: bool = False

    @property
    def reads(self) -> int:
        """How often a prefix is read, over all groups."""
        return self.groups * -(-(self.batch // self.groups) // self.sharers)

    @property
    def bytes_moved(self) -> float:
        """What the two phases read at least; partial results are not counted."""
        vectors = self.kv_heads * (1 if self.value else 2)
        slots = self.reads * self.prefix + self.batch * self.own
        vector = self.width + 4 if self.codes else self.width * jnp.dtype(self.dtype).itemsize
        return float(slots * vectors * vector)

    @property
    def flops(self) -> float:
        """Two products for each pair of a query and a slot it sees."""
        slots = self.batch * (self.prefix + self.own)
        return 2.0 * slots * self.heads * (self.width + (self.value or self.width))


def inputs(shape: Shape) -> Callable[[int], tuple[Any, ...]]:
    """q, k_pool, v_pool or None, prefix_table, prefix_lengths, group, block_table, lengths, scales by name, layer."""

    def make(seed: int) -> tuple[Any, ...]:
        keys = jax.random.split(jax.random.key(seed), 4)
        entries, own = -(-shape.prefix // shape.page), -(-shape.own // shape.page)
        pages = shape.groups * entries + shape.batch * own
        pool = (pages, LAYERS, shape.kv_heads, shape.page, shape.width)
        q = jax.random.normal(keys[0], (shape.batch, 1, shape.heads, shape.width), jnp.dtype(shape.dtype))
        k = _vectors(keys[1], pool, shape)
        v = None if shape.value else _vectors(keys[2], pool, shape)
        # Of a size that makes of codes about what a normal distribution gives.
        scales = [jax.random.uniform(key, pool[:4], minval=0.01, maxval=0.02) for key in keys[1:3]]
        numbers = jax.random.permutation(keys[3], pages).astype(jnp.int32)
        return (
            q,
            k,
            v,
            numbers[: shape.groups * entries].reshape(shape.groups, 1, entries),
            # Neither prefixes nor own pages end with a page.
            jnp.full((shape.groups, 1), shape.prefix - 3, jnp.int32),
            (jnp.arange(shape.batch) % shape.groups).astype(jnp.int32),
            numbers[shape.groups * entries :].reshape(shape.batch, 1, own),
            jnp.full((shape.batch, 1), shape.own - 5, jnp.int32),
            dict(zip(("k_scale", "v_scale"), scales, strict=True)) if shape.codes else {},
            jnp.full(1, LAYER, jnp.int32),
        )

    return make


def _vectors(key: jax.Array, pool: tuple[int, ...], shape: Shape) -> jax.Array:
    """A pool of them, or of codes."""
    if shape.codes:
        return jax.random.randint(key, pool, -127, 128, jnp.int8)
    return jax.random.normal(key, pool, jnp.dtype(shape.dtype))


def attend(shape: Shape, backend: str) -> Callable[..., Any]:
    """The two phases on such arguments, through one backend."""

    def call(*arguments: Any) -> Any:
        *arrays, scales, layer = arguments
        options = dict(layer=layer, value_dim=shape.value or None, sharers=shape.sharers, **scales)
        return shared_prefix(*arrays, **options, backend=backend)

    return call


def alone(shape: Shape) -> Callable[..., Any]:
    """Plain attention on such arguments, every sequence for itself, in float32."""

    def call(q: Any, *arguments: Any) -> Any:
        *arrays, scales, layer = arguments
        value = shape.value or None
        return reference.shared_prefix(q.astype(jnp.float32), *arrays, layer=layer, value_dim=value, **scales)

    return call


SMALL = {
    "two groups": Shape(4, 2, 64, 32, 4, 2, 64, 0, 2, "float16", 32),
    "int8": Shape(3, 1, 64, 32, 2, 1, 128, 0, 2, "float16", 32, codes=True),
}
FULL = {
    "32 sequences on one prefix of 8k": Shape(),
    "32 sequences in 4 groups": Shape(groups=4, sharers=8),
    "32 sequences on one prefix of 8k, int8": Shape(codes=True),
    "mla 16 heads, 16 sequences": Shape(16, 1, 4096, 512, 16, 1, 576, 512, 4),
}


def cases_for(backend: str, device: tuple[str, ...]) -> Iterable[Case]:
    """All of them through one backend."""
    for size, shapes in (("small", SMALL), ("full", FULL)):
        for name, shape in shapes.items():
            yield Case(
                name=f"{backend} shared prefix {name}{' small' if size == 'small' else ''}",
                operation="shared_prefix",
                backend=backend,
                size=size,  # type: ignore[arg-type]
                inputs=inputs(shape),
                call=attend(shape, backend),
                reference=alone(shape),
                tolerance=TOLERANCES[shape.dtype],
                flops=shape.flops,
                bytes_moved=shape.bytes_moved,
                device=device,
                baseline=attend(shape, "xla"),
            )


def cases() -> Iterable[Case]:
    """Through the Mosaic GPU kernels of paged attention."""
    return cases_for("mosaic_gpu", ("9.0",))
