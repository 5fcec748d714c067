"""Attention of a whole prompt within one layer, chunk by chunk over scratch that only this layer needs."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from kvjax.attention.context import cross_paged
from kvjax.attention.partial import attend_among, merged
from kvjax.attention.tally import tallied
from kvjax.cache.codecs import Encoded
from kvjax.cache.layout import GroupLayout
from kvjax.cache.policies.optional import blank_tally
from kvjax.cache.policies.protocol import RowState
from kvjax.cache.state import Group
from kvjax.typing import Rotate, Scoring
from pallas_kernels import attention_weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scratch:
    """One layer's prompt so far.

    Attributes:
      k, v: encoded as the cache will hold them, leaves [B, T, K, ...]; v None: the value lies in the key.
      weights: float32[B, K, T], the attention mass each token has received from the rows the policy counts; or the
        policy's own tally, name -> [K, B, T, ...].
      lengths: int32[B], prompt lengths. offset: int32[], where this chunk starts.
      context: the cache's pages of encoded context, to be read only.
      columns: int32[B, T], where the tokens stand, -1 is padding; None: side by side from 0 on.
    """

    k: Encoded
    v: Encoded | None
    weights: jax.Array | RowState
    lengths: jax.Array
    offset: jax.Array
    context: tuple[Group, ...] = ()
    columns: jax.Array | None = None


def empty_scratch(
    layout: GroupLayout,
    lengths: jax.Array,
    tokens: int,
    context: tuple[Group, ...] = (),
    columns: jax.Array | None = None,
) -> Scratch:
    """Scratch for prompts of up to `tokens` tokens."""
    batch = lengths.shape[0]
    tally = blank_tally(layout.policy, layout.spec.kv_heads, batch, tokens)

    def blank(width: int) -> Encoded:
        shape = jax.ShapeDtypeStruct((batch, tokens, layout.spec.kv_heads, width), layout.dtype)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(layout.codec.encode, shape))

    return Scratch(
        k=blank(layout.spec.key_dim),
        v=None if layout.spec.value_in_key else blank(layout.spec.value_dim),
        weights=jnp.zeros((batch, layout.spec.kv_heads, tokens), jnp.float32) if tally is None else tally,
        lengths=lengths,
        offset=jnp.zeros((), jnp.int32),
        context=context,
        columns=columns,
    )


@dataclasses.dataclass(frozen=True)
class ScratchAttend:
    """The `attend` of layer-by-layer prefill: full, exact attention of one chunk to the prompt up to it."""

    layout: GroupLayout
    backend: str | None = None
    latent: ClassVar[bool] = True

    def begin(self, cache: Scratch, tokens: jax.Array, positions: jax.Array) -> Scratch:
        """Nothing to prepare."""
        return cache

    def __call__(
        self,
        cache: Scratch,
        layer: Any,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array | None,
        positions: jax.Array,
        rotate: Rotate,
        *,
        scoring: Scoring = Scoring(),
        write: bool = True,
    ) -> tuple[jax.Array, Scratch]:
        """q [B,T,H,D], k [B,T,K,D], v [B,T,K,Dv] of the chunk, unrotated -> out [B,T,H,Dv], the scratch with it."""
        codec, policy = self.layout.codec, self.layout.policy

        def put(into: jax.Array, values: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(into, values.astype(into.dtype), cache.offset, axis=1)

        key, value = cache.k, cache.v
        if write:
            key = jax.tree.map(put, key, codec.encode(rotate(k, positions)))
            value = None if v is None else jax.tree.map(put, value, codec.encode(v))
        keys = codec.decode(key, q.dtype)
        values = keys[..., : self.layout.spec.value_dim] if value is None else codec.decode(value, q.dtype)
        order = jnp.arange(keys.shape[1])
        held = jnp.where(order < cache.lengths[:, None], order, -1) if cache.columns is None else cache.columns
        reads = policy.reads(self.layout.window)
        part = attend_among(q, keys, values, held, positions, reads, rotate, scoring.soft_cap, self.backend)
        out, lse = merged([part], scoring.sinks)
        weights = cache.weights
        if not (policy.observes and write):
            pass
        elif isinstance(weights, dict):
            weights = tallied(
                policy,
                weights,
                rotate(q, positions),
                keys,
                lse,
                positions,
                held,
                cache.lengths,
                self.layout.window,
                scoring.soft_cap,
            )
        else:
            weights = weights + attention_weights(
                rotate(q, positions),
                keys,
                lse=lse,
                row_weights=policy.prompt_rows(positions, cache.lengths),
                window=self.layout.window,
                soft_cap=scoring.soft_cap,
                positions=held,
                q_positions=positions,
                backend=self.backend,
            )
        return out, dataclasses.replace(cache, k=key, v=value, weights=weights)

    def cross(
        self, cache: Scratch, q: jax.Array, to_k: jax.Array, to_v: jax.Array, positions: jax.Array
    ) -> jax.Array | None:
        """Reads the encoded context where it is."""
        return cross_paged(cache.context[0], q, to_k, to_v, positions, self.backend) if cache.context else None

    def end(self, cache: Scratch) -> Scratch:
        """Nothing to finish."""
        return cache
