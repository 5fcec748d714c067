"""Attention of a whole prompt within one layer, chunk by chunk over scratch that only this layer needs."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from kvjax.attention.blending import Entries, Tokens, attend_own, attend_runs, blend_chunk
from kvjax.attention.context import cross_paged
from kvjax.attention.partial import attend_among, merged
from kvjax.attention.sharded import attention_weights
from kvjax.attention.tally import tallied
from kvjax.cache.calibrated import Tables, encoded, noted, read_back
from kvjax.cache.codecs import Encoded
from kvjax.cache.layout import GroupLayout
from kvjax.cache.policies.optional import blank_tally, decide, decides, next_joins
from kvjax.cache.policies.protocol import RowState
from kvjax.cache.state import Group, Tail, token_shapes
from kvjax.typing import Rotate, Scoring


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
      tables: the layer's, for calibrated codecs. first: the exact first tokens that such a codec keeps apart.
    """

    k: Encoded
    v: Encoded | None
    weights: jax.Array | RowState
    lengths: jax.Array
    offset: jax.Array
    context: tuple[Group, ...] = ()
    columns: jax.Array | None = None
    tables: Tables = dataclasses.field(default_factory=dict)
    first: Tail = dataclasses.field(default_factory=dict)


def empty_scratch(
    layout: GroupLayout,
    lengths: jax.Array,
    tokens: int,
    context: tuple[Group, ...] = (),
    columns: jax.Array | None = None,
    tables: Tables | None = None,
    first: Tail | None = None,
) -> Scratch:
    """Scratch for prompts of up to `tokens` tokens."""
    batch = lengths.shape[0]
    tally = blank_tally(layout.policy, layout.spec.kv_heads, batch, tokens)

    k, v = jax.tree.map(lambda leaf: jnp.zeros((batch, tokens, *leaf.shape), leaf.dtype), token_shapes(layout))
    return Scratch(
        k=k,
        v=v,
        weights=jnp.zeros((batch, layout.spec.kv_heads, tokens), jnp.float32) if tally is None else tally,
        lengths=lengths,
        offset=jnp.zeros((), jnp.int32),
        context=context,
        columns=columns,
        tables=tables or {},
        first=first or {},
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
        if decides(policy):
            return self._blended(cache, q, k, v, positions, rotate, scoring)

        def put(into: jax.Array, values: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(into, values.astype(into.dtype), cache.offset, axis=1)

        key, value, first = cache.k, cache.v, cache.first
        if write:
            key, value = jax.tree.map(put, (key, value), encoded(codec, cache.tables, k, v, positions, rotate))
            first = noted(first, k, v, positions)
        order = jnp.arange(key.values.shape[1])
        held = jnp.where(order < cache.lengths[:, None], order, -1) if cache.columns is None else cache.columns
        value_dim = self.layout.spec.value_dim
        keys, values = read_back(codec, cache.tables, first, key, value, held, rotate, value_dim, q.dtype)
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
        return out, dataclasses.replace(cache, k=key, v=value, weights=weights, first=first)

    def _blended(
        self,
        cache: Scratch,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array | None,
        positions: jax.Array,
        rotate: Rotate,
        scoring: Scoring,
    ) -> tuple[jax.Array, Scratch]:
        """`__call__` under a policy that decides: a query sees what each head had made of the tokens up to it.

        The scratch holds, for every token, the entry it went into as of that token. A query sees its own, and of those
        before it the ones that no later token joins.
        """
        layout, codec, tally = self.layout, self.layout.codec, cache.weights
        assert isinstance(tally, dict)
        decision = decide(layout.policy, q, k, layout.spec.query_factor)
        joins = decision.joins & (positions > 0)[..., None]

        def before(x: jax.Array, axis: int = 1) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, jnp.maximum(cache.offset - 1, 0), 1, axis)

        def put(into: jax.Array, values: jax.Array, axis: int = 1) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(into, values.astype(into.dtype), cache.offset, axis)

        k_before, v_before = jax.tree.map(before, (cache.k, cache.v))
        entries = blend_chunk(
            codec,
            Entries(k_before, v_before, jnp.moveaxis(before(tally["weight"], 2), 0, 2)),
            Tokens(rotate(decision.k, positions), v, decision.weight),
            joins,
            rotate,
        )
        key, value = jax.tree.map(put, (cache.k, cache.v), (entries.k, entries.v))
        made = {"weight": entries.weight, "joins": joins}
        tally = {name: put(old, jnp.moveaxis(made[name], 2, 0), 2) for name, old in tally.items()}

        def decoded(key: Encoded, value: Encoded | None) -> tuple[jax.Array, jax.Array]:
            keys = codec.decode(key, q.dtype)
            return keys, keys[..., : layout.spec.value_dim] if value is None else codec.decode(value, q.dtype)

        order = jnp.arange(cache.k.values.shape[1])
        real = (order < cache.lengths[:, None])[..., None] & ~jnp.moveaxis(next_joins(tally["joins"], 2), 0, 2)
        held = jnp.where(real, order[:, None], -1)
        turned_q, cap = rotate(decision.q, positions), scoring.soft_cap
        parts = [
            attend_runs(turned_q, *decoded(key, value), held, positions, layout.window, cap, self.backend),
            attend_own(turned_q, *decoded(entries.k, entries.v), next_joins(joins, 1), cap),
        ]
        out, _ = merged(parts, scoring.sinks)
        return out, dataclasses.replace(cache, k=key, v=value, weights=tally)

    def cross(
        self, cache: Scratch, q: jax.Array, to_k: jax.Array, to_v: jax.Array, positions: jax.Array
    ) -> jax.Array | None:
        """Reads the encoded context where it is."""
        return cross_paged(cache.context[0], q, to_k, to_v, positions, self.backend) if cache.context else None

    def end(self, cache: Scratch) -> Scratch:
        """Nothing to finish."""
        return cache
