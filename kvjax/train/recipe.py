"""The `[train]` table of a run's TOML file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import optax

from kvjax.config import build, read_toml
from kvjax.errors import ConfigError
from kvjax.train.mixture import Mixture, Phase
from kvjax.train.step import muon, schedule


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a small model is trained from scratch.

    Attributes:
      steps: in all; warmup, decay: of these, how many raise the learning rate at the start and lower it at the end.
      learning_rate: of norms and embeddings; matrices take 10 times as much (`kvjax.train.step.muon`).
      filler_from, filler_until, filler, phases, seed: see `Mixture`; a phase is written as its five numbers.
      part_tokens: tokens computed at once; a batch of more is split.
    """

    steps: int
    phases: tuple[Phase, ...]
    warmup: int = 20
    decay: int = 300
    learning_rate: float = 2.5e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    filler_from: int = 400
    filler_until: int = 1000
    filler: int = 160
    part_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.part_tokens < 1 or not self.learning_rate > 0:
            raise ConfigError(
                "steps, part_tokens and learning_rate must be positive, "
                f"got {self.steps}, {self.part_tokens} and {self.learning_rate}"
            )

    @classmethod
    def from_toml(cls, path: str | Path) -> Recipe:
        """Reads the `[train]` table; unknown keys are refused by name."""
        table = read_toml(path).get("train")
        if not isinstance(table, dict):
            raise ConfigError(f"{path} has no [train] table; add one (see configs/demo.toml)")
        phases = table.get("phases", [])
        if not isinstance(phases, list) or any(not isinstance(phase, list) or len(phase) != 5 for phase in phases):
            raise ConfigError(f"{path}: phases must be lists of five numbers (see Phase), got {phases!r}")
        return build(cls, {**table, "phases": tuple(Phase(*phase) for phase in phases)}, str(path))

    @property
    def context(self) -> int:
        """The longest rows trained on, in tokens."""
        return max(phase.length for phase in self.phases)

    def optimizer(self) -> optax.GradientTransformation:
        """Muon and AdamW on the recipe's schedule."""
        rate = schedule(self.learning_rate, self.steps, self.warmup, self.decay)
        return muon(rate, weight_decay=self.weight_decay, clip=self.clip)

    def mixture(self, code: np.ndarray, end_token: int) -> Mixture:
        """The batches of this recipe over `code`."""
        growth = (self.filler_from, self.filler_until, self.filler)
        return Mixture(code, end_token, self.phases, *growth, seed=self.seed)

    def parts(self, phase: Phase) -> int:
        """Into how many parts a batch of this phase is split; always a divisor of its rows."""
        wanted = max(1, phase.rows * phase.length // self.part_tokens)
        return max(count for count in range(1, min(wanted, phase.rows) + 1) if phase.rows % count == 0)
