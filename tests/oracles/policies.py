"""Oracle policies: which entries of one layer a token sees and which stay.

A policy answers three questions:

- `visible(query, key)`: may the token at position `query` see position `key` at all? What is invisible to a new token
  is evicted before its step. Prompt tokens are masked alike, so each sees what it would see fed alone.
- `coordinates(positions, query)`: at which rotary positions do held keys and the query stand?
- `decide(moment)`: after the prompt, or after a step, what stays? Where layer, tokens and memory do not matter, it is
  `keep(held, rows, query)`.

"Held" is the state after that last answer: at most the budget. A step attends what was held and visible, plus itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, ClassVar

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
      slot: its place in the row; pages are cut by slots.
      importance: the summed importance of the tokens merged into it.
      coded: whether key and value are what a codec that waits for whole groups gives back, or still exact.
    """

    position: int
    key: np.ndarray
    value: np.ndarray
    score: float = 0.0
    slot: int = -1
    importance: float = 0.0
    coded: tuple[bool, bool] = (False, False)


@dataclasses.dataclass(frozen=True)
class Decision:
    """What one layer keeps.

    Attributes:
      kept: positions, one set per KV head.
      margin: least distance in score between something kept and something dropped instead; inf when nothing competed.
      merged: per KV head, position -> (key, value) of what takes the place of the entry kept there; None: nothing.
    """

    kept: list[set[int]]
    margin: float = math.inf
    merged: list[dict[int, tuple[np.ndarray, np.ndarray]]] | None = None


@dataclasses.dataclass(frozen=True)
class Moment:
    """What a policy decides by, in one layer, after the prompt or after a step.

    Attributes:
      layer, layers: which of the layers that own keys and values this is, and how many there are.
      tokens: ids of all tokens seen, the newest included.
      positions: of the tokens just fed that this layer has seen.
      held: entries, one list per KV head.
      rows: their attention weights, aligned with `positions`.
      prompt: after the prompt, not after a step.
      memory: what the policy itself noted in this layer; it alone writes it.
    """

    layer: int
    layers: int
    tokens: Sequence[int]
    positions: Sequence[int]
    held: list[list[Entry]]
    rows: Sequence[Row]
    prompt: bool
    memory: dict[str, Any]

    @property
    def query(self) -> int:
        """The newest position."""
        return self.positions[-1]

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return len(self.rows[-1]) // len(self.held)

    def everything(self) -> Decision:
        """Nothing is dropped."""
        return Decision([{entry.position for entry in entries} for entries in self.held])

    def column_sums(self, head: int, last: int) -> dict[int, float]:
        """Weight of each held position, summed over the last rows and over the head's group."""
        heads = range(head * self.group, (head + 1) * self.group)
        rows = self.rows[max(0, len(self.rows) - last) :]
        return {
            e.position: float(sum(row[h].get(e.position, 0.0) for row in rows for h in heads)) for e in self.held[head]
        }

    def head_mean(self, row: Row, position: int) -> float:
        """A position's weight in a row, averaged over all query heads."""
        return sum(weights.get(position, 0.0) for weights in row) / len(row)


def ceiling(share: float, count: int) -> int:
    """The smallest integer not below share * count, `share` as it is written: 0.2 of 35 is 7, not 8."""
    return math.ceil(Fraction(str(share)) * count)


def top(scores: Mapping[int, float], count: int) -> tuple[set[int], float]:
    """The `count` positions of highest score, the newer one when scores tie, and the margin of the choice.

    What was never read scores exactly 0 in any arithmetic, so a tie of zeros is no close call.
    """
    order = sorted(scores, key=lambda position: (scores[position], position), reverse=True)
    kept, dropped = order[:count], order[count:]
    if not kept or not dropped or scores[kept[-1]] == scores[dropped[0]] == 0.0:
        return set(kept), math.inf
    return set(kept), scores[kept[-1]] - scores[dropped[0]]


@dataclasses.dataclass(frozen=True)
class Full:
    """Keeps everything."""

    append_only: ClassVar[bool] = True
    """After the prompt nothing is ever dropped, so slots are filled in the order of positions."""
    drops_hidden_states: ClassVar[bool] = False
    """Prompt tokens that a layer drops are not computed in later layers."""
    merges_on_write: ClassVar[bool] = False
    """A new token may be blended into the newest entry before it is attended."""

    @property
    def reach(self) -> int | None:
        """One more than the farthest rotary distance of a policy with positions of its own; None: original ones."""
        return None

    def slot(self, position: int) -> int | None:
        """The place in a ring; None: the lowest free slot, or behind all when there is none."""
        return None

    def decide(self, moment: Moment) -> Decision:
        """What stays after the prompt or after a step."""
        return self.keep(moment.held, moment.rows, moment.query)

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

    append_only: ClassVar[bool] = False
    window: int

    def slot(self, position: int) -> int:
        """A ring of `window` slots."""
        return position % self.window

    def visible(self, query: int, key: int) -> bool:
        """The last `window` positions, the query's own included."""
        return query - self.window < key <= query


@dataclasses.dataclass(frozen=True)
class StreamingLLM(Full):
    """Token i sees the first `sinks` and last `window` positions, renumbered 0..n-1 (Xiao et al. 2023, 2309.17453)."""

    append_only: ClassVar[bool] = False
    sinks: int
    window: int

    @property
    def reach(self) -> int | None:
        """In-cache positions end at sinks + window - 1."""
        return self.sinks + self.window

    def slot(self, position: int) -> int:
        """Sinks first, then a ring of `window` slots."""
        return position if position < self.sinks else self.sinks + (position - self.sinks) % self.window

    def visible(self, query: int, key: int) -> bool:
        """A sink, or one of the last `window` positions, the query's own included."""
        return key <= query and (key < self.sinks or key > query - self.window)

    def coordinates(self, positions: Sequence[int], query: int) -> tuple[list[int], int]:
        """In-cache positions in token order; the query, newest of them all, at n-1."""
        if list(positions) != sorted(positions) or positions[-1] != query:
            raise ValueError(f"in-cache positions need entries in token order ending at {query}, got {positions}")
        return list(range(len(positions))), len(positions) - 1


@dataclasses.dataclass(frozen=True)
class LMInfinite(StreamingLLM):
    """Token i sees the first `sinks` and last `window` positions, at most `window` away (Han et al. 2023, 2308.16137).

    What is nearer stands at its original distance; the window counts the query.
    """

    @property
    def reach(self) -> int | None:
        """No distance exceeds `window`."""
        return self.window + 1 if self.sinks else None

    def coordinates(self, positions: Sequence[int], query: int) -> tuple[list[int], int]:
        """Original positions, but for those farther than `window`, which stand at that distance."""
        return [query - min(query - position, self.window) for position in positions], query


@dataclasses.dataclass(frozen=True)
class TOVA(Full):
    """Keeps the `budget` tokens the current one weighs most, over all query heads alike (Oren et al. 2024, 2401.06104).

    The current token is attended beyond the budget, and may itself be dropped.
    """

    append_only: ClassVar[bool] = False
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

    append_only: ClassVar[bool] = False
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

POLICIES: tuple[type[Full], ...] = (Full, SlidingWindow, StreamingLLM, LMInfinite, TOVA, H2O)


def kinds() -> tuple[type[Full], ...]:
    """All oracle policies, those of other files included."""
    from tests.oracles import merging, prompt_policies, pyramid_infer, scissorhands

    return (
        *POLICIES,
        scissorhands.Scissorhands,
        prompt_policies.FastGen,
        prompt_policies.SnapKV,
        prompt_policies.PyramidKV,
        pyramid_infer.PyramidInfer,
        merging.KVMerger,
        merging.DMC,
    )


def counterpart(policy: Any, **choices: Any) -> OraclePolicy:
    """The oracle of a kvjax policy, found by its class name and given the same arguments.

    Args:
      choices: fields that kvjax names otherwise, and those only the oracle has, where a paper leaves a rule open.
    """
    for kind in kinds():
        if kind.__name__ == type(policy).__name__:
            shared = [
                field.name
                for field in dataclasses.fields(kind)
                if field.name not in choices and not field.metadata.get("choice")
            ]
            return kind(**{name: getattr(policy, name) for name in shared}, **choices)
    raise ValueError(f"there is no oracle of the policy {policy!r}; {', '.join(k.__name__ for k in kinds())} have one")
