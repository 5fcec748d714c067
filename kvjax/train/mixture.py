"""The demo model's training mixture: batch `step` is a function of (seed, step) alone."""

from __future__ import annotations

import dataclasses

import numpy as np

from kvjax.train.data import random_window
from kvjax.train.recall import copy_sequence, dense_recall, needle_recall


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Rows of code, recall and copying, drawn independently.

    Because a batch depends on nothing but the seed and its step, a resumed run sees what an uninterrupted one would.

    Attributes:
      code: training tokens, int32[N].
      end_token: separates files.
      code_rows, copy_rows: fractions of rows; the rest is recall.
      filler_from, filler_until: steps between which the code between recall lines grows from nothing to `filler`.
      filler: tokens; past `filler_from`, half of recall rows are scattered needles.
      seed: of the whole run.
    """

    code: np.ndarray
    end_token: int
    code_rows: float = 0.5
    copy_rows: float = 0.08
    filler_from: int = 300
    filler_until: int = 1000
    filler: int = 160
    seed: int = 0

    def batch(self, step: int, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """tokens int32[rows, length], weights float32[rows, length]."""
        rng = np.random.default_rng([self.seed, step])
        drawn = [self._row(step, row, rows, length, rng) for row in range(rows)]
        tokens, weights = zip(*drawn, strict=True)
        return np.stack(tokens), np.stack(weights)

    def _row(
        self, step: int, row: int, rows: int, length: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        # A stratified draw: every batch has its share of each kind, to within a row.
        place = (row + rng.random()) / rows
        if place < self.code_rows:
            return random_window(self.code, length, rng), np.ones(length, np.float32)
        if place >= 1 - self.copy_rows:
            return copy_sequence(length, self.code, self.end_token, rng)
        grown = (step - self.filler_from) / max(self.filler_until - self.filler_from, 1)
        grown = min(max(grown, 0.0), 1.0)
        if grown > 0 and rng.random() < 0.5 * grown:
            return needle_recall(length, self.code, self.end_token, rng)
        return dense_recall(length, int(self.filler * grown), self.code, self.end_token, rng)
