"""PyramidInfer: what a layer drops of a prompt, the layers above never compute (Yang et al. 2024, 2405.12532)."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache.numbers import ceil_share, check_integer, check_number
from kvjax.cache.policies.bases import Growing
from kvjax.cache.policies.protocol import RowState, highest_newest


@dataclasses.dataclass(frozen=True, init=False)
class PyramidInfer(Growing):
    """Keeps fewer tokens from layer to layer, one set per layer, and takes only their hidden states to the next.

    Layer i of l keeps of a prompt its first `sinks` and its last ceil(recent * T) tokens, and of the n others that the
    layer below left the best ceil(p_i * n), where p_i falls from 1 towards `keep` as half a cosine wave. Their score is
    the attention they receive from the last ones, over all heads, the newest row counting `weight` times as much as the
    oldest of them (section 3). Sets nest with depth. Positions stay the original ones.

    While decoding, once more than `exceed` tokens have come since the last time, of those that came the best
    ceil(keep * p_i * as many) by the current row stay, the current token in any case; it is attended beside them.

    All layers must be ruled by this policy: a token that one of them drops does not exist for those above.

    Attributes:
      share: what is given as `keep`, which here is the name of a method.
    """

    sinks: int
    recent: float
    weight: float
    share: float
    exceed: int
    rows: Literal["layer"] = dataclasses.field(default="layer", init=False, repr=False)
    layers: tuple[int, ...] = dataclasses.field(default=(), init=False, repr=False)
    total: int = dataclasses.field(default=1, init=False, repr=False)

    def __init__(
        self, sinks: int = 4, recent: float = 0.2, weight: float = 1.2, keep: float = 0.9, exceed: int = 16
    ) -> None:
        given = {"sinks": sinks, "recent": recent, "weight": weight, "share": keep, "exceed": exceed}
        for name, value in given.items():
            object.__setattr__(self, name, value)
        check_integer(self, "sinks", 0)
        check_integer(self, "exceed", 0)
        check_number(self, "recent", 0, 1, open=True)
        check_number(self, "weight", 0, open=True)
        check_number(self, "share", 0, 1, open=True, called="keep")

    def __repr__(self) -> str:
        return (
            f"PyramidInfer(sinks={self.sinks}, recent={self.recent}, weight={self.weight}, keep={self.share}, "
            f"exceed={self.exceed})"
        )

    def placed(self, layers: tuple[int, ...], total: int) -> PyramidInfer:
        """The policy as it rules these of a model's `total` layers."""
        known = copy.copy(self)
        object.__setattr__(known, "layers", layers)
        object.__setattr__(known, "total", total)
        return known

    @property
    def drops_hidden(self) -> bool:
        """Yes."""
        return True

    def settled_state(self, rows: int, batch: int) -> RowState:
        """prompt int32[R, B]: its length."""
        return {"prompt": jnp.zeros((rows, batch), jnp.int32)}

    def prompt_rows(self, positions: jax.Array, lengths: jax.Array) -> jax.Array:
        """The last rows, by weights that rise in equal steps from 1 to `weight`."""
        count = ceil_share(self.recent, lengths)[:, None]
        order = positions - (lengths[:, None] - count)
        rising = 1 + (self.weight - 1) * order / jnp.maximum(count - 1, 1)
        return jnp.where((positions >= 0) & (order >= 0), rising / jnp.maximum(count, 1), 0.0)

    def observe(self, state: RowState, weights: jax.Array, active: jax.Array) -> RowState:
        """The current row, or a prompt's weighted rows, over all heads, in place of what was before."""
        row = jnp.sum(weights, axis=0, keepdims=True)
        return {"score": jnp.where(active[:, None], row, state["score"])}

    def settle(self, state: RowState, position: jax.Array, index: int | jax.Array) -> RowState:
        """The prompt's length, and depth int32[]: which of the model's layers this is."""
        return {"prompt": jnp.max(position, axis=-1) + 1, "depth": jnp.asarray(self.layers, jnp.int32)[index]}

    def keep(self, state: RowState, position: jax.Array) -> jax.Array:
        """Sinks, the last tokens, and this layer's share of the others."""
        tokens = state["prompt"][..., None]
        recent = position >= tokens - ceil_share(self.recent, tokens)
        others = (position >= self.sinks) & ~recent
        count = ceil_share(self._shares(), jnp.sum(others, axis=-1, keepdims=True), state["depth"])
        best = highest_newest(jnp.where(others, state["score"], -jnp.inf), position, count)
        return (position >= 0) & (best | ~others)

    def evicted(self, state: RowState, position: jax.Array, length: jax.Array) -> jax.Array:
        """Once `exceed` + 1 tokens have come, all but the best of these."""
        newest = jnp.max(position, axis=-1)
        since, turn = newest + 1 - state["prompt"], self.exceed + 1
        due = (since > 0) & (since % turn == 0)
        counts = np.ceil(np.round(self.share * self._shares() * turn, 6)).astype(np.int32)[list(self.layers)]

        def chosen() -> jax.Array:
            came = position > newest[..., None] - turn
            score = jnp.where(position == newest[..., None], jnp.inf, state["score"])
            best = highest_newest(jnp.where(came, score, -jnp.inf), position, jnp.asarray(counts)[:, None, None])
            return due[..., None] & came & (position >= 0) & ~best

        return jax.lax.cond(jnp.any(due), chosen, lambda: jnp.zeros(position.shape, bool))

    def _shares(self) -> np.ndarray:
        """float64[l]: p_i."""
        wave = [math.cos(math.pi * layer / self.total) for layer in range(self.total)]
        return (1 - self.share) * (np.array(wave) + 1) / 2 + self.share
