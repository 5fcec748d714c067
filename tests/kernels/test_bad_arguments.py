"""Arguments that no operation takes: each ends in a ValueError that says what was given and what is allowed.

They are refused before a backend is chosen, since a kernel trusts shapes, and would read beyond an array's end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import (
    Pools,
    append,
    attention,
    attention_weights,
    merge,
    paged_attention,
    paged_weights,
    shared_prefix,
    triton_call,
)


def array(*axes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(axes, jnp.dtype(dtype))


def ints(*axes: int) -> jax.ShapeDtypeStruct:
    return array(*axes, dtype=jnp.int32)


Q, K = array(2, 5, 4, 8), array(2, 5, 2, 8)
DENSE: dict[str, Any] = dict(q=Q, k=K, v=K)
DENSE_WEIGHTS: dict[str, Any] = dict(q=Q, k=K, lse=array(2, 5, 4), row_weights=array(2, 5))
POOL = array(9, 3, 2, 4, 8)
ROWS: dict[str, Any] = dict(block_table=ints(2, 1, 6), lengths=ints(2, 1), layer=ints(1))
PAGED: dict[str, Any] = dict(q=Q, k_pool=POOL, v_pool=POOL, **ROWS)
WEIGHTS: dict[str, Any] = dict(q=Q, k_pool=POOL, lse=array(2, 5, 4), row_weights=array(2, 5), **ROWS)
PREFIX: dict[str, Any] = dict(PAGED, prefix_table=ints(3, 1, 2), prefix_lengths=ints(3, 1), group=ints(2))
NEW = array(2, 3, 2, 8)
WRITE: dict[str, Any] = dict(
    pools=Pools(POOL, POOL),
    k=NEW,
    v=NEW,
    block_table=ints(2, 1, 6),
    slots=ints(2, 1, 3),
    positions=ints(2, 3),
    layer=ints(1),
    frequencies=array(4),
)
CODES = array(9, 3, 2, 4, 8, dtype=jnp.int8)
PACKED = array(9, 3, 2, 4, 4, dtype=jnp.uint8)
STEPS = array(9, 3, 2, 4)
GROUPS = array(9, 3, 2, 4, 2, dtype=jnp.float16)


def call(operation: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Traced, so that nothing is compiled: arrays are only shapes, whatever is no array is told."""
    arrays = {name: x for name, x in given.items() if isinstance(x, jax.ShapeDtypeStruct | Pools)}
    rest = {name: x for name, x in given.items() if name not in arrays}
    return jax.eval_shape(lambda arrays: operation(**arrays, **rest), arrays)


GOOD: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (attention, DENSE),
    (attention, dict(DENSE, causal=False, positions=ints(1, 5), lengths=ints(2), scale=2, soft_cap=jnp.float32(3))),
    (attention_weights, DENSE_WEIGHTS),
    (paged_attention, PAGED),
    (paged_attention, dict(PAGED, window=ints(), block_table=array(2, 1, 6, dtype=jnp.int16))),
    (paged_attention, dict(PAGED, k_pool=CODES, v_pool=CODES, k_scale=STEPS, v_scale=STEPS)),
    (
        paged_attention,
        dict(PAGED, k_pool=PACKED, v_pool=PACKED, k_scale=array(9, 3, 2, 1, 8), v_scale=GROUPS, v_min=GROUPS),
    ),
    (paged_weights, WEIGHTS),
    (shared_prefix, PREFIX),
    (append, WRITE),
    (merge, dict(outs=array(2, 3, 8), lses=array(2, 3))),
]


@pytest.mark.parametrize("operation, given", GOOD)
def test_what_is_described_is_taken(operation: Callable[..., Any], given: dict[str, Any]) -> None:
    """Otherwise the refusals below would prove nothing."""
    call(operation, given)


BAD: list[tuple[Callable[..., Any], dict[str, Any], dict[str, Any], str]] = [
    # Ranks and sizes that do not fit each other.
    (attention, DENSE, {"q": array(5, 4, 8)}, r"q\[B,T,H,D\].* got \(5, 4, 8\)"),
    (attention, DENSE, {"q": array(1, 5, 4, 8)}, r"got \(1, 5, 4, 8\), \(2, 5, 2, 8\)"),
    (attention, DENSE, {"k": array(2, 5, 2, 7)}, r"got .*\(2, 5, 2, 7\)"),
    (attention, DENSE, {"v": array(2, 4, 2, 8)}, r"got .*\(2, 4, 2, 8\)"),
    (attention, DENSE, {"q": array(2, 5, 5, 8)}, "multiple of KV heads, got 5 and 2"),
    (attention, DENSE, {"k": array(2, 0, 2, 8), "v": array(2, 0, 2, 8)}, r"k must not be empty, got shape \(2, 0"),
    (attention, DENSE, {"lengths": ints(1)}, r"lengths must be integers of shape \[2\], got shape \(1,\)"),
    (attention, DENSE, {"segment_ids": ints(1, 5)}, r"segment_ids must be integers of shape \[2, 5\]"),
    (attention, DENSE, {"q": array(2, 3, 4, 8), "segment_ids": ints(2, 3)}, "as many queries as keys, got 3 and 5"),
    (attention, DENSE, {"positions": ints(2, 4)}, r"positions must be integers of shape \[2 or 1, 5\]"),
    (attention, DENSE, {"q_positions": ints(3, 5)}, r"q_positions must be .*\[2 or 1, 5\], got shape \(3, 5\)"),
    (attention_weights, DENSE_WEIGHTS, {"lse": array(2, 4, 5)}, r"lse must be .* \(2, 5, 4\), got .* \(2, 4, 5\)"),
    (attention_weights, DENSE_WEIGHTS, {"row_weights": ints(2, 5)}, "row_weights must be floating-point.*got int32"),
    (paged_attention, PAGED, {"k_pool": array(9, 2, 4, 8)}, r"pools \[P,layers,heads,page,D\].*\(9, 2, 4, 8\)"),
    (paged_attention, PAGED, {"v_pool": array(9, 3, 2, 5, 8)}, r"v_pool must be \(9, 3, 2, 4, 'Dv'\).*5, 8\)"),
    (
        paged_attention,
        PAGED,
        {"block_table": ints(3, 1, 6)},
        r"block_table must be .*\[2, 1, 6\], got shape \(3, 1, 6\)",
    ),
    (paged_attention, PAGED, {"block_table": ints(2, 1, 0)}, "block_table must not be empty"),
    (paged_attention, PAGED, {"k_pool": array(9, 3, 2, 0, 8)}, "k_pool must not be empty"),
    (paged_attention, PAGED, {"block_table": ints(2, 2, 6)}, "a row per head needs heads_per_page 1, got 2"),
    (paged_attention, PAGED, {"q": array(2, 5, 3, 8)}, "multiple of KV heads, got 3 and 2"),
    (paged_attention, PAGED, {"q": array(2, 5, 4, 7)}, "as wide as queries, 7, or codes of uint8.*width 8"),
    (paged_attention, PAGED, {"lengths": ints(2)}, r"lengths must be integers of shape \[2, 1\]"),
    (paged_attention, PAGED, {"layer": ints()}, r"layer must be integers of shape \[1\], got shape \(\)"),
    (paged_attention, PAGED, {"positions": ints(2, 1, 23)}, r"positions must be .*\[2, 1, 24\]"),
    (paged_attention, PAGED, {"q_positions": ints(2, 4)}, r"q_positions must be .*\[2, 5\]"),
    (paged_attention, PAGED, {"value_dim": 4}, "takes a v_pool, or"),
    (paged_attention, PAGED, {"v_pool": None}, "takes a v_pool, or"),
    (paged_attention, PAGED, {"v_pool": None, "value_dim": 9}, "within the key's 8 columns, got 9"),
    (paged_weights, WEIGHTS, {"lse": array(2, 5, 2)}, r"lse must be .*\(2, 5, 4\), got .*\(2, 5, 2\)"),
    (paged_weights, WEIGHTS, {"row_weights": array(2, 1)}, r"row_weights must be .*\(2, 5\)"),
    (shared_prefix, PREFIX, {"group": ints(3)}, r"group must be integers of shape \[2\], got shape \(3,\)"),
    (shared_prefix, PREFIX, {"prefix_table": ints(3, 2, 2)}, r"prefix_table must be .*\[3, 1, 2\]"),
    (shared_prefix, PREFIX, {"prefix_lengths": ints(2, 1)}, r"prefix_lengths must be .*\[3, 1\]"),
    (shared_prefix, PREFIX, {"prefix_positions": ints(3, 1, 9)}, r"prefix_positions must be .*\[3, 1, 8\]"),
    (shared_prefix, PREFIX, {"lengths": ints(1, 1)}, r"lengths must be .*\[2, 1\]"),
    (shared_prefix, PREFIX, {"sharers": 0}, "sharers must be at least 1, got 0"),
    (append, WRITE, {"slots": ints(2, 1, 2)}, r"slots must be integers of shape \[2, 1, 3\]"),
    (append, WRITE, {"k": array(2, 3, 3, 8)}, "3 KV heads do not fit"),
    (append, WRITE, {"v": None}, "if and only if there is a pool"),
    (append, WRITE, {"v": array(2, 3, 2, 4)}, r"got v \(2, 3, 2, 4\) and its pool"),
    (append, WRITE, {"pools": Pools(CODES, CODES)}, "a scale per vector; the k pool is int8"),
    (append, WRITE, {"pools": Pools(CODES, CODES, STEPS, array(9, 3, 2))}, r"v_scale must be .*\(9, 3, 2, 4\)"),
    (append, WRITE, {"frequencies": array(5)}, r"up to 4 pairs .* got \(5,\)"),
    (merge, GOOD[-1][1], {"lses": array(2, 8)}, r"outs \[I, ..., D\] and lses .* got \(2, 3, 8\), \(2, 8\)"),
    # Dtypes.
    (attention, DENSE, {"k": array(2, 5, 2, 8, dtype=jnp.bfloat16)}, "one floating-point dtype, got .*k bfloat16"),
    (attention, DENSE, dict.fromkeys("qkv", ints(2, 5, 2, 8)), "one floating-point dtype, got q int32"),
    (attention, DENSE, {"lengths": array(2)}, "lengths must be integers, int32, got float32"),
    (paged_attention, PAGED, {"q": ints(2, 5, 4, 8)}, "q must be of a floating-point dtype, got int32"),
    (paged_attention, PAGED, {"block_table": array(2, 1, 6)}, "block_table must be integers, int32, got float32"),
    (paged_attention, PAGED, {"lengths": array(2, 1, dtype=bool)}, "lengths must be integers, int32, got bool"),
    (paged_attention, PAGED, {"k_pool": ints(9, 3, 2, 4, 8)}, "k_pool must hold .*uint16, uint8, int8, got int32"),
    (append, WRITE, {"block_table": array(2, 1, 6)}, "block_table must be integers, int32, got float32"),
    # Codes and their scales.
    (paged_attention, PAGED, {"k_pool": CODES}, "a k_pool of int8 holds codes, which need a k_scale"),
    (paged_attention, PAGED, {"k_scale": array(9, 3, 2, 8)}, r"per vector \(9, 3, 2, 4\), for groups.*\(9, 3, 2, 8\)"),
    (paged_attention, PAGED, {"v_scale": array(9, 3, 2, 4, 3)}, "groups'.* a divisor of 8"),
    (paged_attention, PAGED, {"k_scale": array(9, 3, 2, 2, 8)}, r"per channel of a page \(9, 3, 2, 1, 8\)"),
    (paged_attention, PAGED, {"k_scale": ints(9, 3, 2, 4)}, "k_scale must be of a floating-point dtype, got int32"),
    (paged_attention, PAGED, {"k_scale": STEPS, "k_min": STEPS}, "k_min must be of the shape of k_scale, which must"),
    (paged_attention, PAGED, {"k_min": GROUPS}, "k_min needs a k_scale"),
    (paged_attention, PAGED, {"v_pool": None, "value_dim": 4, "v_scale": STEPS}, "of a v_pool, and there is none"),
    (paged_weights, WEIGHTS, {"k_pool": CODES}, "a k_pool of int8 holds codes, which need a k_scale"),
    # Numbers.
    (attention, DENSE, {"window": 0}, "window must be at least 1.*got 0"),
    (attention, DENSE, {"window": 2.0}, "window must be an integer, got 2.0"),
    (attention, DENSE, {"window": array(1)}, "window must be integers, int32, got float32"),
    (attention, DENSE, {"window": 2, "causal": False}, "a window needs causal=True"),
    (attention, DENSE, {"scale": float("nan")}, "scale must be a finite number, got nan"),
    (attention, DENSE, {"scale": array(2)}, "scale must be a finite number"),
    (attention_weights, DENSE_WEIGHTS, {"soft_cap": -1.0}, "soft_cap must be a positive number, got -1.0"),
    (paged_attention, PAGED, {"soft_cap": 0.0}, "soft_cap must be a positive number, got 0.0"),
    (paged_weights, WEIGHTS, {"window": -3}, "window must be at least 1.*got -3"),
    # Backends.
    *(
        (operation, given, {"backend": "nonsense"}, "has no backend 'nonsense'; it has: .*xla")
        for operation, given in (
            (attention, DENSE),
            (attention_weights, DENSE_WEIGHTS),
            (paged_attention, PAGED),
            (paged_weights, WEIGHTS),
            (shared_prefix, PREFIX),
        )
    ),
]


@pytest.mark.parametrize("operation, given, change, reason", BAD, ids=[f"{one[0].__name__}-{one[3]}" for one in BAD])
def test_what_is_not_is_refused_with_what_was_given_and_what_is_allowed(
    operation: Callable[..., Any], given: dict[str, Any], change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        call(operation, {**given, **change})


@pytest.mark.parametrize("backend", ["mosaic_gpu", "triton"])
@pytest.mark.parametrize(
    "operation, given",
    [
        (attention, dict.fromkeys("qkv", array(2, 5, 2, 63, dtype=jnp.bfloat16))),
        (
            paged_attention,
            dict(PAGED, q=array(2, 5, 4, 63), k_pool=array(9, 3, 2, 4, 63), v_pool=array(9, 3, 2, 4, 63)),
        ),
    ],
)
def test_a_width_or_a_page_that_a_kernel_lacks_is_no_error_but_a_reason(
    backend: str, operation: Callable[..., Any], given: dict[str, Any]
) -> None:
    """Such a call is right, so without a name `xla` serves it."""
    with pytest.raises(NotImplementedError, match=f"cannot be served: {backend}: "):
        call(operation, {**given, "backend": backend})
    call(operation, given)


@pytest.mark.parametrize("backend", ["mosaic_gpu", "triton"])
@pytest.mark.parametrize("name", ["scale", "soft_cap"])
@pytest.mark.parametrize("operation", [attention, paged_attention, paged_weights])
def test_a_number_known_only_when_the_program_runs_is_left_to_xla(
    operation: Callable[..., Any], name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels are compiled for theirs. Whatever else a call is, it can be served by name."""
    monkeypatch.setattr(triton_call, "absent", lambda: None)
    half = functools.partial(array, dtype=jnp.bfloat16)
    q, pool = half(2, 5, 4, 64), half(9, 3, 2, 64, 64)
    given = {
        attention: dict.fromkeys("qkv", q),
        paged_attention: dict(PAGED, q=q, k_pool=pool, v_pool=pool),
        paged_weights: dict(WEIGHTS, q=q, k_pool=pool),
    }[operation]
    given = {**given, name: array()}
    with pytest.raises(NotImplementedError, match=f"{backend}: takes a (positive )?Python number as {name}"):
        call(operation, {**given, "backend": backend})
    call(operation, {**given, "backend": "xla"})


def test_a_length_beyond_the_table_reads_what_the_table_holds() -> None:
    """What is longer is known only when the program runs: nothing beyond the table may be read."""
    random = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(random[0], (1, 1, 2, 8))
    pools = dict(zip(("k_pool", "v_pool"), jax.random.normal(random[1], (2, 3, 1, 2, 4, 8)), strict=True))
    table, at = jnp.array([[[2, 0]]]), jnp.array([[7]])
    for backend in ("xla", "xla_blocks"):
        found, expected = (
            paged_attention(
                q, **pools, block_table=table, lengths=jnp.array([[n]]), layer=jnp.zeros(1, int), q_positions=at,
                backend=backend,
            )
            for n in (1000, 8)
        )  # fmt: skip
        for one, other in zip(found, expected, strict=True):
            assert jnp.array_equal(one, other)
