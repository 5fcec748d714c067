"""Several key heads merged into one after RoPE (Yu et al. 2024, 2406.07056)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from kvjax.config import ModelConfig


class MergedKeys(nn.Module):
    """Rotated q [B,T,H,D] and k [B,T,key_heads,D] -> q [B,T,H,D], k [B,T,K,D], to be attended to as they are.

    The parameter `weight` [K, t, D, D] holds, for each of the t heads that become one, a block V: the merged key is the
    sum of k V over them, and a query of such a head becomes q V. With all t D columns, not D, this would be exact where
    the stacked blocks are orthogonal. A rotation goes through no such matrix, which is why both are turned before.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        c = self.config
        count, width = c.key_heads // c.num_kv_heads, c.width
        weight = self.param("weight", nn.initializers.orthogonal(), (c.num_kv_heads, count, width, width))
        groups = q.reshape(*q.shape[:2], c.num_kv_heads, count, -1, width)
        q = jnp.einsum("btkigd,kide->btkige", groups, weight.astype(q.dtype)).reshape(q.shape)
        k = k.reshape(*k.shape[:2], c.num_kv_heads, count, width)
        return q, jnp.einsum("btkid,kide->btke", k, weight.astype(k.dtype))


def unturned(x: jax.Array, positions: jax.Array) -> jax.Array:
    """The `rotate` of what is rotated already."""
    return x
