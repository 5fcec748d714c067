"""How tokens are drawn."""

from __future__ import annotations

import dataclasses
import math

from kvjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: 0 is greedy.
      top_k: keep the k likeliest (0: all); top_p: the smallest set with at least this mass; min_p: tokens at least this
        fraction of the likeliest's probability. Applied in this order, after repetition_penalty and temperature.
      repetition_penalty: divides positive and multiplies negative logits of tokens already seen (Keskar et al. 2019).
      n: samples per prompt; the prompt's pages are shared.
      beams: beam search width; 1 is no beam search.
      length_penalty: beam scores are divided by length ** length_penalty.
      stop: strings that end a text (not part of it); stop_tokens: token ids that do, beside the model's own.
      seeds: one seed per prompt; None derives them from the call's seed and the prompt's place.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    n: int = 1
    beams: int = 1
    length_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    seeds: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "stop_tokens", "seeds"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        rules = (
            ("temperature", self.temperature >= 0 and math.isfinite(self.temperature), "finite and at least 0"),
            ("top_k", self.top_k >= 0, "at least 0 (0: all)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "positive"),
            ("n", self.n >= 1, "at least 1"),
            ("beams", self.beams >= 1, "at least 1"),
            ("stop", all(isinstance(s, str) and s for s in self.stop), "a tuple of non-empty strings"),
        )
        for name, ok, allowed in rules:
            if not ok:
                raise ConfigError(f"Sampling.{name} must be {allowed}, got {getattr(self, name)!r}")
        if self.beams > 1 and self.stop:
            raise ConfigError(
                f"beam search ends texts at tokens, not at strings: with beams={self.beams} use stop_tokens instead of "
                f"stop={self.stop!r}"
            )
        if self.beams > 1 and (self.temperature > 0 or self.n > self.beams):
            raise ConfigError(
                f"beam search is deterministic and returns at most `beams` texts a prompt: with beams={self.beams} "
                f"set temperature=0 and n<={self.beams}, got temperature={self.temperature}, n={self.n}"
            )
