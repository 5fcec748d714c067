"""Selects: which of the held entries a step reads. A prompt reads all; evicted is another matter.

A select sees one KV head at a time: what is visible to the token, and its group's queries, rotated like the keys. Under
latent attention these are the absorbed ones, so that their product with what is stored is the score.

Beside a codec that keeps the newest tokens exact, these lie in no page and are read in any case: a select chooses among
the others, which alone count in `pages` and `slots`. A key may lie in its page already while its value is still exact.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from tests.oracles.policies import Entry, top


class Selection(NamedTuple):
    """What is read.

    Attributes:
      chosen: indices into the visible entries, ascending.
      share: per query head, how much of the output is attention to what was chosen; the rest is the mean of all values.
        None: all of it.
      margin: least distance in score between something read and something not.
    """

    chosen: list[int]
    share: np.ndarray | None
    margin: float


class OracleSelect:
    """Reads everything."""

    def reads_all(self, layer: int) -> bool:
        """Whether a layer of the model is left alone."""
        return False

    def choose(
        self, entries: Sequence[Entry], queries: np.ndarray, scale: float, beside: Collection[int] = ()
    ) -> Selection:
        """Visible entries, one KV head's queries [G, D], the factor on scores -> what is read.

        beside: indices of the entries that are read in any case, the current token's among them, or none.
        """
        return Selection(list(range(len(entries))), None, math.inf)


@dataclasses.dataclass(frozen=True)
class Quest(OracleSelect):
    """The `pages` pages whose keys may score highest, the current token's among them (Tang et al. 2024, 2406.10774).

    A page's bound is the sum over channels of max(q m, q M) with the elementwise least m and greatest M of its keys,
    and summed over the group. Layers before `dense_layers` read all.
    """

    pages: int
    page_size: int
    dense_layers: int = 2

    def reads_all(self, layer: int) -> bool:
        """The first layers."""
        return layer < self.dense_layers

    def choose(
        self, entries: Sequence[Entry], queries: np.ndarray, scale: float, beside: Collection[int] = ()
    ) -> Selection:
        """Entries of the chosen pages; where there is something beside them no page need be read."""
        members: dict[int, list[int]] = {}
        keys: dict[int, list[np.ndarray]] = {}
        for index, entry in enumerate(entries):
            page = entry.slot // self.page_size
            if index not in beside:
                members.setdefault(page, []).append(index)
            if index not in beside or entry.coded[0]:
                keys.setdefault(page, []).append(entry.key)
        newest = {page: max(entries[i].position for i in ids) for page, ids in members.items()}
        # Among pages of one bound the one that holds the newer token is read.
        bounds = {newest[page]: bound(np.stack(keys[page]), queries) for page in members}
        read = set() if beside else {max(newest, key=lambda page: newest[page])}
        for page in read:
            del bounds[newest[page]]
        best, margin = top(bounds, self.pages - len(read))
        read |= {page for page in members if newest[page] in best}
        return Selection(sorted([*beside, *(i for page in read for i in members[page])]), None, margin)


def bound(keys: np.ndarray, queries: np.ndarray) -> float:
    """keys [n, D], queries [G, D] -> the sum over queries of a bound on their product with any of the keys."""
    least, greatest = keys.min(axis=0), keys.max(axis=0)
    return float(np.maximum(queries * least, queries * greatest).sum())


@dataclasses.dataclass(frozen=True)
class SparQ(OracleSelect):
    """Scores by a few channels, exact attention to the best, the mean value for the rest (Ribar 2023, 2312.04985).

    The `rank` channels of greatest |q|, summed over the group, give logits, their temperature widened by the share of
    |q| they carry. Read are the `local` newest tokens and, up to `slots`, those of greatest logit, summed over the
    group. The softmax of the logits, per query head, says how much of the output is theirs.
    """

    rank: int
    slots: int
    local: int

    def choose(
        self, entries: Sequence[Entry], queries: np.ndarray, scale: float, beside: Collection[int] = ()
    ) -> Selection:
        """The `slots` entries of greatest approximate score."""
        size = np.abs(queries)
        channels, margin = top(dict(enumerate(size.sum(axis=0))), self.rank)
        ids = sorted(channels)
        widened = np.sqrt(size[:, ids].sum(axis=1) / size.sum(axis=1))
        logits = queries[:, ids] @ np.stack([e.key for e in entries])[:, ids].T * scale / widened[:, None]
        approximate = np.exp(logits - logits.max(axis=1, keepdims=True))
        approximate /= approximate.sum(axis=1, keepdims=True)

        by_age = sorted(range(len(entries)), key=lambda i: entries[i].position)
        near = [i for i in by_age[-self.local :] if i not in beside]
        far = [i for i in by_age[: -self.local] if i not in beside]
        index = {entries[i].position: i for i in far}
        best, distance = top({p: float(logits[:, i].sum()) for p, i in index.items()}, self.slots - len(near))
        chosen = sorted([*beside, *near, *(index[p] for p in best)])
        # Channels matter only if something is left out.
        margin = min(margin, distance) if len(chosen) < len(entries) else math.inf
        return Selection(chosen, approximate[:, chosen].sum(axis=1), margin)


def counterpart(select: Any, page_size: int) -> OracleSelect | None:
    """The oracle of a kvjax select over pages of that size."""
    if select is None:
        return None
    match type(select).__name__:
        case "Quest":
            return Quest(select.pages, page_size, select.dense_layers)
        case "SparQ":
            return SparQ(select.rank, select.slots, select.local)
    raise ValueError(f"there is no oracle of the select {select!r}; Quest and SparQ have one")
