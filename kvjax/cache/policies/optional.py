"""What only some policies need beside the protocol: each a method or attribute of its own, and what holds without it.

A policy written from the protocol alone has none of them. `state` is always what is remembered per slot [R, B, S, ...]
together with what is settled per row [R, B]; their names are distinct.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kvjax.cache.policies.protocol import Policy, RowState


class Attended(NamedTuple):
    """What a row of attention weights was over.

    Attributes:
      position: int32[K or 1, B, S], the token in each slot that the row could see, -1 elsewhere.
      heads: query heads of a group, over which its weights are summed.
    """

    position: jax.Array
    heads: int


class Rows(NamedTuple):
    """Some rows of a prompt's attention.

    Attributes:
      weights: float32[K, B, n, T], summed over each group; 0 where a row sees nothing.
      seen: bool[B, n, T], which keys a row could see.
      queries, keys: int32[B, n] and int32[B, T], where rows and keys stand, -1 is padding.
      lengths: int32[B], prompt lengths.
      heads: query heads of a group.
    """

    weights: jax.Array
    seen: jax.Array
    queries: jax.Array
    keys: jax.Array
    lengths: jax.Array
    heads: int


class Decision(NamedTuple):
    """What a policy makes of new tokens in one layer before they are stored.

    Attributes:
      q: [B, T, H, D] and k: [B, T, K, D], unrotated, as they are attended and stored.
      joins: bool[B, T, K], whether a token goes into its head's newest entry, and not behind it.
      weight: float32[B, T, K], what a token weighs in the mean that such an entry is.
    """

    q: jax.Array
    k: jax.Array
    joins: jax.Array
    weight: jax.Array


def decides(policy: Policy) -> bool:
    """Whether a policy has `decide`. Without: what a new token is to the cache does not depend on the token.

    Its rows are per head, its `row_state` has a "weight" and its `blank_tally` a "weight" and "joins" (see `Decision`;
    of an entry, the sum of its tokens' weights). A prompt goes through layer by layer, and gives `keep` that tally;
    later tokens come one at a time, and land in the slot of the newest entry or in the one after it.
    """
    return hasattr(policy, "decide")


def decide(policy: Policy, q: jax.Array, k: jax.Array, query_factor: float) -> Decision:
    """`decide(q, k, query_factor)`: unrotated queries [B, T, H, D] and keys [B, T, K, D] have their say.

    The queries are the model's own times query_factor. Only of policies that `decides` says yes to.
    """
    deciding: Any = policy
    found: Decision = deciding.decide(q, k, query_factor)
    return found


def next_joins(joins: jax.Array, axis: int) -> jax.Array:
    """Of each token, whether the one after it joins its entry; the last one's is not yet known, and so False."""
    after = jax.lax.slice_in_dim(joins, 1, None, axis=axis)
    return jnp.concatenate([after, jnp.zeros_like(jax.lax.slice_in_dim(joins, 0, 1, axis=axis))], axis=axis)


def observes_steps(policy: Policy) -> bool:
    """`observes_steps`: needs later tokens' weights too, so that these come one at a time. Without: as `observes`."""
    found: bool = getattr(policy, "observes_steps", policy.observes)
    return found


def placed(policy: Policy, layers: tuple[int, ...], total: int) -> Policy:
    """`placed(layers, total)`: the policy as it rules these of a model's `total` layers, if depth matters to it."""
    place = getattr(policy, "placed", None)
    found: Policy = policy if place is None else place(layers, total)
    return found


def arrivals(policy: Policy, tokens: jax.Array) -> RowState:
    """`arrivals(tokens)`: what is remembered of token ids int32[B, T] as they land, name -> [B, T]. Without: zeros."""
    arrive = getattr(policy, "arrivals", None)
    found: RowState = {} if arrive is None else arrive(tokens)
    return found


def unsettled(policy: Policy, rows: int, batch: int) -> RowState:
    """`settled_state(rows, batch)`: what is settled about a row by its prompt, name -> [R, B]; before one, zeros."""
    state = getattr(policy, "settled_state", None)
    found: RowState = {} if state is None else state(rows, batch)
    return found


def settle(policy: Policy, state: RowState, position: jax.Array, index: int | jax.Array) -> RowState:
    """`settle(state, position, index)`: settles that for the layer at `index` of its group, before `keep` is asked."""
    found: RowState = policy.settle(state, position, index) if hasattr(policy, "settle") else {}
    return found


def merges(policy: Policy) -> bool:
    """Whether a policy has `merge`. Without: every token of a prompt stays itself, or goes."""
    return hasattr(policy, "merge")


def merge(policy: Policy, state: RowState, position: jax.Array, keys: jax.Array, index: int | jax.Array) -> RowState:
    """`merge(state, position, keys, index)`: which tokens of a prompt go into which, before `keep` is asked.

    keys float32[K, B, T, D] are those of the layer at `index` of its group, rotated, as stored. Returned are into
    int32[r, B, T], the token that each becomes a part of (itself, if none), and share float32[r, B, T], the weight of
    its key and value there; `keep`, which should keep these tokens alone, finds them in its state.
    """
    merging: Any = policy
    found: RowState = merging.merge(state, position, keys, index)
    return found


def observe(policy: Policy, state: RowState, weights: jax.Array, active: jax.Array, attended: Attended) -> RowState:
    """`observe_row(state, weights, active, attended)`: `observe`, told what the weights were over."""
    row = getattr(policy, "observe_row", None)
    found: RowState = policy.observe(state, weights, active) if row is None else row(state, weights, active, attended)
    return found


def blank_tally(policy: Policy, heads: int, batch: int, tokens: int) -> RowState | None:
    """`blank_tally(K, B, T)`: what a prompt's attention is summed up in where a weighted sum of rows does not do.

    Then `add_rows` takes the place of `prompt_rows`, and the tally is the state that `settle` and `keep` are given.
    """
    blank: Any = getattr(policy, "blank_tally", None)
    found: RowState | None = None if blank is None else blank(heads, batch, tokens)
    return found


def add_rows(policy: Policy, tally: RowState, rows: Rows) -> RowState:
    """`add_rows(tally, rows)`: the tally with these rows in it; only of policies with a `blank_tally`."""
    adding: Any = policy
    added: RowState = adding.add_rows(tally, rows)
    return added


def counts_rows(policy: Policy, queries: jax.Array, lengths: jax.Array) -> jax.Array:
    """`counts_rows(queries, lengths)`: bool[B, n], which rows `add_rows` must see. Without: all."""
    counts = getattr(policy, "counts_rows", None)
    found: jax.Array = queries >= 0 if counts is None else counts(queries, lengths)
    return found


def evicted(policy: Policy, state: RowState, position: jax.Array, length: jax.Array) -> jax.Array | None:
    """`evicted(state, position, length)`: bool[R, B, S], what leaves at once after a step and empties its slots.

    Without: nothing ever does, tokens are only overwritten.
    """
    leave = getattr(policy, "evicted", None)
    return None if leave is None else leave(state, position, length)


def takes_late(policy: Policy) -> bool:
    """`takes_late`: how much of a prompt stays is known only then, so its pages are taken then. Without: before it."""
    return getattr(policy, "takes_late", False)


def drops_hidden(policy: Policy) -> bool:
    """`drops_hidden`: what a layer drops of a prompt never reaches the next. Without: hidden states all go on."""
    return getattr(policy, "drops_hidden", False)


def with_rows(state: RowState, settled: RowState) -> RowState:
    """Both as policies are given them."""
    return {**state, **settled}


def first_hole(position: jax.Array, length: jax.Array) -> jax.Array:
    """The first empty slot of those in use, -1 for none: position [R, B, S], length [R, B] -> int32[R, B]."""
    hole = (position < 0) & (jnp.arange(position.shape[-1]) < length[..., None])
    return jnp.where(jnp.any(hole, axis=-1), jnp.argmax(hole, axis=-1), -1).astype(jnp.int32)
