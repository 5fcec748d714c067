"""Calls of the sizes that matter, as cases: dense passes, decoding over pages, latent attention, a very large pool.

The float32 reference goes head by head where the scores of all heads would not fit in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import attention, paged_attention
from pallas_kernels.checks.case import Case
from pallas_kernels.checks.numerics import GRADIENT_TOLERANCE, TOLERANCES

BF16 = jnp.bfloat16
LAYERS = 2
"""Layers per page of the pools that are read: strides count, memory does not suffer."""


def forward(heads: int, width: int, causal: bool, tokens: int, backend: str = "mosaic_gpu") -> Case:
    """One sequence's dense attention, as many KV heads as query heads."""
    shape = (1, tokens, heads, width)

    def run(backend: str) -> Callable[..., Any]:
        return lambda q, k, v: attention(q, k, v, causal=causal, backend=backend)

    return Case(
        name=f"forward d{width} {_mask(causal)} {_short(tokens)} bf16",
        operation="attention",
        backend=backend,
        size="full",
        inputs=lambda seed: _random(seed, shape, shape, shape),
        call=run(backend),
        reference=lambda q, k, v: _by_head(run("xla"), *_wide(q, k, v)),
        baseline=lambda q, k, v: _by_head(run("xla"), q, k, v),
        tolerance=TOLERANCES["bfloat16"],
        flops=4 * heads * tokens**2 * width / (2 if causal else 1),
        bytes_moved=4 * tokens * heads * width * 2,
    )


def backward(heads: int, width: int, causal: bool, tokens: int, backend: str = "mosaic_gpu") -> Case:
    """The gradients of the same, forward pass included in the time; `flops` are those of the backward pass alone."""
    shape = (1, tokens, heads, width)

    def run(backend: str) -> Callable[..., Any]:
        def gradients(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> tuple[jax.Array, ...]:
            _, pull_back = jax.vjp(lambda *qkv: attention(*qkv, causal=causal, backend=backend)[0], q, k, v)
            return tuple(pull_back(dout))

        return gradients

    return Case(
        name=f"backward d{width} {_mask(causal)} {_short(tokens)} bf16",
        operation="attention gradient",
        backend=backend,
        size="full",
        inputs=lambda seed: _random(seed, shape, shape, shape, shape),
        call=run(backend),
        reference=lambda *arrays: _by_head(run("xla"), *_wide(*arrays)),
        tolerance=GRADIENT_TOLERANCE,
        flops=2.5 * 4 * heads * tokens**2 * width / (2 if causal else 1),
    )


def decode(
    batch: int,
    dtype: str,
    context: int,
    *,
    page: int = 64,
    heads: int = 32,
    kv_heads: int = 8,
    width: int = 128,
    backend: str = "mosaic_gpu",
) -> Case:
    """One token for each sequence over pages of this dtype; 8-bit ones have a scale per vector."""
    entries = context // page
    pool = (batch * entries, LAYERS, kv_heads, page, width)
    quantised = dtype != "bfloat16"

    def inputs(seed: int) -> tuple[Any, ...]:
        q, k, v = _random(seed, (batch, 1, heads, width), pool, pool)
        scales: tuple[jax.Array, ...] = ()
        if quantised:
            # Codes that use much of the type's range, and steps that bring them back to about one.
            spread = 40.0
            k, v = ((x * spread).round().astype(dtype) for x in (k, v))
            scales = tuple(
                jax.random.uniform(key, pool[:-1], minval=0.5 / spread, maxval=1.5 / spread)
                for key in jax.random.split(jax.random.key(seed + 1000))
            )
        return (q, k, v, _table(seed, batch, entries), _lengths(batch, context), jnp.ones(1, jnp.int32), *scales)

    def run(backend: str) -> Callable[..., Any]:
        def call(q: Any, k: Any, v: Any, table: Any, lengths: Any, layer: Any, *scales: Any) -> Any:
            named = dict(zip(("k_scale", "v_scale"), scales, strict=True)) if scales else {}
            return paged_attention(q, k, v, table, lengths, layer=layer, backend=backend, **named)

        return call

    vectors = 2 * batch * context * kv_heads
    return Case(
        name=f"decode d{width} {dtype} {_short(context)} page {page} group {heads // kv_heads} batch {batch}",
        operation="paged_attention",
        backend=backend,
        size="full",
        inputs=inputs,
        call=run(backend),
        # Whatever the pool holds is read in the queries' dtype.
        reference=lambda q, *rest: run("xla")(q.astype(jnp.float32), *rest),
        baseline=run("xla"),
        tolerance=TOLERANCES["bfloat16"],
        flops=4 * batch * heads * context * width,
        bytes_moved=vectors * (width * jnp.dtype(dtype).itemsize + (4 if quantised else 0)),
    )


def latent(batch: int, heads: int, context: int, *, page: int = 64, backend: str = "mosaic_gpu") -> Case:
    """Absorbed multi-head latent attention: keys of 576 whose first 512 columns are the values."""
    width, value, entries = 576, 512, context // page
    pool = (batch * entries, LAYERS, 1, page, width)

    def inputs(seed: int) -> tuple[Any, ...]:
        q, k = _random(seed, (batch, 1, heads, width), pool)
        return q, k, _table(seed, batch, entries), _lengths(batch, context), jnp.ones(1, jnp.int32)

    def run(backend: str) -> Callable[..., Any]:
        return lambda q, k, table, lengths, layer: paged_attention(
            q, k, None, table, lengths, layer=layer, value_dim=value, scale=192**-0.5, backend=backend
        )

    return Case(
        name=f"decode mla {heads} heads bf16 {_short(context)} page {page} batch {batch}",
        operation="paged_attention",
        backend=backend,
        size="full",
        inputs=inputs,
        call=run(backend),
        reference=lambda q, *rest: run("xla")(q.astype(jnp.float32), *rest),
        baseline=run("xla"),
        tolerance=TOLERANCES["bfloat16"],
        flops=2 * batch * heads * context * (width + value),
        bytes_moved=batch * context * width * 2,
    )


def large_pool(pages: int = 1100, layers: int = 32, boundary: int = 1024, backend: str = "mosaic_gpu") -> Case:
    """Decoding over pools that are NaN but for the pages in use, at both ends and around page `boundary`.

    1100 pages of 32 layers, 8 heads and 64 slots of 128 are 2.3e9 elements and 4.6 GB for keys, and as much for values:
    more than 32 bits of bytes, or 31 of elements, which end at page 1024.
    """
    batch, heads, kv_heads, page, width = 2, 32, 8, 64, 128
    numbers = (0, 1, boundary - 1, boundary, boundary + 1, *range(pages - 5, pages))
    entries, shape = len(numbers) // batch, (pages, layers, kv_heads, page, width)

    def filled(used: jax.Array) -> jax.Array:
        pool = jnp.full(shape, jnp.nan, used.dtype)
        for place, number in enumerate(numbers):
            pool = lax.dynamic_update_slice(pool, used[place : place + 1], (number, 0, 0, 0, 0))
        return pool

    def inputs(seed: int) -> tuple[Any, ...]:
        used = (len(numbers), *shape[1:])
        q, k, v = _random(seed, (batch, 1, heads, width), used, used)
        table = jnp.asarray(numbers, jnp.int32).reshape(batch, 1, entries)
        # Compiled, so that updates happen in place: one pool after another would not fit.
        k, v = jax.jit(filled)(k), jax.jit(filled)(v)
        return q, k, v, table, _lengths(batch, entries * page - 5), jnp.full(1, layers - 1, jnp.int32)

    def near(q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array, lengths: jax.Array, layer: jax.Array) -> Any:
        # Pages are taken out one by one, so that the reference itself addresses nothing large.
        k, v = (jnp.concatenate([pool[number : number + 1] for number in numbers]) for pool in (k, v))
        order = jnp.arange(len(numbers), dtype=jnp.int32).reshape(table.shape)
        return paged_attention(q.astype(jnp.float32), k, v, order, lengths, layer=layer, backend="xla")

    return Case(
        name=f"decode pools of {pages * layers * kv_heads * page * width / 2**31:.2f} x 2^31 elements",
        operation="paged_attention",
        backend=backend,
        size="full",
        inputs=inputs,
        call=lambda q, k, v, table, lengths, layer: paged_attention(
            q, k, v, table, lengths, layer=layer, backend=backend
        ),
        reference=near,
        tolerance=TOLERANCES["bfloat16"],
    )


def _mask(causal: bool) -> str:
    return "causal" if causal else "full"


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def _random(seed: int, *shapes: tuple[int, ...]) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return tuple(jax.random.normal(key, shape, BF16) for key, shape in zip(keys, shapes, strict=True))


def _lengths(batch: int, length: int) -> jax.Array:
    return jnp.full((batch, 1), length, jnp.int32)


def _table(seed: int, batch: int, entries: int) -> jax.Array:
    """int32[B, 1, N]: every page once, in random order."""
    return jax.random.permutation(jax.random.key(seed), batch * entries).reshape(batch, 1, entries).astype(jnp.int32)


def _by_head(call: Callable[..., Any], *arrays: jax.Array) -> Any:
    """`call` on one head of [B, T, H, *] arrays at a time."""
    split = tuple(jnp.moveaxis(array, 2, 0)[:, :, :, None] for array in arrays)
    outs = lax.map(lambda heads: call(*heads), split)
    return jax.tree.map(lambda out: jnp.moveaxis(out[:, :, :, 0], 0, 2), outs)


def _wide(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(array.astype(jnp.float32) for array in arrays)
