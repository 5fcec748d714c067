"""The shapes at which the Triton kernels of dense attention are checked. Making the list needs no triton."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.api import attention
from pallas_kernels.checks.case import Case
from pallas_kernels.checks.numerics import GRADIENT_TOLERANCE, TOLERANCES

DEVICES = ("8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "12.0")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call's shape and options. ragged, packed and placed give it lengths, segment ids and positions."""

    batch: int = 2
    tokens: int = 2048
    keys: int = 2048
    heads: int = 16
    kv_heads: int = 4
    width: int = 128
    value: int = 128
    dtype: str = "bfloat16"
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    ragged: bool = False
    packed: bool = False
    placed: bool = False

    def options(self) -> dict[str, Any]:
        """Keyword arguments."""
        ends = self.keys - jnp.arange(self.batch) * (self.keys // max(self.batch - 1, 1))
        order = jnp.arange(self.keys)
        # Every fifth key is a hole; some queries are padding.
        holes = jnp.where(order % 5 == 2, -1, order)
        queries = jnp.arange(self.tokens) + (self.keys - self.tokens)
        return dict(
            causal=self.causal,
            window=self.window,
            soft_cap=self.soft_cap,
            lengths=ends.astype(jnp.int32) if self.ragged else None,
            segment_ids=jnp.broadcast_to(order // (self.keys // 3), (self.batch, self.keys)) if self.packed else None,
            positions=jnp.broadcast_to(holes, (self.batch, self.keys)) if self.placed else None,
            q_positions=jnp.broadcast_to(jnp.where(queries % 7 == 1, -1, queries), (self.batch, self.tokens))
            if self.placed
            else None,
        )

    def run(self, backend: str) -> Callable[..., Any]:
        """`attention` on q, k, v."""
        return lambda q, k, v, *_: attention(q, k, v, **self.options(), backend=backend)

    def gradients(self, backend: str) -> Callable[..., Any]:
        """Its gradients on q, k, v, dout, through both outputs."""

        def loss(q: Any, k: Any, v: Any, dout: Any) -> jax.Array:
            out, lse = attention(q, k, v, **self.options(), backend=backend)
            seen = jnp.where(jnp.isfinite(lse), lse, 0.0)
            return jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32)) + 0.1 * jnp.sum(jnp.sin(seen))

        return jax.grad(loss, argnums=(0, 1, 2))

    def inputs(self, seed: int) -> tuple[jax.Array, ...]:
        """q, k, v and a gradient of the output."""
        keys = jax.random.split(jax.random.key(seed), 4)
        lead, other = (self.batch, self.tokens, self.heads), (self.batch, self.keys, self.kv_heads)
        shapes = ((*lead, self.width), (*other, self.width), (*other, self.value), (*lead, self.value))
        return tuple(jax.random.normal(key, x, jnp.dtype(self.dtype)) for key, x in zip(keys, shapes, strict=True))


def case(name: str, shape: Shape, size: Any, backward: bool) -> Case:
    """One case; arithmetic is counted where nothing but causality hides keys."""
    run = shape.gradients if backward else shape.run
    plain = not (shape.window or shape.ragged or shape.packed or shape.placed) and shape.tokens == shape.keys
    pairs = shape.batch * shape.heads * shape.tokens * shape.keys / (2 if shape.causal else 1)
    # A backward case's time holds the forward pass it starts with: two products, then five.
    flops = 2.0 * pairs * (shape.width + shape.value) * (3.5 if backward else 1.0)
    return Case(
        name=f"triton {'backward' if backward else 'forward'} {name}",
        operation="attention gradient" if backward else "attention",
        backend="triton",
        size=size,
        inputs=shape.inputs,
        call=run("triton"),
        reference=lambda *arrays: run("xla")(*(x.astype(jnp.float32) for x in arrays)),
        tolerance=GRADIENT_TOLERANCE if backward else TOLERANCES[shape.dtype],
        flops=flops if plain else None,
        device=DEVICES,
        baseline=run("xla"),
    )


TINY = Shape(tokens=40, keys=40, heads=4, kv_heads=2, width=32, value=32, dtype="float16", batch=2)
SMALL = {
    "causal": TINY,
    "full, lengths": dataclasses.replace(TINY, causal=False, ragged=True),
    "window, soft cap, queries at the end": dataclasses.replace(TINY, tokens=24, window=9, soft_cap=3.0),
    "packed": dataclasses.replace(TINY, packed=True),
    "positions, widths 48 and 16": dataclasses.replace(TINY, placed=True, width=48, value=16),
    "more queries than keys": dataclasses.replace(TINY, keys=24),
}
FULL = {
    **{f"d{width} causal": Shape(width=width, value=width) for width in (64, 128, 256)},
    "d128 full": Shape(causal=False),
    "d128 f16": Shape(dtype="float16"),
    "d192 with values of 128": Shape(heads=16, kv_heads=16, width=192),
    "d96 causal": Shape(width=96, value=96),
    "d128 window, soft cap": Shape(window=500, soft_cap=30.0),
    "d128 lengths": Shape(ragged=True),
    "d128 packed": Shape(packed=True),
    "d128 positions": Shape(placed=True),
    "d256 window, soft cap, positions": Shape(width=256, value=256, window=500, soft_cap=30.0, placed=True),
}


def cases() -> Iterable[Case]:
    """Forward and backward of every shape, the small ones first."""
    for name, shape in SMALL.items():
        yield case(f"{name} small", shape, "small", False)
        yield case(f"{name} small", shape, "small", True)
    for name, shape in FULL.items():
        yield case(name, shape, "full", False)
        yield case(name, shape, "full", True)
