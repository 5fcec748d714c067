"""Oracle policies: which entries of one layer a token sees and which stay.

A policy answers three questions:

- `visible(query, key)`: may the token at position `query` see position `key` at all? What is invisible to a new token
  is evicted before its step. Prompt tokens are masked alike, so each sees what it would see fed alone.
- `coordinates(positions, query)`: at which rotary positions do held keys and the query stand?
- `keep(held, rows, query)`: after the prompt, or after a step, what stays?

"Held" is the state after that last answer: at most the budget. A step attends what was held and visible, plus itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Attention weights of one token in one layer: one mapping from key position to weight for each query head.
Row = Sequence[Mapping[int, float]]


@dataclasses.dataclass
class Entry:
    """One token's entry for one KV head.

    Attributes:
      position: the token's place in the sequence.
      key: float64[D], rotated to `position`, as the codec gives it back.
      value: float64[D], as the codec gives it back.
      score: weights it received so far, summed over queries and over the query heads of its group.
    """

    position: int
    key: np.ndarray
    value: np.ndarray
    score: float = 0.0


@dataclasses.dataclass(frozen=True)
class Decision:
    """What one layer keeps.

    Attributes:
      kept: positions, one set per KV head.
      margin: least distance in score between something kept and something dropped instead; inf when nothing competed.
    """

    kept: list[set[int]]
    margin: float = math.inf


def top(scores: Mapping[int, float], count: int) -> tuple[set[int], float]:
    """The `count` positions of highest score, the newer one when scores tie, and the margin of the choice."""
    order = sorted(scores, key=lambda position: (scores[position], position), reverse=True)
    kept, dropped = order[:count], order[count:]
    margin = scores[kept[-1]] - scores[dropped[0]] if kept and dropped else math.inf
    return set(kept), margin


@dataclasses.dataclass(frozen=True)
class Full:
    """Keeps everything."""

    def visible(self, query: int, key: int) -> bool:
        """Causal."""
        return key <= query

    def coordinates(self, positions: Sequence[int], query: int) -> tuple[list[int], int]:
        """Original positions."""
        return list(positions), query

    def keep(self, held: list[list[Entry]], rows: Sequence[Row], query: int) -> Decision:
        """Whatever is visible to the newest token."""
        return Decision(
            [{entry.position for entry in entries if self.visible(query, entry.position)} for entries in held]
        )


@dataclasses.dataclass(frozen=True)
class SlidingWindow(Full):
    """Token i sees positions in (i - window, i] (Beltagy et al. 2020, 2004.05150)."""

    window: int

    def visible(self, query: int, key: int) -> bool:
        """The last `window` positions, the query's own included."""
        return query - self.window < key <= query


@dataclasses.dataclass(frozen=True)
class StreamingLLM(Full):
    """Token i sees the first `sinks` and last `window` positions, renumbered 0..n-1 (Xiao et al. 2023, 2309.17453)."""

    sinks: int
    window: int

    def visible(self, query: int, key: int) -> bool:
        """A sink, or one of the last `window` positions, the query's own included."""
        return key <= query and (key < self.sinks or key > query - self.window)

    def coordinates(self, positions: Sequence[int], query: int) -> tuple[list[int], int]:
        """In-cache positions in token order; the query, newest of them all, at n-1."""
        if list(positions) != sorted(positions) or positions[-1] != query:
            raise ValueError(f"in-cache positions need entries in token order ending at {query}, got {positions}")
        return list(range(len(positions))), len(positions) - 1


@dataclasses.dataclass(frozen=True)
class TOVA(Full):
    """Keeps the `budget` tokens the current one weighs most, over all query heads alike (Oren et al. 2024, 2401.06104).

    The current token is attended beyond the budget, and may itself be dropped.
    """

    budget: int

    def keep(self, held: list[list[Entry]], rows: Sequence[Row], query: int) -> Decision:
        """Top `budget` by the mean over all query heads of the newest row."""
        row = rows[-1]
        # A position that the layer's own window hides has no weight in the row, and counts as 0.
        scores = {e.position: sum(weights.get(e.position, 0.0) for weights in row) / len(row) for e in held[0]}
        kept, margin = top(scores, self.budget)
        return Decision([set(kept) for _ in held], margin)


@dataclasses.dataclass(frozen=True)
class H2O(Full):
    """Per KV head, the `recent` newest tokens and the `heavy` of most weight so far (Zhang et al. 2023, 2306.14048).

    The current token is attended beyond the budget and counts as the newest.
    """

    heavy: int
    recent: int

    def keep(self, held: list[list[Entry]], rows: Sequence[Row], query: int) -> Decision:
        """The `recent` newest, then the top `heavy` of the others by accumulated score."""
        kept, margins = [], []
        for entries in held:
            by_age = sorted(entries, key=lambda entry: entry.position)
            split = max(0, len(by_age) - self.recent)
            heavy, margin = top({entry.position: entry.score for entry in by_age[:split]}, self.heavy)
            kept.append(heavy | {entry.position for entry in by_age[split:]})
            margins.append(margin)
        return Decision(kept, min(margins))


OraclePolicy = Full  # Every oracle policy derives from Full, the one that drops nothing.

POLICIES: tuple[type[Full], ...] = (Full, SlidingWindow, StreamingLLM, TOVA, H2O)


def counterpart(policy: Any) -> OraclePolicy:
    """The oracle of a kvjax policy, found by its class name and given the same arguments."""
    for kind in POLICIES:
        if kind.__name__ == type(policy).__name__:
            return kind(**{field.name: getattr(policy, field.name) for field in dataclasses.fields(kind)})
    raise ValueError(f"there is no oracle of the policy {policy!r}; {', '.join(k.__name__ for k in POLICIES)} have one")
