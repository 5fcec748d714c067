"""SparQ: scores by a few channels, exact attention to the best tokens (Ribar et al. 2023, 2312.04985)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from kvjax.cache.bits import numbers
from kvjax.cache.numbers import check_integer
from kvjax.cache.selects.protocol import Chosen, Cost, PageState, View
from kvjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class SparQ:
    """Reads `slots` entries per KV head: the `local` newest, and those that score highest in `rank` channels.

    The channels are those of greatest |q|, summed over the group. Their logits, at the temperature
    sqrt(D |q_chosen|_1 / |q|_1), order the tokens by their sum over the group. The softmax of the logits says, per
    query head, what share alpha of the attention the chosen hold; the output is alpha times exact attention to them,
    and 1 - alpha times the mean of all values held. The current token is one of the `local`, and counts in `slots` (the
    published code adds it on top). A codec's exact newest tokens are read beside the `slots`, and count in alpha and in
    the mean like all that is held.

    Keys are stored a second time in the model's dtype, channel by channel within a page, so that a step reads only the
    channels it looks at, together with the float32 sum of each page's values: half as much memory again as a dense
    cache takes where keys are as wide as values.

    Attributes:
      rank: channels by which tokens are scored, at most the width of a key.
      slots: entries read.
      local: newest tokens that are always among them.
    """

    rank: int
    slots: int
    local: int
    unit: Literal["slot"] = dataclasses.field(default="slot", init=False, repr=False)
    bits_for_floats: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("rank", "slots", "local"):
            check_integer(self, name, 1)
        if self.local > self.slots:
            raise ConfigError(
                f"SparQ.local={self.local} must be at most slots={self.slots}: the newest tokens are among those read"
            )

    def check(self, key_dim: int) -> None:
        """A key must have `rank` channels."""
        if self.rank > key_dim:
            raise ConfigError(f"SparQ.rank={self.rank} must be at most {key_dim}, the width of this model's keys")

    def reads_all(self, layer: int) -> bool:
        """No layer."""
        return False

    def covers(self, pages: int, page_size: int) -> bool:
        """No more slots than are read."""
        return pages * page_size <= self.slots

    def summary(self, keys: jax.Array, values: jax.Array, filled: jax.Array) -> PageState:
        """channels [..., D, page], 0 in empty slots; total float32[..., Dv]."""
        filled = filled[..., None]
        total = jnp.sum(jnp.where(filled, values.astype(jnp.float32), 0), axis=-2)
        return {"channels": jnp.swapaxes(jnp.where(filled, keys, 0), -1, -2), "total": total}

    def choose(self, q: jax.Array, view: View) -> Chosen:
        """The newest, the highest, their share, and the mean value."""
        position = view.position.reshape(*view.position.shape[:2], -1)
        slots = position.shape[-1]
        if view.beside is not None:
            position = jnp.concatenate([position, view.beside.position], axis=-1)
        held = position >= 0
        logits = approximate(q, self.rank, view)
        summed = jnp.sum(logits, axis=2)
        # A row may have fewer slots than `local`.
        newest = jax.lax.top_k(position, min(self.local, position.shape[-1]))[0][..., -1:]
        score = jnp.where(position >= newest, jnp.inf, summed)
        order = jnp.lexsort((-position[..., :slots], -score[..., :slots], ~held[..., :slots]), axis=-1)
        order = order[..., : self.slots]
        found = jnp.take_along_axis(held, order, axis=-1)

        shifted = jnp.where(held[:, :, None], logits, -jnp.inf)
        top = jnp.max(shifted, axis=-1, keepdims=True)
        mass = jnp.exp(shifted - jnp.where(jnp.isfinite(top), top, 0))
        some = jnp.sum(jnp.where(found[:, :, None], jnp.take_along_axis(mass, order[:, :, None], axis=-1), 0), axis=-1)
        some = some + jnp.sum(mass[..., slots:], axis=-1)
        every = jnp.sum(mass, axis=-1)
        share = jnp.where(every > 0, some / jnp.where(every > 0, every, 1), 1)

        filled = jnp.any(view.position >= 0, axis=-1)[..., None]
        total = jnp.sum(jnp.where(filled, view.state["total"][view.pages], 0), axis=2)
        total = total if view.beside is None else total + view.beside.total
        mean = total / jnp.maximum(jnp.sum(held, axis=-1, keepdims=True), 1)
        return Chosen(jnp.where(found, order, -1).astype(jnp.int32), share, mean)

    def cost(self, pages: int, page_size: int, key_dim: int, value_dim: int, itemsize: int) -> Cost:
        """A few channels of every key, the sum of every page's values, and the entries chosen."""
        channels = pages * page_size * self.rank * itemsize
        return Cost(min(pages * page_size, self.slots), channels + pages * value_dim * 4)


def approximate(q: jax.Array, rank: int, view: View) -> jax.Array:
    """Logits by the `rank` channels of greatest |q|: q [B, K, G, D] -> float32[B, K, G, S]; of empty slots anything.

    What lies beside the pages follows behind their slots.
    """
    q = q.astype(jnp.float32)
    size = jnp.abs(q)
    channels = jax.lax.top_k(jnp.sum(size, axis=2), rank)[1]
    some, sizes = (jnp.take_along_axis(x, channels[:, :, None], axis=-1) for x in (q, size))
    carried = jnp.sum(sizes, axis=-1) / jnp.maximum(jnp.sum(size, axis=-1), jnp.finfo(jnp.float32).tiny)
    # A query of zeros has no channel to go by: all its logits are 0 at any temperature.
    temperature = jnp.sqrt(q.shape[-1] * jnp.where(carried > 0, carried, 1))
    columns = numbers(view.state["channels"][view.pages[..., None], channels[:, :, None]]).astype(jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    logits = jnp.einsum("bkgr,bknrp->bkgnp", some, columns, precision=highest)
    logits = logits.reshape(*logits.shape[:3], -1)
    if view.beside is not None:
        keys = jnp.take_along_axis(view.beside.keys.astype(jnp.float32), channels[:, :, None], axis=-1)
        exact = jnp.einsum("bkgr,bknr->bkgn", some, keys, precision=highest)
        logits = jnp.concatenate([logits, exact], axis=-1)
    return logits / temperature[..., None]
