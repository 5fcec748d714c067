"""Keeping of a prompt what the policy wants, one layer at a time, once that layer's attention is known."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.cache.codecs import Encoded
from kvjax.cache.policies.protocol import EMPTY
from kvjax.cache.state import Group
from kvjax.cache.write import layer_rows, place, update_layer_rows, write


def keep_prompt(
    group: Group, index: int | jax.Array, lengths: jax.Array, weights: jax.Array, k: Encoded, v: Encoded | None
) -> Group:
    """Stores of a fresh prompt what the policy keeps, for the layer at `index`.

    Args:
      lengths: int32[B], prompt lengths; 0 for a sequence without one.
      weights: float32[B, K, T], the attention mass of each prompt token, over the rows the policy counts.
      k, v: the layer's encoded prompt, leaves [B, T, K, ...].
    """
    policy = group.layout.policy
    batch, _, tokens = weights.shape
    order = jnp.arange(tokens, dtype=jnp.int32)
    positions = jnp.where(order < lengths[:, None], order, EMPTY)
    view = _rows_of(group, index)
    if policy.observes:
        blank = policy.row_state(group.layout.rows_per_layer, batch, tokens)
        state = policy.observe(blank, jnp.moveaxis(weights, 1, 0), lengths > 0)
        kept = policy.keep(state, jnp.broadcast_to(positions, (group.layout.rows_per_layer, batch, tokens)))
        slots = jnp.where(kept, jnp.cumsum(kept, axis=-1, dtype=jnp.int32) - 1, EMPTY)
    else:
        state = {}
        slots = policy.slots(view.length, view.victim, jnp.zeros_like(lengths), positions)
    view = place(view, slots, positions)
    view = dataclasses.replace(view, row_state=_scatter(view.row_state, slots, state))
    return write(_with_rows(group, view, index), index, slots, k, v)


def _rows_of(group: Group, index: int | jax.Array) -> Group:
    """The group with only one layer's rows of metadata."""
    return dataclasses.replace(
        group,
        position=layer_rows(group, group.position, index),
        length=layer_rows(group, group.length, index),
        victim=layer_rows(group, group.victim, index),
        row_state=jax.tree.map(lambda s: layer_rows(group, s, index), group.row_state),
    )


def _with_rows(group: Group, view: Group, index: int | jax.Array) -> Group:
    """The group with one layer's rows of metadata replaced."""
    return dataclasses.replace(
        group,
        position=update_layer_rows(group, group.position, view.position, index),
        length=update_layer_rows(group, group.length, view.length, index),
        row_state=jax.tree.map(lambda s, new: update_layer_rows(group, s, new, index), group.row_state, view.row_state),
    )


def _scatter(held: dict[str, jax.Array], slots: jax.Array, prompt: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Moves what was remembered per prompt token [r, B, T, ...] to the slots the tokens took [r, B, S, ...]."""
    rows, batch = jnp.arange(slots.shape[0])[:, None, None], jnp.arange(slots.shape[1])[None, :, None]

    def one(into: jax.Array, values: jax.Array) -> jax.Array:
        target = jnp.where(slots >= 0, slots, into.shape[2])
        return into.at[rows, batch, target].set(values, mode="drop")

    return jax.tree.map(one, held, prompt)
