"""Quest: the pages whose keys may score highest (Tang et al. 2024, 2406.10774)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from kvjax.cache.bits import numbers
from kvjax.cache.numbers import check_integer
from kvjax.cache.selects.protocol import Chosen, Cost, PageState, View


@dataclasses.dataclass(frozen=True)
class Quest:
    """Reads the `pages` pages that bound the scores of their keys highest, the current token's always among them.

    Beside each page lie the least m and the greatest M of its keys, channel by channel: sum_i max(q_i m_i, q_i M_i) is
    at least every q.k within. Each KV head chooses its own pages, by that bound summed over its group of query heads
    (a list for each query head would together read nearly everything). Of equal bounds the newer page wins. A bound
    takes 2 D elements of the model's dtype a page, 1 / page_size of what keys and values take, and a step reads all of
    them. A codec's exact newest tokens lie in no page: they are read beside the `pages` chosen, none of which is then
    the current token's; a page of which only the keys are coded as yet is read as far as its values are.

    Attributes:
      pages: pages read per KV head.
      dense_layers: the first layers that keep keys and values of their own read everything, as in the paper, and keep
        no bounds; a layer that shares another's keys and values reads as that one does.
    """

    pages: int
    dense_layers: int = 2
    unit: Literal["page"] = dataclasses.field(default="page", init=False, repr=False)
    bits_for_floats: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, least in (("pages", 1), ("dense_layers", 0)):
            check_integer(self, name, least)

    def check(self, key_dim: int) -> None:
        """Any width will do."""

    def reads_all(self, layer: int) -> bool:
        """The first layers."""
        return layer < self.dense_layers

    def covers(self, pages: int, page_size: int) -> bool:
        """No more pages than are read."""
        return pages <= self.pages

    def summary(self, keys: jax.Array, values: jax.Array, filled: jax.Array) -> PageState:
        """least, greatest [..., D]: of the filled slots."""
        filled = filled[..., None]
        least = jnp.min(jnp.where(filled, keys, jnp.inf), axis=-2)
        greatest = jnp.max(jnp.where(filled, keys, -jnp.inf), axis=-2)
        return {"least": least, "greatest": greatest}

    def choose(self, q: jax.Array, view: View) -> Chosen:
        """The current token's page, if it lies in one, and of the others the highest bounds."""
        newest = jnp.max(view.position, axis=-1)
        score = jnp.where(newest >= 0, bounds(q, view), -jnp.inf)
        if view.beside is None:
            score = jnp.where(newest == jnp.max(newest, axis=-1, keepdims=True), jnp.inf, score)
        order = jnp.lexsort((-newest, -score, newest < 0), axis=-1)[..., : self.pages]
        held = jnp.take_along_axis(newest, order, axis=-1) >= 0
        return Chosen(jnp.where(held, order, -1).astype(jnp.int32))

    def cost(self, pages: int, page_size: int, key_dim: int, value_dim: int, itemsize: int) -> Cost:
        """All bounds, and the pages chosen by them."""
        return Cost(min(pages, self.pages) * page_size, pages * 2 * key_dim * itemsize)


def bounds(q: jax.Array, view: View) -> jax.Array:
    """A bound on q.k in each page, summed over a group: q [B, K, G, D] -> float32[B, K, N]; of empty pages anything.

    A positive q_i is greatest with M_i, a negative one with m_i: so a group's sum is one product with each.
    """
    q = q.astype(jnp.float32)
    up, down = jnp.sum(jnp.maximum(q, 0), axis=2), jnp.sum(jnp.minimum(q, 0), axis=2)
    filled = jnp.any(view.position >= 0, axis=-1)[..., None]
    least, greatest = (
        jnp.where(filled, numbers(view.state[name][view.pages]).astype(jnp.float32), 0)
        for name in ("least", "greatest")
    )
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("bkd,bknd->bkn", up, greatest, precision=highest) + jnp.einsum(
        "bkd,bknd->bkn", down, least, precision=highest
    )
