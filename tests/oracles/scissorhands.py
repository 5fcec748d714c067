"""Scissorhands (Liu et al. 2023, 2305.17118): what attention passed over most often lately is dropped, many at once.

A comparison of a weight with 1/n is all the method sees, so its choices are sets ordered by small integers. How far
they are from changing is not a distance of scores but of comparisons: see `least_flip`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

from tests.oracles.policies import Decision, Full, Moment


@dataclasses.dataclass(frozen=True)
class Look:
    """One token's look at another: whether its weight fell below an even share, and by how much it missed turning."""

    query: int
    below: bool
    distance: float


@dataclasses.dataclass(frozen=True)
class Scissorhands(Full):
    """Per KV head: over budget, the `drop` tokens that fell below average most often go, but none of the `recent`.

    In the last `history` steps, the prompt's rows among them, a token fell below where its weight, averaged over the
    group, was less than 1 / (entries attended). The current token is attended beyond the budget, its first look is its
    own, and it counts as the newest. After a prompt exactly `budget` tokens stay.
    """

    append_only: ClassVar[bool] = False
    budget: int
    recent: int
    history: int = 400
    drop: int | None = None

    def decide(self, moment: Moment) -> Decision:
        """Drops nothing up to the budget; beyond it `drop` tokens, or what a prompt has too many."""
        notes = moment.memory.setdefault("looks", [{} for _ in moment.held])
        kept, margins = [], []
        for head, looks in enumerate(notes):
            self.note(moment, head, looks)
            held = sorted(entry.position for entry in moment.held[head])
            count = len(held) - self.budget
            if count > 0 and not moment.prompt:
                count = self.budget // 2 if self.drop is None else self.drop
            candidates = held[: max(0, len(held) - self.recent)]
            recent = {p: [look for look in looks[p] if look.query > moment.query - self.history] for p in candidates}
            # Among equals the newer token stays.
            order = sorted(candidates, key=lambda p, r=recent: (-sum(look.below for look in r[p]), p))
            dropped = order[: max(0, count)]
            kept.append(set(held) - set(dropped))
            margins += [least_flip(recent[d], recent[k], d < k) for d in dropped for k in order[len(dropped) :]]
        return Decision(kept, min(margins, default=math.inf))

    def note(self, moment: Moment, head: int, looks: dict[int, list[Look]]) -> None:
        """Adds the new rows' looks at what is held."""
        heads = range(head * moment.group, (head + 1) * moment.group)
        for query, row in zip(moment.positions, moment.rows, strict=True):
            share = 1 / len(row[heads[0]])
            for entry in moment.held[head]:
                if entry.position <= query:
                    # What the layer's own window hides has no weight, which is below any share.
                    weight = sum(row[h].get(entry.position, 0.0) for h in heads) / moment.group
                    looks.setdefault(entry.position, []).append(Look(query, weight < share, abs(weight - share)))


def least_flip(dropped: Sequence[Look], kept: Sequence[Look], older: bool) -> float:
    """How far comparisons must move before one token is kept and the other dropped instead.

    Args:
      older: the dropped token is the older one, and goes first when counts are equal.

    Returns:
      Of the comparisons that would have to turn, as few as possible, the distance of the farthest.
    """
    lead = sum(look.below for look in dropped) - sum(look.below for look in kept)
    needed = lead + 1 if older else lead
    usable = sorted([d.distance for d in dropped if d.below] + [k.distance for k in kept if not k.below])
    return usable[needed - 1] if needed <= len(usable) else math.inf
