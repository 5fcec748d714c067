"""What a select must provide: what is remembered of each page beside its entries, and what a step reads by it.

A prompt attends to everything held; a select rules the steps that add one token. What is not read stays held.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax

PageState = dict[str, jax.Array]
"""What a select remembers of pages, name -> [P, layers_per_page, heads_per_page, ...]; it is copied with its page."""


class Beside(NamedTuple):
    """The n newest tokens that a codec keeps exact beside the pages: they are read in any case, whatever is chosen.

    Attributes:
      keys: [B, K, n, D], as this step reads them.
      position: int32[B, K, n], -1 where there is none.
      total: float32[B, K, Dv], what their values add to those remembered of pages: their sum, but of a token whose page
        is remembered already only the difference to its value as it will be coded.
    """

    keys: jax.Array
    position: jax.Array
    total: jax.Array


class View(NamedTuple):
    """What a step of one layer may read: B sequences, K KV heads, N pages a row.

    Attributes:
      state: name -> [X, ...], what is remembered of all pages of all layers and heads.
      pages: int32[B, K, N], each head's pages by their index in that; a page that holds nothing has some index, too.
      position: int32[B, K, N, page], the token in each slot, -1 where there is none to be seen.
      beside: None where all that is held lies in pages. Else these are to be chosen among alone, and count alone.
    """

    state: PageState
    pages: jax.Array
    position: jax.Array
    beside: Beside | None = None


class Chosen(NamedTuple):
    """What is read, and what stands for the rest.

    Attributes:
      picks: int32[B, K, n], pages of the row (0 .. N-1), or slots (0 .. N * page - 1), -1 is none, those last.
      share: float32[B, K, G], how much of the output is attention to them; None: all of it.
      rest: float32[B, K, Dv], what the remaining share is made of.
    """

    picks: jax.Array
    share: jax.Array | None = None
    rest: jax.Array | None = None


class Cost(NamedTuple):
    """What one step of one layer and KV head reads: whole entries (a key and its value), and bytes of page state."""

    entries: int
    state_bytes: int


@runtime_checkable
class Select(Protocol):
    """Which entries a step reads. Implementations are frozen dataclasses, pure on the device."""

    @property
    def unit(self) -> Literal["page", "slot"]:
        """What `choose` counts in."""
        ...

    def check(self, key_dim: int) -> None:
        """Raises ConfigError where keys of this width cannot be served."""
        ...

    def reads_all(self, layer: int) -> bool:
        """Whether a layer is left alone: it then remembers nothing either."""
        ...

    def covers(self, pages: int, page_size: int) -> bool:
        """Whether everything in so many pages would be read: then a step is an ordinary one."""
        ...

    def summary(self, keys: jax.Array, values: jax.Array, filled: jax.Array) -> PageState:
        """What is remembered of pages: keys [..., page, D] and values [..., page, Dv] as read, rotated -> [..., *].

        filled bool[..., page]: slots of the others may hold anything, NaN too. Under a codec that waits this is asked
        once for a page, when its keys are coded: of all its slots, and of their values as they will be.
        """
        ...

    def choose(self, q: jax.Array, view: View) -> Chosen:
        """What a step reads for queries q [B, K, G, D], rotated, whose product with a key times D^-1/2 is its score."""
        ...

    def cost(self, pages: int, page_size: int, key_dim: int, value_dim: int, itemsize: int) -> Cost:
        """What a step reads of a row of so many pages; `itemsize` bytes an element in the model's dtype."""
        ...
