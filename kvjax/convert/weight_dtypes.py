"""Weight dtypes: which are allowed, and whether every value is a number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from kvjax.errors import ConfigError

WEIGHT_DTYPES = ("float32", "bfloat16", "float16")

# All exponent bits set: infinity or NaN.
_EXPONENT: dict[str, np.unsignedinteger[Any]] = {
    "float32": np.uint32(0x7F800000),
    "bfloat16": np.uint16(0x7F80),
    "float16": np.uint16(0x7C00),
}


def weight_dtype(dtype: Any) -> np.dtype:
    """`dtype` (a name, a NumPy or a jax dtype) as one that weights may have; `ConfigError` for others."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in WEIGHT_DTYPES:
        raise ConfigError(f'dtype must be None, "auto" or one of {", ".join(WEIGHT_DTYPES)}, got {dtype!r}')
    return found


def parameter_dtype(path: Sequence[str], dtype: np.dtype) -> np.dtype:
    """What the parameter at `path` of a model of `dtype` is loaded in.

    That is `dtype`, but float32 for the bias by which DeepSeek-V3 chooses experts: among scores that lie close together
    it decides by less than bfloat16 can tell.
    """
    return np.dtype(np.float32) if path[-1] == "selection_bias" else dtype


def all_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; on integers, as NumPy's own test is slow for bfloat16."""
    mask = _EXPONENT[values.dtype.name]
    return not np.any((values.view(mask.dtype) & mask) == mask)
