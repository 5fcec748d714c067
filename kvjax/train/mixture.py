"""The demo model's training mixture: batch `step` is a function of (seed, step) alone."""

from __future__ import annotations

import dataclasses

import numpy as np

from kvjax.errors import ConfigError
from kvjax.train.data import random_window
from kvjax.train.recall import copy_sequence, dense_recall, needle_recall


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of training with batches of one shape.

    Attributes:
      first: the step it begins with; it lasts until the next phase begins.
      rows, length: batch shape in rows and tokens per row.
      code_rows, copy_rows: fractions of rows that are code and copying; the rest is recall.
    """

    first: int
    rows: int
    length: int
    code_rows: float
    copy_rows: float

    def __post_init__(self) -> None:
        if self.rows < 1 or self.length < 64:
            raise ConfigError(f"a phase needs at least 1 row of 64 tokens, got {self.rows} of {self.length}")
        if min(self.code_rows, self.copy_rows) < 0 or self.code_rows + self.copy_rows > 1:
            raise ConfigError(
                "code_rows and copy_rows are fractions that sum to at most 1, "
                f"got {self.code_rows} and {self.copy_rows}"
            )


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Rows of code, recall and copying, drawn independently.

    Because a batch depends on nothing but the seed and its step, a resumed run sees what an uninterrupted one would.

    Attributes:
      code: training tokens, int32[N]; end_token: what separates files in it.
      phases: in order of `first`, the first of which is 0.
      filler_from, filler_until: steps between which the code between recall lines grows from nothing to `filler`
        tokens, and the share of recall rows that are scattered needles from none to half.
      seed: of the whole run.
    """

    code: np.ndarray
    end_token: int
    phases: tuple[Phase, ...]
    filler_from: int = 400
    filler_until: int = 1000
    filler: int = 160
    seed: int = 0

    def __post_init__(self) -> None:
        firsts = [phase.first for phase in self.phases]
        if not firsts or firsts[0] != 0 or firsts != sorted(set(firsts)):
            raise ConfigError(f"phases must begin at step 0 and at rising steps, got {firsts}")
        longest = max(phase.length for phase in self.phases)
        if len(self.code) < longest + 256:
            raise ConfigError(f"rows of {longest} tokens need at least {longest + 256} tokens, got {len(self.code)}")

    def phase(self, step: int) -> Phase:
        """The phase that `step` belongs to."""
        return [phase for phase in self.phases if phase.first <= step][-1]

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """tokens int32[rows, length], weights float32[rows, length]: how much predicting each token counts."""
        rng = np.random.default_rng([self.seed, step])
        phase = self.phase(step)
        drawn = [self._row(step, row, phase, rng) for row in range(phase.rows)]
        tokens, weights = zip(*drawn, strict=True)
        return np.stack(tokens), np.stack(weights)

    def _row(self, step: int, row: int, phase: Phase, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        # A stratified draw: every batch has its share of each kind, to within a row.
        place = (row + rng.random()) / phase.rows
        if place < phase.code_rows:
            return random_window(self.code, phase.length, rng), np.ones(phase.length, np.float32)
        if place >= 1 - phase.copy_rows:
            return copy_sequence(phase.length, self.code, self.end_token, rng)
        grown = (step - self.filler_from) / max(self.filler_until - self.filler_from, 1)
        grown = min(max(grown, 0.0), 1.0)
        if grown > 0 and rng.random() < 0.5 * grown:
            return needle_recall(phase.length, self.code, self.end_token, rng)
        return dense_recall(phase.length, int(self.filler * grown), self.code, self.end_token, rng)
