"""Weights of which a part was trained apart: chosen ones, or low-rank adapters beside them."""

from __future__ import annotations

import jax.numpy as jnp

from kvjax.typing import Params

ADAPTER = {"a", "b"}
"""What stands in place of a module that is adapted: A [rank, in] and B [out, rank], after a layer axis if stacked."""


def joined(frozen: Params, trained: Params, scale: float = 1.0) -> Params:
    """The weights of `frozen`, with those of `trained` in their place, and W + scale * B A where it holds A and B.

    Adapted weights come in float32, all others as they are.
    """
    out = dict(frozen)
    for name, part in trained.items():
        if not isinstance(part, dict):
            out[name] = part
        elif part.keys() == ADAPTER:
            weight = frozen[name]["weight"].astype(jnp.float32)
            added = jnp.matmul(part["b"].astype(jnp.float32), part["a"].astype(jnp.float32))
            out[name] = {**frozen[name], "weight": weight + scale * added}
        else:
            out[name] = joined(frozen.get(name, {}), part, scale)
    return out
