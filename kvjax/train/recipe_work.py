"""The pieces of `scripts/recipe.py`: a sister, her conversions, their healing, the same from scratch, decoding."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.cache.config import CacheConfig
from kvjax.checkpoint import load, save
from kvjax.config import ModelConfig
from kvjax.convert.report import Report, bytes_by_layer
from kvjax.generate.api import extend, prefill
from kvjax.model import Model
from kvjax.train.api import finetune
from kvjax.train.data import random_window
from kvjax.train.evaluate import Logits, nats_per_token
from kvjax.train.from_scratch import train_from_scratch
from kvjax.train.recipe import Recipe
from kvjax.train.recipe_file import SISTER, Conversion, RecipeFile, tokens_of
from kvjax.train.step import forward
from kvjax.train.tokenizer import END_ID

Tell = Callable[[int, int, str], None]
"""`(steps taken, of how many, a word on them)`."""
OBJECTIVES = ("plain", "distilled")
"""Next-token loss, and KL from the sister's logits."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What pieces are made of.

    Attributes:
      file: the settings. folder: of the run: weights and checkpoints. code, held_out: int32[N] tokens.
      tell: progress within a piece.
    """

    file: RecipeFile
    folder: Path
    code: np.ndarray
    held_out: np.ndarray
    tell: Tell

    def everything(self) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        """Each piece's name and what makes it, those first on which others rest or that say most."""
        conversions, (first, *others) = self.file.conversions, self.file.healing.seeds
        names = [conversion.name for conversion in conversions]
        alone = [one.name for one in conversions if self.file.same_architecture(one) == one.name]
        # Nobody would begin with merged keys; that they can be trained from random weights is told last.
        merged = [one.name for one in conversions if one.method == "svd" and one.name in alone]
        yield "sister", self.sister
        for conversion in conversions:
            yield f"convert/{conversion.name}", functools.partial(self.convert, conversion)
        yield from self._healing((*names, SISTER), "plain", first)
        yield from self._scratch([name for name in alone if name not in merged])
        yield "speed", self.speed
        yield from self._healing(names, "distilled", first)
        for seed in others:
            yield from self._healing((*names, SISTER), "plain", seed)
            yield from self._healing(names, "distilled", seed)
        yield from self._scratch([*merged, SISTER])

    def _healing(self, names: Iterable[str], objective: str, seed: int) -> Iterator[tuple[str, Any]]:
        for name in names:
            yield heal_name(name, objective, seed), functools.partial(self.heal, name, objective, seed)

    def _scratch(self, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
        for name in names:
            yield f"scratch/{name}", functools.partial(self.scratch, name)

    def sister(self) -> dict[str, Any]:
        """Trains her and keeps her weights."""
        model = self._trained("sister", self.file.model, self.file.train)
        save(model, self._path(SISTER))
        return {**self._measured(model), "tokens": self.file.training_tokens}

    def convert(self, conversion: Conversion) -> dict[str, Any]:
        """One conversion; its weights are kept too."""
        after, report = conversion.apply(self._model(SISTER), self._calibration())
        save(after, self._path(conversion.name))
        return {**self._measured(after), **kept(report)}

    def heal(self, name: str, objective: str, seed: int) -> dict[str, Any]:
        """One healing run of a converted model; or of the sister, which says what the tokens alone are worth."""
        healing = self.file.healing
        rng = np.random.default_rng([seed, healing.length])
        rows = [random_window(self.code, healing.length, rng) for _ in range(healing.steps * healing.batch_size)]
        teacher = self._model(SISTER) if objective == "distilled" else None
        tuned = finetune(
            self._model(name),
            np.stack(rows),
            **{**healing.options, "learning_rate": self.file.learning_rate(name)},
            seed=seed,
            teacher=teacher,
            report=lambda told: self.tell(told.step, healing.steps, f"loss {told.numbers['loss']:.3f}"),
        )
        return {**self._measured(tuned), "tokens": len(rows) * healing.length}

    def scratch(self, name: str) -> dict[str, Any]:
        """The same architecture from random weights, on the tokens of training and healing together."""
        recipe = self.file.from_scratch
        model = self._trained(f"scratch-{slug(name)}", self._model(name).config, recipe)
        return {**self._measured(model), "tokens": tokens_of(recipe)}

    def speed(self) -> dict[str, Any]:
        """Decoding of the sister and all converted models, after prompts of each length."""
        names = (SISTER, *(conversion.name for conversion in self.file.conversions))
        models = {name: self._model(name) for name in names}
        chosen = self.file.speed
        return {
            str(length): decode_speeds(models, SISTER, chosen.batch, length, chosen.steps, chosen.rounds)
            for length in chosen.prompts
        }

    def _trained(self, name: str, config: ModelConfig, recipe: Recipe) -> Model:
        """From random weights, going on where it was cut short."""
        checkpoint = self.folder / f"{name}.npz"
        return train_from_scratch(
            config,
            recipe,
            self.code,
            END_ID,
            checkpoint,
            report=lambda step, loss: self.tell(step, recipe.steps, f"loss {loss:.3f}"),
        )

    def _measured(self, model: Model) -> dict[str, Any]:
        """Nats per byte of held-out text, and sizes."""
        loss = nats_per_token(
            _logits(model.config),
            model.params,
            self.held_out,
            self.file.train.context,
            limit=self.file.held_out.windows,
        )
        # Weights are stored in float32; what serves the model is what the file says.
        held = sum(bytes_by_layer(dataclasses.replace(model.config, dtype=self.file.model.dtype)))
        return {"loss": loss, "bytes_per_token": held, "parameters": model.num_parameters}

    def _calibration(self) -> np.ndarray:
        """Rows of training text, evenly spread."""
        rows, length = self.file.calibration.rows, self.file.calibration.length
        starts = np.linspace(0, len(self.code) - length, rows).astype(int)
        return np.stack([self.code[start : start + length] for start in starts])

    def _path(self, name: str) -> Path:
        return self.folder.resolve() / "models" / slug(name)

    def _model(self, name: str) -> Model:
        return load(self._path(name), dtype="float32")


@functools.lru_cache(maxsize=16)
def _logits(config: ModelConfig) -> Logits:
    """One function for each architecture, so that measuring again compiles nothing."""
    return forward(config, scan=False)


def heal_name(name: str, objective: str, seed: int) -> str:
    """A healing run's name among the pieces."""
    return f"heal/{name}/{objective}/{seed}"


def slug(name: str) -> str:
    """A name as a file may have it."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def kept(report: Report) -> dict[str, float]:
    """Means over layers of what a conversion kept of keys' and values' energy, and of that what RoPE still turns."""
    return {
        f"{name}_kept": statistics.fmean(getattr(layer, name) for layer in report.layers)
        for name in ("keys", "values", "rope")
    }


def decode_speeds(
    models: dict[str, Model], reference: str, batch: int, prompt: int, steps: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Tokens per second of decoding, all sequences together, and the ratio to the reference's.

    The models take turns, a stretch of `steps` each: what else a machine does meets all of them. Medians over rounds,
    of the ratios too. Positions are not limited to those that were trained: how long a step takes does not depend on
    what a model knows.
    """
    room = (rounds + 1) * steps
    live: dict[str, tuple[Model, Any]] = {}
    for name, model in models.items():
        # No token ends a text, so that all take as many steps.
        wide = max(prompt + room, model.config.max_position_embeddings)
        config = dataclasses.replace(model.config, eos_token_ids=(), max_position_embeddings=wide)
        model = dataclasses.replace(model, config=config)
        rng = np.random.default_rng(0)
        prompts = rng.integers(0, config.vocab_size, (batch, prompt)).tolist()
        live[name] = model, prefill(model, prompts, CacheConfig(), room=room)
    found: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, (model, state) in live.items():
            out, state = extend(model, state, max_new_tokens=steps)
            live[name] = model, state
            if turn:  # the first compiles
                found[name].append(batch * steps / out.stats.decode_seconds)
    return {
        name: {
            "tokens_per_second": statistics.median(speeds),
            "ratio": statistics.median(a / b for a, b in zip(speeds, found[reference], strict=True)),
        }
        for name, speeds in found.items()
    }
