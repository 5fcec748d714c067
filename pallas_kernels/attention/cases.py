"""The shapes at which the dense kernels for Hopper, and cuDNN's, are proven: every configuration and kind of mask."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tuning
from pallas_kernels.attention.api import attention
from pallas_kernels.attention.mosaic_gpu_call import SERVES_FUSED
from pallas_kernels.checks.case import Case
from pallas_kernels.checks.numerics import GRADIENT_TOLERANCE, LSE_TOLERANCE, TOLERANCES

CUDNN_DEVICES = ("8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "12.0")
DEVICES = {"mosaic_gpu": ("9.0",), "cudnn": CUDNN_DEVICES, "tpu": ()}


def cases() -> Iterable[Case]:
    """Small ones first."""
    yield case("causal d64", "small", (1, 128, 128, 2, 1, 64, 64))
    yield case("ragged d128", "small", (2, 70, 130, 1, 1, 128, 128), lengths=(129, 0))
    yield case("window cap d64", "small", (1, 64, 192, 1, 1, 64, 64), window=70, soft_cap=2.0)
    yield case("gradient causal d64", "small", (1, 128, 128, 2, 1, 64, 64), gradient=True)
    yield case("gradient d192/128", "small", (1, 65, 65, 1, 1, 192, 128), gradient=True, soft_cap=3.0)
    yield case(
        "segments sinks f16 d64", "small", (1, 130, 130, 1, 1, 64, 64), segments=True, sinks=True, dtype="float16"
    )
    yield case("window f16 d256", "small", (1, 64, 130, 1, 1, 256, 256), window=66, dtype="float16")
    yield case(
        "gradient segments sinks d64", "small", (1, 130, 130, 1, 1, 64, 64), gradient=True, segments=True, sinks=True
    )
    narrow: dict[str, Any] = dict(window=30, soft_cap=2.0, dtype="float16")
    yield case("gradient window cap f16 d256", "small", (1, 65, 65, 1, 1, 256, 256), gradient=True, **narrow)
    yield case(
        "gradient not causal ragged positions d64",
        "small",
        (1, 65, 130, 2, 1, 64, 64),
        gradient=True,
        causal=False,
        lengths=(100,),
        positions=True,
    )
    few: dict[str, Any] = dict(gradient=True, fused=True)
    if SERVES_FUSED:
        yield case("gradient fused d64", "small", (1, 192, 192, 2, 1, 64, 64), **few)
        yield case("gradient fused d128 lengths", "small", (1, 64, 130, 1, 1, 128, 128), lengths=(129,), **few)
        yield case("gradient fused d192/128", "small", (1, 130, 130, 1, 1, 192, 128), soft_cap=3.0, **few)
        yield case("gradient fused window cap f16 d256", "small", (1, 130, 130, 1, 1, 256, 256), **narrow, **few)
    fused = (("gradient fused ", few),) if SERVES_FUSED else ()
    for key, value in ((64, 64), (128, 128), (192, 128), (256, 256)):
        width = f"d{key}" if key == value else f"d{key}/{value}"
        shape = (2, 4096, 4096, 16, 4, key, value)
        for what, options in (("", {}), ("gradient ", dict(gradient=True)), *fused):
            yield case(f"{what}{width} group4 causal", "full", shape, **options)
            yield case(f"{what}{width} group4 causal f16", "full", shape, dtype="float16", **options)
            yield case(f"{what}{width} group4 cap window", "full", shape, soft_cap=30.0, window=1024, **options)
        yield case(f"{width} ragged", "full", (4, 777, 2000, 8, 1, key, value), lengths=(2000, 1, 0, 1500))
        yield case(f"{width} positions", "full", (2, 1000, 3000, 8, 8, key, value), positions=True)
        yield case(f"{width} segments", "full", (2, 2048, 2048, 8, 2, key, value), segments=True)
    yield case("d128 not causal", "full", (2, 4096, 4096, 16, 16, 128, 128), causal=False)
    ragged: dict[str, Any] = dict(gradient=True, lengths=(1000, 513))
    yield case("gradient d128 ragged", "full", (2, 1000, 1000, 8, 2, 128, 128), **ragged)
    if SERVES_FUSED:
        yield case("gradient fused d128 ragged", "full", (2, 1000, 1000, 8, 2, 128, 128), fused=True, **ragged)
    yield case("gradient d128 segments", "full", (2, 2048, 2048, 8, 2, 128, 128), gradient=True, segments=True)
    yield case("gradient d128 positions", "full", (2, 1000, 3000, 8, 8, 128, 128), gradient=True, positions=True)
    yield case("gradient d128 not causal", "full", (2, 2048, 2048, 8, 2, 128, 128), gradient=True, causal=False)
    yield from _cudnn_cases()


def _cudnn_cases() -> Iterable[Case]:
    """What cuDNN serves, for GPUs: nothing of it can be shown without one."""
    for gradient in (False, True):
        what = "cudnn gradient" if gradient else "cudnn"
        given: dict[str, Any] = dict(gradient=gradient, backend="cudnn")
        for width in (64, 128, 256):
            # Widths over 128 need compute capability 9.0.
            since = CUDNN_DEVICES if width <= 128 else CUDNN_DEVICES[4:]
            yield case(
                f"{what} d{width} group4 causal", "full", (2, 4096, 4096, 16, 4, width, width), **given, device=since
            )
        yield case(f"{what} d128 f16", "full", (2, 2048, 2048, 16, 4, 128, 128), dtype="float16", **given)
        yield case(f"{what} d128 not causal", "full", (2, 1000, 2048, 16, 4, 128, 128), causal=False, **given)
        yield case(f"{what} d128 ragged", "full", (4, 1000, 1000, 8, 2, 128, 128), lengths=(1000, 1, 0, 513), **given)
        yield case(f"{what} d128 window", "full", (2, 2048, 2048, 8, 2, 128, 128), window=300, **given)


def case(
    name: str,
    size: Any,
    shape: tuple[int, int, int, int, int, int, int],
    *,
    dtype: str = "bfloat16",
    gradient: bool = False,
    fused: bool = False,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    lengths: tuple[int, ...] | None = None,
    positions: bool = False,
    segments: bool = False,
    sinks: bool = False,
    backend: str = "mosaic_gpu",
    device: tuple[str, ...] | None = None,
    lse_tolerance: float = LSE_TOLERANCE,
) -> Case:
    """One case, or its gradients through both outputs.

    Args:
      shape: (B, T, S, H, K, D, Dv).
      sinks: one column more for each head, let in afterwards by the log-sum-exp.
      fused: gradients by the one kernel for all three, whatever was tuned; otherwise by the two.
    """
    batch, queries, keys, heads, kv_heads, width, value_width = shape

    def inputs(seed: int) -> tuple[Any, ...]:
        random = jax.random.split(jax.random.key(seed), 6)
        sizes = ((queries, heads, width), (keys, kv_heads, width), (keys, kv_heads, value_width))
        arrays = [jax.random.normal(random[i], (batch, *s), dtype) for i, s in enumerate(sizes)]
        masks = {}
        if lengths is not None:
            masks["lengths"] = jnp.array(lengths, jnp.int32)
        if positions:
            # Any order, and every tenth place empty.
            order = jax.random.permutation(random[3], jnp.broadcast_to(jnp.arange(keys), (batch, keys)), 1, True)
            masks["positions"] = jnp.where(order % 10 == 9, -1, order).astype(jnp.int32)
            masks["q_positions"] = jnp.broadcast_to(jnp.arange(queries, dtype=jnp.int32) + 500, (batch, queries))
        if segments:
            starts = jax.random.bernoulli(random[3], 4 / keys, (batch, keys))
            masks["segment_ids"] = jnp.cumsum(starts, axis=1, dtype=jnp.int32)
        if gradient:
            arrays.append(jax.random.normal(random[4], (batch, queries, heads, value_width), dtype))
            arrays.append(jax.random.normal(random[5], (batch, queries, heads), jnp.float32))
        return (*arrays, masks)

    def run(backend: str) -> Callable[..., Any]:
        def outputs(q: Any, k: Any, v: Any, masks: Any) -> Any:
            out, lse = attention(q, k, v, causal=causal, window=window, soft_cap=soft_cap, backend=backend, **masks)
            if not sinks:
                return out, lse
            total = jnp.logaddexp(lse, jnp.linspace(-1.0, 2.0, heads))
            return out * jnp.exp(lse - total)[..., None].astype(out.dtype), total

        def gradients(q: Any, k: Any, v: Any, dout: Any, dlse: Any, masks: Any) -> Any:
            with tuning.forced("attention", "fused", {"fused": fused}):
                (out, lse), pull_back = jax.vjp(lambda q, k, v: outputs(q, k, v, masks), q, k, v)
            return pull_back((dout.astype(out.dtype), jnp.where(jnp.isfinite(lse), dlse, 0.0)))

        return gradients if gradient else outputs

    def wide(*arguments: Any) -> Any:
        *arrays, masks = arguments
        return run("xla")(*(array.astype(jnp.float32) for array in arrays), masks)

    seen = _visible(shape, causal, window)
    return Case(
        name=name,
        operation="attention gradient" if gradient else "attention",
        backend=backend,
        size=size,
        inputs=inputs,
        call=run(backend),
        reference=wide,
        tolerance=GRADIENT_TOLERANCE if gradient else TOLERANCES[dtype],
        # What a mask of data hides is not known here.
        flops=None
        if lengths or positions or segments
        else 2.0 * batch * heads * seen * (width + value_width) * (3.5 if gradient else 1.0),
        baseline=run("xla"),
        device=DEVICES[backend] if device is None else device,
        lse_tolerance=lse_tolerance,
    )


def _visible(shape: tuple[int, ...], causal: bool, window: int | None) -> int:
    """Pairs of a query and a key it sees, of one head."""
    _, queries, keys = shape[:3]
    if not causal:
        return queries * keys
    last = np.arange(keys - queries, keys)
    return int(np.sum(np.minimum(last + 1, keys if window is None else window)))
