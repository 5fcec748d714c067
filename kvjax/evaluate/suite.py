"""The evaluation itself: every task under every cache, one result at a time."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from typing import Any

import jax
import numpy as np

from kvjax.cache.config import CacheConfig
from kvjax.errors import ConfigError
from kvjax.evaluate.forced import Cost, forced_logits
from kvjax.evaluate.metrics import compared, first_mistake, likeliest, log_probabilities, mean_of, perplexity_of
from kvjax.evaluate.tasks import (
    Material,
    Question,
    copy_questions,
    recall_questions,
    text_questions,
    tracking_questions,
)
from kvjax.generate.state import layouts_of
from kvjax.model import Model
from kvjax.models import stack_layers

TASKS = ("text", "recall", "tracking", "copy")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is asked.

    Attributes:
      context: tokens of every question, prompt and continuation together.
      batch: questions at once.
      tasks: of `TASKS`.
      text_rows: windows of text.
      depths: of recall; recall_count: questions at each. hops: of tracking; tracking_count: questions for each.
      distractors: `key=value` lines beside those asked for.
      copy_count: copies.
      seed: of what is drawn.
    """

    context: int = 256
    batch: int = 8
    tasks: tuple[str, ...] = TASKS
    text_rows: int = 8
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    recall_count: int = 8
    hops: tuple[int, ...] = (2, 3, 4)
    tracking_count: int = 8
    distractors: int = 4
    copy_count: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("context", "batch", "text_rows", "recall_count", "tracking_count", "copy_count"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Settings.{name} must be at least 1, got {getattr(self, name)}")
        wrong = [task for task in self.tasks if task not in TASKS]
        if wrong or not self.tasks:
            raise ConfigError(f"Settings.tasks must be some of {', '.join(TASKS)}, got {self.tasks}")
        if not all(0 <= depth <= 1 for depth in self.depths) or not self.depths:
            raise ConfigError(f"Settings.depths must be in [0, 1], got {self.depths}")
        if not all(hop >= 1 for hop in self.hops) or not self.hops:
            raise ConfigError(f"Settings.hops must be at least 1, got {self.hops}")


class Suite:
    """A model and its questions. `measure` gives the same numbers, times aside, in any order and any process."""

    def __init__(self, model: Model, material: Material, settings: Settings = Settings()):
        longest = model.config.max_position_embeddings
        if settings.context > longest:
            raise ConfigError(f"context must be at most the model's {longest} positions, got {settings.context}")
        self.model, self.material, self.settings = model, material, settings

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What results depend on beside the cache: results of another identity cannot be joined to these."""
        text = hashlib.sha256(self.material.tokens.tobytes()).hexdigest()
        return {
            "settings": {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in dataclasses.asdict(self.settings).items()
                if name != "tasks"  # each task stands for itself
            },
            "model": _digest(self.model),
            "parameters": self.model.num_parameters,
            "dtype": self.model.dtype.name,
            "text": text[:16],
        }

    def questions(self, task: str) -> list[Question]:
        """Those of a task."""
        s = self.settings
        if task == "text":
            return text_questions(self.material, s.context, s.text_rows)
        if task == "recall":
            return recall_questions(self.material, s.context, s.depths, s.recall_count, s.distractors, s.seed)
        if task == "tracking":
            return tracking_questions(self.material, s.context, s.hops, s.tracking_count, s.distractors, s.seed)
        return copy_questions(self.material, s.context, s.copy_count, s.seed)

    def measure(self, task: str, cache: CacheConfig) -> dict[str, Any]:
        """One task under one cache: {"metrics", "bytes", "seconds"}, plain values.

        Metrics are estimates {"value", "error", "count"}. `text`: nats per token, perplexity, nats above the full
        cache, agreement of the likeliest token and KL(full || this), both against the full cache. `recall` and
        `tracking`: whole answers right, over all and by depth or hops. `copy`: tokens right, and how many of a greedy
        copy come before its first mistake. The full cache is `CacheConfig()`.
        """
        begun, cost = time.perf_counter(), Cost()
        metrics = self._text(cache, cost) if task == "text" else self._answers(task, cache, cost)
        assert cost.footprint is not None
        return {
            "metrics": metrics,
            "bytes": dataclasses.asdict(cost.footprint),
            "seconds": {
                "total": round(time.perf_counter() - begun, 3),
                "prefill_tokens_per_second": _rate(cost.prefill_tokens, cost.prefill_seconds),
                "decode_tokens_per_second": _rate(cost.decode_tokens, cost.decode_seconds),
            },
        }

    def _answers(self, task: str, cache: CacheConfig, cost: Cost) -> dict[str, Any]:
        """Which asked tokens are the likeliest, per question."""
        questions = self.questions(task)
        predicted = [np.full(len(question.continuation), -1) for question in questions]
        for piece in self._pieces(questions, cache, cost):
            tokens = np.asarray(likeliest(piece.logits))
            for row in range(piece.count):
                into = predicted[piece.first + row][piece.start :]
                count = min(len(into), tokens.shape[1])
                into[:count] = tokens[row, :count]
        right = [
            (found == np.array(question.continuation))[np.array(question.asked)]
            for found, question in zip(predicted, questions, strict=True)
        ]
        if task == "copy":
            return {
                "copied": mean_of([each.mean() for each in right]).as_dict(),
                "before_mistake": mean_of([first_mistake(each) for each in right]).as_dict(),
            }
        whole = np.array([each.all() for each in right])
        kinds = np.array([question.kind for question in questions])
        by_kind = {f"{kind:g}": mean_of(whole[kinds == kind]).as_dict() for kind in dict.fromkeys(kinds.tolist())}
        name = "by_depth" if task == "recall" else "by_hops"
        return {"answered": mean_of(whole).as_dict(), name: by_kind}

    def _text(self, cache: CacheConfig, cost: Cost) -> dict[str, Any]:
        """Losses, and what changes against the full cache, averaged within each window."""
        questions = self.questions("text")
        targets = np.array([question.continuation for question in questions], np.int32)
        measured = np.zeros((4, *targets.shape))
        for piece in self._pieces(questions, cache, cost):
            rows = slice(piece.first, piece.first + piece.count)
            width = min(piece.logits.shape[1], targets.shape[1] - piece.start)
            columns = slice(piece.start, piece.start + width)
            # The whole batch and block, so that nothing compiles anew for a short one.
            shape = piece.logits.shape
            wanted, reference = np.zeros(shape[:2], np.int32), np.zeros(shape, np.float32)
            wanted[: piece.count, :width] = targets[rows, columns]
            reference[: piece.count, :width] = self._reference[rows, columns]
            found = compared(log_probabilities(piece.logits), reference, wanted)
            measured[:, rows, columns] = [np.asarray(values)[: piece.count, :width] for values in found]
        nats, full, divergence, same = measured.mean(axis=2)
        return {
            "nats": mean_of(nats).as_dict(),
            "perplexity": perplexity_of(mean_of(nats)).as_dict(),
            "excess_nats": mean_of(nats - full).as_dict(),
            "agreement": mean_of(same).as_dict(),
            "divergence": mean_of(divergence).as_dict(),
        }

    @functools.cached_property
    def _reference(self) -> np.ndarray:
        """float32[rows, n, V]: the log-probabilities that the full cache gives on the text."""
        questions = self.questions("text")
        width = len(questions[0].continuation)
        found = np.zeros((len(questions), width, self.model.config.vocab_size), np.float32)
        for piece in self._pieces(questions, CacheConfig(), Cost()):
            values = np.asarray(log_probabilities(piece.logits))[: piece.count, : width - piece.start]
            found[piece.first : piece.first + piece.count, piece.start : piece.start + values.shape[1]] = values
        return found

    def _pieces(self, questions: list[Question], cache: CacheConfig, cost: Cost) -> Any:
        s = self.settings
        # A scan over layers compiles several times sooner, and compiling is most of what a small model's row takes; it
        # needs one group for all layers.
        model = self._stacked if len(layouts_of(self.model, cache)) == 1 else self.model
        return forced_logits(model, questions, cache, cost, batch=s.batch, context=s.context)

    @functools.cached_property
    def _stacked(self) -> Model:
        """The model with its layers stacked, if they are all of one kind."""
        if not self.model.config.uniform:
            return self.model
        return dataclasses.replace(self.model, params=stack_layers(self.model.params))


def _rate(tokens: int, seconds: float) -> float | None:
    """Tokens per second; None where nothing was timed."""
    return round(tokens / seconds, 1) if seconds else None


def _digest(model: Model) -> str:
    """Tells models apart by their config and a sample of every weight."""
    digest = hashlib.sha256(repr(model.config).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf.reshape(-1)[:4096]).tobytes())
    return digest.hexdigest()[:16]
