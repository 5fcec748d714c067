"""KVMerger: of a prompt, neighbours of like key become one entry (Wang et al. 2024, 2407.08454)."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kvjax.cache.numbers import check_integer, check_number
from kvjax.cache.policies.bases import PromptOnly
from kvjax.cache.policies.protocol import RowState, highest_newest, overlaps


@dataclasses.dataclass(frozen=True)
class KVMerger(PromptOnly):
    """Merges prompt tokens that are neither among the `recent` newest nor, of the others, the `heavy` most attended.

    Per KV head, these fall into maximal runs of consecutive tokens whose keys, rotated and as stored, each have a
    cosine above `threshold` with the next one's (section 4). A run becomes one entry at the position of its pivot, the
    token that has received most attention from all prompt rows of the group: the mean of its keys, and of its values,
    weighted by exp(-|k_pivot - k|^2 / (2 s)), where s is the mean squared distance of the others from the pivot (all
    alike if that is 0; the published width is defined by the weights themselves). A threshold above 1 merges nothing.

    The first two layers and the last, of those that own keys and values, keep their prompt whole. What is generated, or
    given in a further turn, all stays.
    """

    heavy: int
    recent: int
    threshold: float = 0.75
    rows: Literal["head"] = dataclasses.field(default="head", init=False, repr=False)
    merging: tuple[bool, ...] = dataclasses.field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        check_integer(self, "heavy", 0)
        check_integer(self, "recent", 0)
        check_number(self, "threshold", -1, 2)

    @property
    def takes_late(self) -> bool:
        """Yes: how long runs are is known only once the prompt has been read."""
        return True

    def placed(self, layers: tuple[int, ...], total: int) -> KVMerger:
        """The policy as it rules these of a model's `total` layers."""
        known = copy.copy(self)
        object.__setattr__(known, "merging", tuple(2 <= layer < total - 1 for layer in layers))
        return known

    def touches(self, length: jax.Array, seen: jax.Array, n: jax.Array, starts: jax.Array, page_size: int) -> jax.Array:
        """None for a prompt; then the open page and new ones."""
        return overlaps(length, length + jnp.where(seen > 0, n, 0), starts, page_size)

    def prompt_rows(self, positions: jax.Array, lengths: jax.Array) -> jax.Array:
        """All."""
        return (positions >= 0).astype(jnp.float32)

    def merge(self, state: RowState, position: jax.Array, keys: jax.Array, index: int | jax.Array) -> RowState:
        """into int32[K, B, T], each token's pivot, and share float32[K, B, T], its weight there.

        position int32[K, B, T], keys float32[K, B, T, D], of the layer at `index` of its group.
        """
        recent = position > jnp.max(position, axis=-1, keepdims=True) - self.recent
        other = (position >= 0) & ~recent
        heavy = highest_newest(jnp.where(other, state["score"], -jnp.inf), position, self.heavy)
        mergeable = other & ~heavy & jnp.asarray(self.merging)[index]
        norm = jnp.sqrt(jnp.sum(keys**2, axis=-1))
        # No quotient: it would be undefined for a key of zeros, which so is like no other.
        alike = jnp.sum(keys[..., 1:, :] * keys[..., :-1, :], axis=-1) > self.threshold * norm[..., 1:] * norm[..., :-1]
        linked = alike & mergeable[..., 1:] & mergeable[..., :-1] & (position[..., 1:] == position[..., :-1] + 1)
        run = jnp.cumsum(jnp.pad(~linked, ((0, 0), (0, 0), (1, 0))), axis=-1, dtype=jnp.int32)

        best = over_runs(jax.ops.segment_max, state["score"], run)
        order = jnp.where(state["score"] == best, jnp.arange(run.shape[-1], dtype=jnp.int32), -1)
        pivot = over_runs(jax.ops.segment_max, order, run)
        square = jnp.sum((keys - jnp.take_along_axis(keys, pivot[..., None], axis=2)) ** 2, axis=-1)
        others = over_runs(jax.ops.segment_sum, jnp.ones_like(run), run) - 1
        variance = over_runs(jax.ops.segment_sum, square, run) / jnp.maximum(others, 1)
        spread = jnp.where(variance > 0, variance, 1.0)
        weight = jnp.exp(-square / (2 * spread))
        return {"into": pivot, "share": weight / over_runs(jax.ops.segment_sum, weight, run)}

    def keep(self, state: RowState, position: jax.Array) -> jax.Array:
        """The pivots; a token that does not merge is its own."""
        return (position >= 0) & (state["into"] == jnp.arange(position.shape[-1]))


def over_runs(reduce: Any, values: jax.Array, run: jax.Array) -> jax.Array:
    """What the values [r, B, T] of each run come to, at each of its tokens; run int32[r, B, T] ascends from 0."""

    def one(values: jax.Array, run: jax.Array) -> jax.Array:
        reduced: jax.Array = reduce(values, run, run.size, indices_are_sorted=True)
        return reduced[run]

    return jax.vmap(jax.vmap(one))(values, run)
