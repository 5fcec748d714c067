"""What operations ask of their arguments before any backend sees them. Errors say what was given and what is allowed.

A kernel addresses memory by the shapes it was told of. An array of another shape would be read beyond its end.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def integers(array: Any, shape: tuple[int | tuple[int, ...], ...], name: str) -> jax.Array:
    """`array` as int32.

    Args:
      shape: what it must have; several numbers for an axis: one of them.

    Raises:
      ValueError: it has another shape, or holds no integers.
    """
    axes = [(axis,) if isinstance(axis, int) else axis for axis in shape]
    given = jnp.shape(array)
    if len(given) != len(axes) or any(size not in axis for size, axis in zip(given, axes, strict=True)):
        wanted = ", ".join(" or ".join(map(str, dict.fromkeys(axis))) for axis in axes)
        raise ValueError(f"{name} must be integers of shape [{wanted}], got shape {given}")
    if not jnp.issubdtype(jnp.result_type(array), jnp.integer):
        raise ValueError(f"{name} must be integers, int32, got {jnp.result_type(array)}")
    return jnp.asarray(array).astype(jnp.int32)


def floats(array: Any, shape: tuple[int, ...], name: str) -> None:
    """Raises ValueError where an array has another shape, or holds no floating-point numbers."""
    if jnp.shape(array) != shape or not jnp.issubdtype(jnp.result_type(array), jnp.floating):
        raise ValueError(
            f"{name} must be floating-point numbers of shape {shape}, "
            f"got {jnp.result_type(array)} of shape {jnp.shape(array)}"
        )


def same_dtype(**arrays: Any) -> None:
    """Raises ValueError unless all are of one floating-point dtype."""
    dtypes = {name: jnp.result_type(array) for name, array in arrays.items()}
    if len(set(dtypes.values())) > 1 or not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes.values()):
        given = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise ValueError(f"{', '.join(dtypes)} must be of one floating-point dtype, got {given}")


def number(value: Any, name: str, *, positive: bool = False) -> Any:
    """A Python float, or what is known only when the program runs as it is.

    Raises:
      ValueError: it is no number, not finite, or not positive where it must be.
    """
    if isinstance(value, jax.core.Tracer) and value.shape == ():
        return value
    if isinstance(value, numbers.Real) or (isinstance(value, jax.Array) and value.shape == ()):
        value = float(value)
        if math.isfinite(value) and (value > 0 or not positive):
            return value
    raise ValueError(f"{name} must be a {'positive' if positive else 'finite'} number, got {value!r}")


def window_of(value: Any) -> Any:
    """A window: None, a Python int, or an integer that is known only when the program runs, int32[].

    Raises:
      ValueError: it is no integer, or not positive.
    """
    if value is None:
        return None
    if isinstance(value, numbers.Integral):
        if value < 1:
            raise ValueError(f"window must be at least 1, as a query's own position counts, got {value}")
        return int(value)
    if math.prod(jnp.shape(value)) == 1 and hasattr(value, "dtype"):
        return integers(jnp.reshape(value, ()), (), "window")
    raise ValueError(f"window must be an integer, got {value!r}")


def not_empty(arrays: Mapping[str, Any]) -> None:
    """Raises ValueError for an array without elements."""
    for name, array in arrays.items():
        if 0 in jnp.shape(array):
            raise ValueError(f"{name} must not be empty, got shape {jnp.shape(array)}")


def heads_of(query_heads: int, kv_heads: int) -> None:
    """Raises ValueError unless every KV head has as many query heads."""
    if query_heads % kv_heads:
        raise ValueError(f"query heads must be a multiple of KV heads, got {query_heads} and {kv_heads}")
