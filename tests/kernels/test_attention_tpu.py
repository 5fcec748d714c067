"""Dense attention on TPUs without one: interpreted and lowered on the CPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, paged_attention, paged_weights
from pallas_kernels.attention import tpu
from pallas_kernels.attention.tpu_cases import cases
from pallas_kernels.checks import gates, interpret, on_gpu
from pallas_kernels.checks.numerics import relative_error
from pallas_kernels.paged_attention.shapes import Shape, inputs

Sizes = tuple[int, int, int, int, int, int, int]
"""B, T, S, H, K, D, Dv."""


def arrays(sizes: Sizes) -> list[jax.Array]:
    """q, k, v and gradients of both outputs."""
    batch, tokens, keys, heads, kv_heads, width, value = sizes
    lead, held = (batch, tokens, heads), (batch, keys, kv_heads)
    shapes = ((*lead, width), (*held, width), (*held, value), (*lead, value), lead)
    return [
        jax.random.normal(key, shape) for key, shape in zip(jax.random.split(jax.random.key(0), 5), shapes, strict=True)
    ]


def outputs_and_gradients(backend: str, options: dict[str, Any], *given: jax.Array) -> Any:
    *qkv, dout, dlse = given
    (out, lse), pull_back = jax.vjp(lambda *x: attention(*x, backend=backend, **options), *qkv)
    return out, lse, *pull_back((dout, jnp.where(jnp.isfinite(lse), dlse, 0.0)))


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        pytest.param((2, 70, 130, 2, 1, 64, 32), dict(lengths=jnp.array([100, 0])), id="ragged, queries at the end"),
        pytest.param(
            (1, 150, 100, 2, 2, 48, 48), dict(lengths=jnp.array([90]), scale=0.3), id="more queries than keys"
        ),
        pytest.param(
            (2, 130, 130, 4, 2, 16, 16),
            dict(window=20, soft_cap=1.5, segment_ids=jnp.arange(130) // jnp.array([[50], [33]])),
            id="packed, window, soft cap, groups",
        ),
        pytest.param((1, 65, 140, 1, 1, 16, 16), dict(causal=False), id="not causal"),
    ],
)
def test_outputs_and_gradients_equal_the_reference_whatever_padding_holds(
    sizes: Sizes, options: dict[str, Any]
) -> None:
    """Both outputs have a gradient. Queries that see nothing are among them, and NaN beyond the lengths."""
    q, k, v, *gradients = arrays(sizes)
    expected = jax.jit(lambda *x: outputs_and_gradients("xla", options, *x))(q, k, v, *gradients)
    if (lengths := options.get("lengths")) is not None:
        k, v = (jnp.where((jnp.arange(sizes[2]) < lengths[:, None])[..., None, None], x, jnp.nan) for x in (k, v))
    with interpret.interpreted_tpu():
        found = jax.jit(lambda *x: outputs_and_gradients("tpu", options, *x))(q, k, v, *gradients)
        found = jax.block_until_ready(found)
    np.testing.assert_array_equal(np.isneginf(found[1]), np.isneginf(expected[1]))
    for one, other in zip(found, expected, strict=True):
        # Sums of at most 150 terms in float32, in another order.
        assert relative_error(*(np.where(np.isneginf(x), 0.0, x) for x in (one, other))) < 1e-5
    if lengths is not None:
        assert np.isneginf(expected[1]).any()


@pytest.mark.parametrize("name", ["tpu causal group2 d64 small", "tpu d128 group4 causal"])
def test_gates_take_its_cases(name: str) -> None:
    case = next(case for case in cases() if case.name == name)
    small = case.size == "small"
    verdict = gates.check("interpret" if small else "lower", case)
    assert verdict.passed, verdict.reason
    assert gates.applies("lower" if small else "interpret", case) is not None
    assert gates.check("compile", case).passed is None
    assert on_gpu.applies(case) is not None


def test_gradients_of_the_output_alone_take_three_kernels() -> None:
    """Forward, and backward for queries and for keys; those that the log-sum-exp needs are left out."""
    q = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)

    def kernels(used: int) -> int:
        def loss(q: Any, k: Any, v: Any) -> Any:
            return sum(jnp.sum(x.astype(jnp.float32)) for x in attention(q, k, v, backend="tpu")[:used])

        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, q, q)
        return traced.lower(lowering_platforms=("tpu",)).as_text().count("@tpu_custom_call")

    assert kernels(1) == 3
    assert kernels(2) > 3


CALL = dict(
    causal=True,
    window=None,
    soft_cap=None,
    lengths=None,
    segment_ids=None,
    positions=None,
    q_positions=None,
    scale=0.1,
    deterministic=True,
)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(positions=1), "no positions"),
        (dict(q_positions=1), "no q_positions"),
        (dict(window=jnp.int32(3)), "number as window"),
        (dict(soft_cap=jnp.ones(())), "number as soft_cap"),
    ],
)
def test_what_it_cannot_do_it_says(changes: dict[str, Any], reason: str) -> None:
    q = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.bfloat16)
    assert tpu.unsupported(q, q, q, **CALL) is None
    assert reason in str(tpu.unsupported(q, q, q, **{**CALL, **changes}))
    half, wide = (jax.ShapeDtypeStruct((1, 8, 2, width), dtype) for width, dtype in ((64, "float16"), (320, "float32")))
    assert "bfloat16" in str(tpu.unsupported(half, half, half, **CALL))
    assert "width" in str(tpu.unsupported(wide, wide, wide, **CALL))


@pytest.mark.skipif(jax.default_backend() == "tpu", reason="a TPU is here")
def test_another_device_is_none() -> None:
    assert "TPU" in str(tpu.unavailable())


def test_pages_are_read_by_xla_under_its_name() -> None:
    shape = Shape(batch=2, heads=4, kv_heads=2, width=16, page=8, entries=5, dtype="float16", lengths=(37, 9))
    q, k, v, table, lengths, layer, *_ = inputs(shape)(0)

    def both(backend: str) -> Any:
        out, lse = paged_attention(q, k, v, table, lengths, layer=layer, backend=backend)
        rows = jnp.ones(q.shape[:2])
        return out, paged_weights(q, k, table, lengths, lse=lse, row_weights=rows, layer=layer, backend=backend)

    for one, other in zip(both("tpu"), both("xla_blocks"), strict=True):
        np.testing.assert_array_equal(one, other)
