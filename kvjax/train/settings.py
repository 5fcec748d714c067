"""What a fine-tuning run is told, as values."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from kvjax.cache.codecs import Dense
from kvjax.cache.config import CacheConfig
from kvjax.cache.numbers import check_integer
from kvjax.cache.policies.optional import decides
from kvjax.errors import ConfigError

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (Hu et al. 2021, 2106.09685): W + alpha / rank * B A, of which only A and B are trained.

    Attributes:
      rank: of B A. alpha: how much it counts.
      targets: the modules whose `weight` is adapted, by the last part of their path; the default is attention's.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q", "k", "v", "o", "q_down", "q_up", "kv_down", "kv_up")

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        check_integer(self, "rank", 1)
        if not self.alpha > 0:
            raise ConfigError(f"LoRA.alpha must be positive, got {self.alpha!r}")
        if not self.targets:
            raise ConfigError("LoRA.targets must name at least one module, such as 'q'")

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class Distillation:
    """How much each loss counts where a teacher is given (Hinton et al. 2015, 1503.02531).

    Attributes:
      logits: weight of KL(teacher || student), at `temperature` and times its square.
      hidden: weight of the mean squared error between the final (normalised) hidden states.
      layers: weight of the squared distance between what each layer gives, over the square of the teacher's, on average
        over all layers: those further up, where hidden states are larger, count no more. Both models' hidden states of
        all layers are in memory at once.
      next_token: weight of the plain loss.
      temperature: both logits are divided by it.
    """

    logits: float = 1.0
    hidden: float = 0.0
    layers: float = 0.0
    next_token: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        weights = (self.logits, self.hidden, self.layers, self.next_token)
        if not min(weights) >= 0 or sum(weights) == 0:
            raise ConfigError(
                f"Distillation's logits, hidden, layers and next_token must be at least 0 and not all 0, got {weights}"
            )
        if not self.temperature > 0:
            raise ConfigError(f"Distillation.temperature must be positive, got {self.temperature!r}")


@dataclasses.dataclass(frozen=True)
class DMCSchedule:
    """How a model learns to merge what it caches (Nawrot et al. 2024, 2403.09636, section 3): see `kvjax.train.dmc`.

    Attributes:
      ratio: tokens per entry that are asked for in the end.
      fade_steps: the first steps, in which the two channels that will decide and weigh fade out of attention.
      ramp_steps: the steps behind these, in which what is asked for rises from 1 to `ratio`; the rest is taken at it.
      span: tokens of a blend at most, while training. temperature: of decisions, while training.
    """

    ratio: float
    fade_steps: int
    ramp_steps: int
    span: int = 12
    temperature: float = 0.1

    def __post_init__(self) -> None:
        if not self.ratio >= 1:
            raise ConfigError(f"DMCSchedule.ratio must be at least 1 (2: half the entries), got {self.ratio!r}")
        for name, least in (("fade_steps", 0), ("ramp_steps", 1), ("span", 1)):
            check_integer(self, name, least)
        if not self.temperature > 0:
            raise ConfigError(f"DMCSchedule.temperature must be above 0, got {self.temperature!r}")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a model is fine-tuned.

    Attributes:
      steps: optimiser steps. batch_size: rows per step. learning_rate: AdamW's, at its peak. seed: of everything drawn.
      warmup: steps of linear rise; None: a twentieth. The rest falls along a cosine to `final` of the peak.
      weight_decay: of matrices. clip: the most that the gradient's norm may be.
      accumulate: into how many parts a batch is split; their gradients are added up.
      compute_dtype: of products and activations, "float32" or "bfloat16"; None: bfloat16 on an accelerator. What is
        trained is float32 always, and so is its optimiser's state.
      remat: recompute each layer in the backward pass instead of keeping its activations.
      scan: over layers of one kind, with stacked weights: compiles once for all; None: on an accelerator.
      trainable: "all", "attention" (its projections and inner norms alone), or a `LoRA`.
      distillation: what counts where a teacher is given.
      through: the cache that the model is to be served with: attention in training sees what it will hold
        (`kvjax.train.through`), a teacher everything. None: everything.
      dmc: with `through=CacheConfig(policy=DMC())`: how merging is learnt.
    """

    steps: int
    batch_size: int
    learning_rate: float
    seed: int = 0
    warmup: int | None = None
    final: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    accumulate: int = 1
    compute_dtype: str | None = None
    remat: bool = False
    scan: bool | None = None
    trainable: Literal["all", "attention"] | LoRA = "all"
    distillation: Distillation = Distillation()
    through: CacheConfig | None = None
    dmc: DMCSchedule | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate"):
            if not _whole(getattr(self, name), 1):
                raise ConfigError(f"{name} must be an integer of at least 1, got {getattr(self, name)!r}")
        if self.warmup is not None and not (_whole(self.warmup, 0) and self.warmup <= self.steps):
            raise ConfigError(f"warmup must be an integer from 0 to steps ({self.steps}), got {self.warmup!r}")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)!r}")
        if self.weight_decay < 0 or not 0 <= self.final <= 1:
            raise ConfigError(
                f"weight_decay must be at least 0 and final within 0 and 1, got {self.weight_decay} and {self.final}"
            )
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"accumulate must divide batch_size, got {self.accumulate} parts of {self.batch_size} rows"
            )
        if self.compute_dtype not in (None, *DTYPES):
            raise ConfigError(f"compute_dtype must be None, {' or '.join(DTYPES)}, got {self.compute_dtype!r}")
        if self.trainable not in ("all", "attention") and not isinstance(self.trainable, LoRA):
            raise ConfigError(f"trainable must be 'all', 'attention' or a LoRA, got {self.trainable!r}")
        if not isinstance(self.distillation, Distillation):
            raise ConfigError(f"distillation must be a Distillation, got {self.distillation!r}")
        if not isinstance(self.through, CacheConfig | None):
            raise ConfigError(f"through must be None or a CacheConfig, got {self.through!r}")
        self._check_dmc()

    def _check_dmc(self) -> None:
        through, dmc = self.through, self.dmc
        if not isinstance(dmc, DMCSchedule | None):
            raise ConfigError(f"dmc must be None or a DMCSchedule, got {dmc!r}")
        merges = through is not None and decides(through.policy)
        if dmc is None:
            if merges:
                raise ConfigError(
                    "through.policy=DMC() is learnt under a loss of its own: give dmc=DMCSchedule(ratio, fade_steps, "
                    "ramp_steps)"
                )
            return
        if not merges:
            raise ConfigError(
                f"dmc says how to learn merging: it needs through=CacheConfig(policy=DMC()), got {through!r}"
            )
        assert through is not None
        if through.codec != Dense() or through.select is not None or through.overrides:
            raise ConfigError(
                f"DMC is learnt in all layers and in the dtype of keys and values: with dmc, through takes no codec, "
                f"select or overrides, got {through!r}; all but overrides may join when the model is served"
            )
        if dmc.fade_steps + dmc.ramp_steps > self.steps:
            raise ConfigError(
                f"dmc.fade_steps and ramp_steps must fit into steps ({self.steps}), got {dmc.fade_steps} and "
                f"{dmc.ramp_steps}"
            )

    @property
    def warmup_steps(self) -> int:
        """Steps of rise."""
        return self.steps // 20 if self.warmup is None else self.warmup

    @property
    def scale(self) -> float:
        """What adapters are multiplied by; 1 without any."""
        return self.trainable.scale if isinstance(self.trainable, LoRA) else 1.0


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
