"""PyramidInfer (Yang et al. 2024, 2405.12532): each layer passes on to the next only the tokens it keeps."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np

from tests.oracles.policies import Decision, Full, Moment, ceiling, top


@dataclasses.dataclass(frozen=True)
class PyramidInfer(Full):
    """One set per layer: `sinks`, the last `recent` of the prompt, and a share of the rest that falls with depth.

    Of what reaches layer i of l, its n tokens that are neither sinks nor recent, ceil(p_i n) stay, with p_i =
    (1 - keep)(cos(pi i / l) + 1) / 2 + keep, by the weights of the recent rows, averaged over all heads, the last row
    counting `weight` times as much as the first. What a layer drops, later ones never see. Once more than `exceed`
    tokens, the current one included, came since the last time, the current row picks ceil(keep p_i e) of these e; the
    current one is among them. What stayed once stays for good.
    """

    append_only: ClassVar[bool] = False
    drops_hidden_states: ClassVar[bool] = True
    sinks: int = 4
    recent: float = 0.2
    weight: float = 1.2
    keep: float = 0.9  # type: ignore[assignment]
    exceed: int = 16

    def share(self, layer: int, layers: int) -> float:
        """p_i: 1 in the first layer, and never below `keep`."""
        return (1 - self.keep) * (math.cos(math.pi * layer / layers) + 1) / 2 + self.keep

    def decide(self, moment: Moment) -> Decision:
        """What stays of the prompt, or of the tokens that came since the last choice."""
        if moment.prompt:
            moment.memory["new"] = []
            kept, margin = self.of_prompt(moment)
        else:
            moment.memory["new"].append(moment.query)
            kept, margin = {e.position for e in moment.held[0]}, math.inf
            if len(moment.memory["new"]) > self.exceed:
                dropped, margin = self.of_new(moment)
                kept -= dropped
                moment.memory["new"] = []
        return Decision([set(kept) for _ in moment.held], margin)

    def of_prompt(self, moment: Moment) -> tuple[set[int], float]:
        """Positions that stay."""
        count = max(1, ceiling(self.recent, moment.query + 1))
        first = moment.query + 1 - count
        spared = {p for p in moment.positions if p < self.sinks or p >= first}
        others = [p for p in moment.positions if p not in spared]
        rows, shares = moment.rows[-count:], np.linspace(1.0, self.weight, count)
        scores = {
            p: sum(s * moment.head_mean(row, p) for s, row in zip(shares, rows, strict=True)) / count for p in others
        }
        chosen, margin = top(scores, rounded_up(self.share(moment.layer, moment.layers) * len(others)))
        return spared | chosen, margin

    def of_new(self, moment: Moment) -> tuple[set[int], float]:
        """Positions that go."""
        new = moment.memory["new"]
        count = rounded_up(self.keep * self.share(moment.layer, moment.layers) * len(new))
        scores = {p: moment.head_mean(moment.rows[-1], p) for p in new if p != moment.query}
        chosen, margin = top(scores, count - 1)
        return set(scores) - chosen, margin


def rounded_up(x: float) -> int:
    """The ceiling of a product that rounding may have put a hair above an integer."""
    return math.ceil(x - 1e-9)
