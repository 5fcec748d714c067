"""Cross-attention to an encoded context (CEPE, Yen et al. 2024, 2402.16617), without a cache and over pages.

All tokens of all chunks of a sequence share one softmax; nothing is rotated and nothing masked but padding.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.attention.sharded import attention, paged_attention
from kvjax.cache.state import Group
from kvjax.cache.write import place_in_page


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What attends without a cache are given in its place.

    Attributes:
      encoded: [B, S, E], what the encoder gave for all chunks of a sequence, side by side.
      real: bool[B, S], False at padding.
    """

    encoded: jax.Array
    real: jax.Array


def cross_dense(
    context: Context,
    q: jax.Array,
    to_k: jax.Array,
    to_v: jax.Array,
    positions: jax.Array,
    backend: str | None = None,
) -> jax.Array:
    """q [B,T,H,D], to_k and to_v [K,D,E], positions int32[B,T] (-1: padding) -> [B,T,H,D]; 0 where nothing is seen."""
    k, v = (jnp.einsum("bse,kde->bskd", context.encoded, weight) for weight in (to_k, to_v))
    held = jnp.where(context.real, 0, -1)
    return attention(q, k, v, causal=False, positions=held, q_positions=positions, backend=backend)[0]


def cross_paged(
    group: Group, q: jax.Array, to_k: jax.Array, to_v: jax.Array, positions: jax.Array, backend: str | None = None
) -> jax.Array:
    """The same over pages that hold encoded vectors, each key and value at once of one KV head.

    A head's to_k goes into its query and its to_v follows the average: no keys and values are ever made, and a token
    costs E elements whatever the number of layers and heads (exact, as in multi-head latent attention).
    """
    batch, tokens, heads, width = q.shape
    kv_heads = to_k.shape[0]
    grouped = q.reshape(batch, tokens, kv_heads, heads // kv_heads, width)
    wide = jnp.einsum("btkgd,kde->btkge", grouped, to_k).reshape(batch, tokens, heads, -1)
    slots = group.table.shape[2] * group.layout.page_size
    out, _ = paged_attention(
        wide,
        group.k.values,
        None,
        jnp.moveaxis(group.table, 0, 1),
        group.length.T,
        layer=place_in_page(group, 0),
        # Beyond every slot: what is causal hides none.
        q_positions=jnp.where(positions >= 0, slots, -1),
        scale=width**-0.5,
        value_dim=group.layout.spec.value_dim,
        k_scale=group.k.scale,
        k_min=group.k.minimum,
        backend=backend,
    )
    grouped = out.reshape(batch, tokens, kv_heads, heads // kv_heads, -1)
    return jnp.einsum("btkge,kde->btkgd", grouped, to_v).reshape(q.shape)
