"""Keeping of a prompt what the policy wants, one layer at a time, once that layer's attention is known."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.cache.codecs import Encoded
from kvjax.cache.codecs.waiting import waits
from kvjax.cache.layout import GroupLayout
from kvjax.cache.page_state import store
from kvjax.cache.pages import take_for
from kvjax.cache.policies.optional import arrivals, decides, merge, merges, settle, takes_late, with_rows
from kvjax.cache.policies.protocol import EMPTY, RowState
from kvjax.cache.state import Group
from kvjax.cache.tail import put_prompt
from kvjax.cache.write import layer_rows, place, update_layer_rows
from kvjax.typing import Rotate


def keep_prompt(
    group: Group,
    index: int | jax.Array,
    lengths: jax.Array,
    weights: jax.Array | RowState,
    k: Encoded,
    v: Encoded | None,
    tokens: jax.Array | None = None,
    positions: jax.Array | None = None,
    rotate: Rotate | None = None,
) -> tuple[Group, jax.Array]:
    """Stores of a fresh prompt what the policy keeps, for the layer at `index`.

    Args:
      lengths: int32[B], prompt lengths; 0 for a sequence without one.
      weights: float32[B, K, T], the attention mass of each prompt token, over the rows the policy counts; or the
        policy's own tally of the prompt's attention, name -> [K, B, T, ...].
      k, v: the layer's encoded prompt, leaves [B, T, K, ...].
      tokens, positions: int32[B, T], the prompt's ids, which few policies ask for, and where its tokens stand, -1 is
        padding; None: side by side from 0 on.
      rotate: the layer's, for a codec that holds keys unrotated.

    Returns:
      The group, and what stays, bool[r, B, T].
    """
    policy, rows = group.layout.policy, group.layout.rows_per_layer
    batch, count = lengths.shape[0], k.values.shape[1]
    if positions is None:
        order = jnp.arange(count, dtype=jnp.int32)
        positions = jnp.where(order < lengths[:, None], order, EMPTY)
    known = {} if tokens is None else arrivals(policy, tokens)
    view = _rows_of(group, index)
    state: RowState = {}
    if policy.observes or decides(policy):
        if isinstance(weights, dict):
            state = weights
        else:
            blank = policy.row_state(rows, batch, count)
            state = policy.observe(blank, jnp.moveaxis(weights, 1, 0), lengths > 0)
        state = {**state, **{name: jnp.broadcast_to(value, (rows, batch, count)) for name, value in known.items()}}
        where = jnp.broadcast_to(positions, (rows, batch, count))
        if merges(policy):
            keys = jnp.moveaxis(group.layout.codec.decode(k, jnp.float32), 2, 0)
            state = {**state, **merge(policy, state, where, keys, index)}
            into, share = state["into"], state["share"]
            k = _blended(group.layout, k, into, share)
            v = None if v is None else _blended(group.layout, v, into, share)
        settled = settle(policy, state, where, index)
        kept = policy.keep(with_rows(state, settled), where)
        slots = jnp.where(kept, jnp.cumsum(kept, axis=-1, dtype=jnp.int32) - 1, EMPTY)
        view = dataclasses.replace(view, settled={name: settled[name] for name in view.settled})
    else:
        # Empty, whatever the layers before have put into rows that all share.
        slots = policy.slots(jnp.zeros_like(view.length), view.victim, jnp.zeros_like(lengths), positions)
        kept = slots >= 0
    view = place(view, slots, positions, known)
    view = dataclasses.replace(view, row_state=_scatter(view.row_state, slots, state))
    group = _with_rows(group, view, index)
    if takes_late(policy):
        starts = jnp.arange(group.table.shape[2]) * group.layout.page_size
        wanted = starts < (jnp.max(slots, axis=-1) + 1)[..., None]
        nobody = jnp.zeros(group.table.shape, bool)
        group = take_for(group, update_layer_rows(group, nobody, wanted, index))
    if waits(group.layout.codec):
        return put_prompt(group, index, slots, k.values, None if v is None else v.values), kept
    return store(group, index, slots, k, v, rotate), kept


def _blended(layout: GroupLayout, stored: Encoded, into: jax.Array, share: jax.Array) -> Encoded:
    """A layer's encoded prompt, leaves [B, T, K, ...], what others become a part of blended and encoded anew.

    into int32[r, B, T] and share float32[r, B, T] say which goes where with which weight. Entries by themselves stay as
    they are: coding them again could change them.
    """
    x = layout.codec.decode(stored, jnp.float32)

    def by_head(rows: jax.Array) -> jax.Array:
        return jnp.moveaxis(jnp.broadcast_to(rows, (x.shape[2], *rows.shape[1:])), 0, 2)

    target, weight = by_head(into), by_head(share)
    where = (jnp.arange(x.shape[0])[:, None, None], target, jnp.arange(x.shape[2]))
    mean = jnp.zeros_like(x).at[where].add(weight[..., None] * x)
    several = jnp.zeros(target.shape, jnp.int32).at[where].add(1) > 1
    fresh = layout.codec.encode(mean.astype(layout.dtype))

    def one(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(several.reshape(*several.shape, *(1,) * (old.ndim - 3)), new.astype(old.dtype), old)

    return jax.tree.map(one, fresh, stored)


def _rows_of(group: Group, index: int | jax.Array) -> Group:
    """The group with only one layer's rows of metadata."""
    return dataclasses.replace(
        group,
        position=layer_rows(group, group.position, index),
        length=layer_rows(group, group.length, index),
        victim=layer_rows(group, group.victim, index),
        row_state=jax.tree.map(lambda s: layer_rows(group, s, index), group.row_state),
        settled=jax.tree.map(lambda s: layer_rows(group, s, index), group.settled),
    )


def _with_rows(group: Group, view: Group, index: int | jax.Array) -> Group:
    """The group with one layer's rows of metadata replaced."""
    return dataclasses.replace(
        group,
        position=update_layer_rows(group, group.position, view.position, index),
        length=update_layer_rows(group, group.length, view.length, index),
        row_state=jax.tree.map(lambda s, new: update_layer_rows(group, s, new, index), group.row_state, view.row_state),
        settled=jax.tree.map(lambda s, new: update_layer_rows(group, s, new, index), group.settled, view.settled),
    )


def _scatter(held: dict[str, jax.Array], slots: jax.Array, prompt: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Moves what is remembered per prompt token [r, B, T, ...] to the slots the tokens took [r, B, S, ...]."""
    rows, batch = jnp.arange(slots.shape[0])[:, None, None], jnp.arange(slots.shape[1])[None, :, None]

    def one(into: jax.Array, values: jax.Array) -> jax.Array:
        target = jnp.where(slots >= 0, slots, into.shape[2])
        return into.at[rows, batch, target].set(values, mode="drop")

    return {name: one(into, prompt[name]) if name in prompt else into for name, into in held.items()}
