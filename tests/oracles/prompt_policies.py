"""Policies that choose once, from a whole prompt's attention: SnapKV, PyramidKV, FastGen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, Literal

from tests.oracles.policies import Decision, Full, Moment, ceiling, top


@dataclasses.dataclass(frozen=True)
class SnapKV(Full):
    """Per KV head, the prompt tokens its last `window` queries weigh most, and those last (Li et al. 2024, 2404.14469).

    Weights are summed over these rows and the group, then averaged over `kernel` neighbours; beyond either end, the
    window's own columns included, stand zeros that count. Generated tokens all stay.
    """

    budget: int
    window: int = 32
    kernel: int = 5

    def decide(self, moment: Moment) -> Decision:
        """The top budget - window by pooled weight, and the window."""
        if not moment.prompt:
            return moment.everything()
        return self.select(moment, self.budget)

    def select(self, moment: Moment, budget: int) -> Decision:
        """What stays of the prompt in a layer with that budget."""
        length = moment.query + 1
        if length <= budget:
            return moment.everything()
        kept, margins = [], []
        for head in range(len(moment.held)):
            weights = moment.column_sums(head, self.window)
            pooled = pool({p: weights[p] for p in range(length - self.window)}, self.kernel)
            chosen, margin = top(pooled, budget - self.window)
            kept.append(chosen | set(range(length - self.window, length)))
            margins.append(margin)
        return Decision(kept, min(margins))


def pool(weights: Mapping[int, float], kernel: int) -> dict[int, float]:
    """Mean over `kernel` neighbours; positions that are missing count as zeros."""
    reach = range(-(kernel // 2), kernel // 2 + 1)
    return {p: sum(weights.get(p + offset, 0.0) for offset in reach) / kernel for p in weights}


@dataclasses.dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV whose budget falls with depth (Cai et al. 2024, 2406.02069)."""

    window: int = 8
    beta: int = 20

    def decide(self, moment: Moment) -> Decision:
        """SnapKV's choice with the layer's own budget."""
        if not moment.prompt:
            return moment.everything()
        return self.select(moment, self.budgets(moment.query + 1, moment.layers)[moment.layer])

    def budgets(self, length: int, layers: int) -> list[int]:
        """What each layer keeps of a prompt, its window included; floors as published, so the mean may overshoot."""
        if length <= self.budget:
            return [length] * layers
        mean = self.budget - self.window
        if length < 2 * mean or layers == 1:
            return [self.budget] * layers
        least = mean // self.beta
        most = 2 * mean - least
        if most >= length - self.window:
            most = length - self.window
            least = 2 * mean - most
        step = (most - least) // (layers - 1)
        return [most - layer * step + self.window for layer in range(layers)]


PROFILES = ("special", "punctuation", "frequent", "local", "full")
"""Each adds to what the one before keeps."""


@dataclasses.dataclass(frozen=True)
class FastGen(Full):
    """Each KV head takes the least profile that recovers enough of its prompt's attention (Ge et al. 2023, 2310.01801).

    A profile keeps tokens by id (`special`, then `punctuation`), by summed weight (`frequent` of the prompt's length),
    and the newest (`local` of it). Recovered is the softmax mass, averaged over the prompt's rows and the group, that
    lies on what the profile keeps of each row's past and on the row's own token. Frequent tokens are the top of all,
    not of what is left; sums run on while decoding, as for H2O; the current token is attended beyond what is kept.

    Attributes:
      special, punctuation: token ids.
      sizes: what stays fixed after the prompt: the number of frequent and of local tokens ("parts"), or the number a
        head holds ("whole"), the least of what is neither pinned nor local giving way.
      pins: the tokens kept for their id are all, generated ones too, or only the prompt's.
    """

    append_only: ClassVar[bool] = False
    recovery: float = 0.95
    frequent: float = 0.3
    local: float = 0.3
    special: frozenset[int] = frozenset()
    punctuation: frozenset[int] = frozenset()
    sizes: Literal["parts", "whole"] = dataclasses.field(default="parts", metadata={"choice": True})
    pins: Literal["all", "prompt"] = dataclasses.field(default="all", metadata={"choice": True})

    def decide(self, moment: Moment) -> Decision:
        """Chooses the profiles after the prompt; keeps what they keep then and ever after."""
        margin = math.inf
        if moment.prompt:
            moment.memory["length"] = len(moment.tokens)
            chosen = [self.choose(moment, head) for head in range(len(moment.held))]
            moment.memory["profiles"] = [profile for profile, _ in chosen]
            margin = min(distance for _, distance in chosen)
        kept = []
        for head, profile in enumerate(moment.memory["profiles"]):
            if self.sizes == "whole" and not moment.prompt:
                positions, distance = self.one_less(moment, head, profile)
            else:
                positions, distance = self.keeps(moment, head, profile)
            kept.append(positions)
            margin = min(margin, distance)
        return Decision(kept, margin)

    def counts(self, moment: Moment) -> tuple[int, int]:
        """How many frequent and how many local tokens."""
        length = moment.memory["length"]
        return ceiling(self.frequent, length), ceiling(self.local, length)

    def pinned(self, moment: Moment, head: int, profile: str) -> set[int]:
        """Held positions kept for their token's id."""
        ids = set(self.special) | (set() if profile == "special" else set(self.punctuation))
        last = len(moment.tokens) if self.pins == "all" else moment.memory["length"]
        return {e.position for e in moment.held[head] if moment.tokens[e.position] in ids and e.position < last}

    def keeps(self, moment: Moment, head: int, profile: str) -> tuple[set[int], float]:
        """The held positions a profile keeps, and the margin."""
        held = sorted(e.position for e in moment.held[head])
        if profile == "full":
            return set(held), math.inf
        kept, margin = self.pinned(moment, head, profile), math.inf
        frequent, local = self.counts(moment)
        if PROFILES.index(profile) >= PROFILES.index("frequent"):
            heavy, margin = top({e.position: e.score for e in moment.held[head]}, frequent)
            kept |= heavy
        if profile == "local":
            kept |= {p for p in held if p > moment.query - local}
        return kept, margin

    def choose(self, moment: Moment, head: int) -> tuple[str, float]:
        """The first profile that recovers enough, and how clearly it and those before were told apart."""
        margin = math.inf
        for profile in PROFILES[:-1]:
            recovered = self.recovered(moment, head, profile)
            margin = min(margin, abs(recovered - self.recovery))
            if recovered >= self.recovery:
                return profile, margin
        return "full", margin

    def recovered(self, moment: Moment, head: int, profile: str) -> float:
        """Mass on what the profile keeps, local relative to each row, averaged over rows and group."""
        everywhere, _ = self.keeps(moment, head, "frequent" if profile == "local" else profile)
        _, local = self.counts(moment)
        near = local if profile == "local" else 1
        heads = range(head * moment.group, (head + 1) * moment.group)
        mass = 0.0
        for query, row in zip(moment.positions, moment.rows, strict=True):
            inside = everywhere | set(range(query - near + 1, query + 1)) | {query}
            mass += sum(weight for h in heads for position, weight in row[h].items() if position in inside)
        return mass / (len(moment.rows) * moment.group)

    def one_less(self, moment: Moment, head: int, profile: str) -> tuple[set[int], float]:
        """All that is held but the least of what is neither pinned nor local."""
        held = {e.position for e in moment.held[head]}
        if profile == "full":
            return held, math.inf
        _, local = self.counts(moment)
        spared = self.pinned(moment, head, profile)
        if profile == "local":
            spared |= {p for p in held if p > moment.query - local}
        scores = {e.position: e.score for e in moment.held[head] if e.position not in spared}
        # Without frequent tokens nothing but the current one is there to give way.
        stay, margin = top(scores, max(0, len(scores) - 1))
        return spared | stay, margin
