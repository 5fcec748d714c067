"""What `scripts/recipe.py` converts, heals and measures, read from a TOML file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.config import ModelConfig, build, read_toml
from kvjax.convert import Report, cla, gqa, mla
from kvjax.errors import ConfigError
from kvjax.model import Model
from kvjax.train.recipe import Recipe
from kvjax.train.settings import Settings

MOST_HEALING = 0.05
"""Healing takes at most this share of the tokens that the sister was trained on (Ainslie et al. 2023, 2305.13245)."""


@dataclasses.dataclass(frozen=True)
class Conversion:
    """One conversion of the sister.

    Attributes:
      name: in the table.
      to: "gqa" (kv_heads, method), "mla" (kv_lora_rank, rope_head_dim, freq_fold) or "cla" (share): the arguments of
        `kvjax.convert`'s functions.
      learning_rate: of its healing; None: as [healing] says. What lost much has far to go; what lost little is thrown
        back by steps as large.
    """

    name: str
    to: str
    kv_heads: int = 1
    method: Any = "mean"
    kv_lora_rank: int = 0
    rope_head_dim: int = 0
    freq_fold: int | None = None
    share: int = 2
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        if self.to not in ("gqa", "mla", "cla"):
            raise ConfigError(f"conversion {self.name!r}: to must be gqa, mla or cla, got {self.to!r}")

    @property
    def architecture(self) -> tuple[Any, ...]:
        """Equal for conversions that end in the same architecture."""
        if self.to == "gqa":
            return self.to, self.kv_heads, self.method
        return (self.to, self.kv_lora_rank, self.rope_head_dim) if self.to == "mla" else (self.to, self.share)

    def apply(self, model: Model, text: np.ndarray | None) -> tuple[Model, Report]:
        """The converted model and what was done; text: int32[N, T], for calibration; None: from the weights alone."""
        if self.to == "gqa":
            return gqa.convert(model, self.kv_heads, self.method, text)
        if self.to == "mla":
            return mla.convert(model, self.kv_lora_rank, self.rope_head_dim, text, self.freq_fold)
        return cla.convert(model, self.share, text)


@dataclasses.dataclass(frozen=True)
class Healing:
    """How a converted model is trained on; length: tokens of a row; seeds: one run each; the rest is of `Settings`."""

    steps: int
    batch_size: int
    length: int
    learning_rate: float
    seeds: tuple[int, ...]
    warmup: int = 0
    final: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", tuple(self.seeds))
        if not self.seeds or self.length < 2:
            raise ConfigError(f"[healing] needs a seed and rows of 2 tokens, got {self.seeds} and {self.length}")
        Settings(**self.options)

    @property
    def options(self) -> dict[str, Any]:
        """What `finetune` is told of it; a run's seed comes with the run."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in ("length", "seeds")}

    @property
    def tokens(self) -> int:
        """Read in one run."""
        return self.steps * self.batch_size * self.length


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Text by which directions are chosen: rows of `length` tokens."""

    rows: int = 64
    length: int = 256


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out text: so many windows of it, at most."""

    windows: int = 256


@dataclasses.dataclass(frozen=True)
class Speed:
    """How decoding is timed: `rounds` stretches of `steps` steps after prompts of each of these lengths."""

    batch: int = 8
    prompts: tuple[int, ...] = (64,)
    steps: int = 32
    rounds: int = 5

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))
        if min(self.batch, self.steps, self.rounds, *self.prompts) < 1:
            raise ConfigError(f"[speed] takes positive numbers, got {dataclasses.asdict(self)}")


@dataclasses.dataclass(frozen=True)
class RecipeFile:
    """The whole file.

    Attributes:
      model: the sister, with as many key-value heads as query heads. train: how she, and what is trained from scratch,
        is trained. conversions: in the order of the table.
    """

    model: ModelConfig
    train: Recipe
    healing: Healing
    conversions: tuple[Conversion, ...]
    calibration: Calibration = Calibration()
    held_out: HeldOut = HeldOut()
    speed: Speed = Speed()

    def __post_init__(self) -> None:
        names = [conversion.name for conversion in self.conversions]
        if not names or len(set(names)) != len(names) or SISTER in names:
            raise ConfigError(f"conversions need names of their own other than {SISTER!r}, got {names}")
        allowed = int(MOST_HEALING * self.training_tokens)
        if self.healing.tokens > allowed:
            raise ConfigError(
                f"[healing] reads {self.healing.tokens} tokens, steps * batch_size * length; {allowed} are allowed, "
                f"{MOST_HEALING:.0%} of the {self.training_tokens} of [train]"
            )

    @classmethod
    def from_toml(cls, path: str | Path) -> RecipeFile:
        """Reads the file; unknown keys are refused by name.

        Raises:
          ConfigError: a table is missing, or says what cannot be.
        """
        tables = read_toml(path)
        listed = tables.get("conversions", [])
        if not isinstance(listed, list) or any(not isinstance(table, dict) for table in listed):
            raise ConfigError(f"{path}: conversions are written as [[conversions]] tables (see configs/recipe.toml)")
        kinds = {"healing": Healing, "calibration": Calibration, "held_out": HeldOut, "speed": Speed}
        unknown = sorted(tables.keys() - {"model", "train", "conversions", *kinds})
        if unknown or "healing" not in tables:
            what = f"has no place for [{unknown[0]}]" if unknown else "needs a [healing] table"
            raise ConfigError(f"{path} {what}; see configs/recipe.toml")
        return cls(
            ModelConfig.from_toml(path),
            Recipe.from_toml(path),
            conversions=tuple(build(Conversion, table, f"{path}: [[conversions]]") for table in listed),
            **{name: build(kind, tables[name], f"{path}: [{name}]") for name, kind in kinds.items() if name in tables},
        )

    def same_architecture(self, conversion: Conversion) -> str:
        """The first conversion that ends in the same architecture: by its name that is trained from scratch."""
        return next(one.name for one in self.conversions if one.architecture == conversion.architecture)

    def learning_rate(self, name: str) -> float:
        """Of healing a conversion, or the sister."""
        given = {conversion.name: conversion.learning_rate for conversion in self.conversions}.get(name)
        return self.healing.learning_rate if given is None else given

    @property
    def training_tokens(self) -> int:
        """Read by the sister."""
        return tokens_of(self.train)

    @property
    def from_scratch(self) -> Recipe:
        """As `train`, with as many tokens as training and healing read together, to within a batch more."""
        last = self.train.phases[-1]
        more = -(-self.healing.tokens // (last.rows * last.length))
        return dataclasses.replace(self.train, steps=self.train.steps + more)

    def as_table(self) -> dict[str, Any]:
        """All settings, as JSON holds them."""
        table: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return table


SISTER = "MHA"
"""The row of the sister herself, in the table and among the pieces."""


def tokens_of(recipe: Recipe) -> int:
    """Tokens read in all steps of a recipe."""
    ends = [*(phase.first for phase in recipe.phases[1:]), recipe.steps]
    return sum(
        phase.rows * phase.length * (min(end, recipe.steps) - min(phase.first, recipe.steps))
        for phase, end in zip(recipe.phases, ends, strict=True)
    )
