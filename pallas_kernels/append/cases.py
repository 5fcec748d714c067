"""The writes of many decoding steps or of a chunk, in a loop that carries the pools: XLA's scatter as it is used.

One call makes the pools inside (zeros, written once) and then STEPS x layers writes, so that what a write costs is not
hidden behind a copy of its argument. `bytes_moved` counts the zeros, and of each write what it reads and stores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.append.api import Pools, append
from pallas_kernels.checks.case import Case

DEVICES = ("8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "12.0")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A loop of writes. steps: each writes `tokens` tokens of each sequence in each of `layers` layers."""

    batch: int = 64
    tokens: int = 1
    steps: int = 64
    layers: int = 16
    kv_heads: int = 8
    width: int = 128
    page: int = 64
    entries: int = 1
    int8: bool = False
    row_per_head: bool = False
    latent: bool = False

    @property
    def rows(self) -> int:
        """Of the table, for each sequence."""
        return self.kv_heads if self.row_per_head else 1

    @property
    def pool(self) -> tuple[int, ...]:
        """Of a key pool; with a row per head a page holds one layer of one head."""
        pages = self.batch * self.rows * self.entries * (self.layers if self.row_per_head else 1)
        return pages, 1 if self.row_per_head else self.layers, self.kv_heads // self.rows, self.page, self.width

    @property
    def bytes_moved(self) -> float:
        """Zeros once; of each vector its source in bfloat16 and what is stored."""
        vectors = 1 if self.latent else 2
        stored = self.width + 4 if self.int8 else 2 * self.width
        written = self.batch * self.tokens * self.steps * self.layers * self.kv_heads * vectors
        return float(np.prod(self.pool[:-1]) * vectors * stored + written * (2 * self.width + stored))


def inputs(shape: Shape) -> Callable[[int], tuple[Any, ...]]:
    """k [steps, B, T, K, D], v likewise or None, block_table int32[layers or 1, B, K or 1, N]."""

    def make(seed: int) -> tuple[Any, ...]:
        keys = jax.random.split(jax.random.key(seed), 3)
        news = (shape.steps, shape.batch, shape.tokens, shape.kv_heads, shape.width)
        k, v = (jax.random.normal(key, news, jnp.bfloat16) for key in keys[:2])
        table = jax.random.permutation(keys[2], shape.pool[0]).astype(jnp.int32)
        return k, None if shape.latent else v, table.reshape(-1, shape.batch, shape.rows, shape.entries)

    return make


def write(shape: Shape, scatter: Callable[..., Pools]) -> Callable[..., Any]:
    """All writes, and then what the last layer's slots hold: the codes of keys and of values, or those in bfloat16."""

    def call(k: Any, v: Any, table: Any) -> Any:
        dtype = jnp.int8 if shape.int8 else jnp.bfloat16
        zeros: list[Any] = [jnp.zeros(shape.pool, dtype), None if shape.latent else jnp.zeros(shape.pool, dtype)]
        scales: list[Any] = [
            jnp.zeros(shape.pool[:-1], jnp.float32) if shape.int8 and pool is not None else None for pool in zeros
        ]
        turning = 64 if shape.latent else shape.width
        frequencies = jnp.asarray(500000.0 ** (-np.arange(0, turning, 2) / turning), jnp.float32)

        def one(number: jax.Array, pools: Pools) -> Pools:
            step, layer = number // shape.layers, number % shape.layers
            slots = step * shape.tokens + jnp.arange(shape.tokens)
            return scatter(
                pools,
                k[step],
                None if v is None else v[step],
                table[layer % table.shape[0]],
                jnp.broadcast_to(slots, (shape.batch, shape.rows, shape.tokens)),
                jnp.broadcast_to(slots, (shape.batch, shape.tokens)),
                layer=(jnp.zeros_like(layer) if shape.row_per_head else layer)[None],
                frequencies=frequencies,
            )

        pools = jax.lax.fori_loop(0, shape.steps * shape.layers, one, Pools(*zeros, *scales))
        last = table[-1, 0, 0], -1 if not shape.row_per_head else 0, 0
        return [pool[last] for pool in pools if pool is not None]

    return call


def one_by_one(shape: Shape) -> Callable[..., Any]:
    """The same slots straight from the formula: the sequence and head whose slots `write` returns, in float32."""

    def call(k: Any, v: Any, table: Any) -> Any:
        from pallas_kernels.append.reference import quantised, turned

        count, held = shape.steps * shape.tokens, shape.entries * shape.page
        turning = 64 if shape.latent else shape.width
        frequencies = jnp.asarray(500000.0 ** (-np.arange(0, turning, 2) / turning), jnp.float32)
        news = [x[:, 0, :, 0].reshape(1, count, 1, shape.width) for x in (k, v) if x is not None]
        # Keys are rounded to the model's dtype once turned, before any code is made of them.
        news[0] = turned(news[0], jnp.arange(count)[None], frequencies)
        news = [jnp.pad(x[0, :, 0], ((0, held - count), (0, 0))).reshape(-1, shape.page, shape.width) for x in news]
        if not shape.int8:
            return [x.astype(jnp.float32) for x in news]
        codes, scales = zip(*map(quantised, news), strict=True)
        return [x.astype(jnp.float32) for x in (*codes, *scales)]

    return call


SMALL = Shape(batch=2, steps=3, layers=2, kv_heads=2, width=16, page=4, entries=2)
SHAPES = {
    "decode bf16, batch 64": Shape(),
    "decode bf16, batch 1": Shape(batch=1),
    "decode int8, batch 64": Shape(int8=True),
    "decode bf16, batch 64, rows per head": Shape(row_per_head=True, layers=8),
    "decode mla, batch 64": Shape(kv_heads=1, width=576, latent=True),
    "chunk of 512, bf16": Shape(batch=1, tokens=512, steps=4, entries=32),
    "chunk of 512, int8": Shape(batch=1, tokens=512, steps=4, entries=32, int8=True),
}


def cases() -> Iterable[Case]:
    """All of them; XLA serves them, so there is nothing to interpret."""
    for name, shape in SHAPES.items():
        yield Case(
            name=f"append {name}",
            operation="append",
            backend="xla",
            size="full",
            inputs=inputs(shape),
            call=write(shape, append),
            reference=one_by_one(shape),
            # The same rounding on both sides; a code may differ by one where cosines do in the last bit.
            tolerance=5e-3,
            bytes_moved=shape.bytes_moved,
            device=DEVICES,
        )
