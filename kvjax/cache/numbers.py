"""Checks of what policies and selects are made of, and rounding that does not depend on float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.errors import ConfigError

EXACT_BELOW = 1 << 18


def check_integer(owner: object, name: str, least: int) -> None:
    """Refuses a field that is no integer or too small.

    Raises:
      ConfigError: naming field, value and rule.
    """
    value = getattr(owner, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{type(owner).__name__}.{name} must be an integer of at least {least}, got {value!r}")


def check_number(
    policy: object, name: str, least: float, most: float | None = None, *, open: bool = False, called: str | None = None
) -> None:
    """Refuses a field that is no finite number from `least` (with `open`: above it) to `most`.

    Args:
      called: the argument it was given as, if not by its own name.

    Raises:
      ConfigError: naming field, value and rule.
    """
    value = getattr(policy, name)
    number = isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
    if not number or value < least or (open and value == least) or (most is not None and value > most):
        rule = f"{'above' if open else 'at least'} {least}" + ("" if most is None else f" and at most {most}")
        raise ConfigError(f"{type(policy).__name__}.{called or name} must be a number {rule}, got {value!r}")


def ceil_share(share: float | np.ndarray, n: jax.Array, pick: jax.Array | int | None = None) -> jax.Array:
    """The smallest integer that is at least share * n, int32 like n, for shares of 0 to 1 and n of at least 0.

    float32 would round 0.95 * 20 to more than 19 and keep a token too many. Shares are taken apart into two 14-bit
    parts, whose products with n are exact below 2^18; what remains is off by less than n / 2^29.

    Args:
      pick: which of an array of shares; an index of any shape that broadcasts with n.
    """
    units = np.round(np.asarray(share, np.float64) * (1 << 28)).astype(np.int64)
    high, low = (jnp.asarray(part.astype(np.uint32)) for part in (units >> 14, units & ((1 << 14) - 1)))
    if pick is not None:
        high, low = high[pick], low[pick]
    count = jnp.minimum(n, EXACT_BELOW - 1).astype(jnp.uint32)
    coarse = high * count
    rest = ((coarse & jnp.uint32((1 << 14) - 1)) << 14) + low * count
    slack = jnp.minimum(rest, count // 2 + 1)
    exact = (coarse >> 14) + ((rest - slack + jnp.uint32((1 << 28) - 1)) >> 28)
    value = jnp.asarray(share, jnp.float32)
    wide = jnp.ceil((value if pick is None else value[pick]) * n.astype(jnp.float32))
    return jnp.where(n < EXACT_BELOW, exact.astype(jnp.int32), wide.astype(jnp.int32))
