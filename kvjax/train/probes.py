"""Prompts with one known right answer, to measure what a model or a smaller cache still finds in its context."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from kvjax.errors import ConfigError
from kvjax.train.recall import EQUALS, LETTERS, NEWLINE, random_code, random_pairs

Predict = Callable[[np.ndarray], np.ndarray]
"""int32[B, T] -> int32[B, T]: the likeliest next token after each token, whatever model and cache computed it."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """A prompt, the tokens that must follow it, and where what they repeat was said (0: the start, 1: the end)."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    depth: float


def recall_probe(
    length: int, depth: float, code: np.ndarray, rng: np.random.Generator, distractors: int = 4, end_token: int = 256
) -> Probe:
    """Code with `key=value` lines in it that ends in one of their keys and `=`: `length` tokens, answer included.

    The line asked for stands at `depth` of the room before the question; `distractors` other lines stand at random
    places.

    Raises:
      ConfigError: depth is not in [0, 1], or the lines do not fit.
    """
    if not 0 <= depth <= 1:
        raise ConfigError(f"depth must be in [0, 1], got {depth}")
    (key, value), *others = random_pairs(distractors + 1, rng)
    # Before each line goes a newline of its own, which ends the code it interrupts.
    lines = [np.array([*k, EQUALS, *v, NEWLINE], np.int32) for k, v in [(key, value), *others]]
    question = np.array([NEWLINE, *key, EQUALS], np.int32)
    answer = np.array([*value, NEWLINE], np.int32)
    room = length - len(question) - len(answer) - sum(len(line) + 1 for line in lines)
    if room < 0:
        raise ConfigError(f"{distractors + 1} key=value lines and the question do not fit in {length} tokens")
    places = [round(depth * room), *rng.integers(0, room + 1, distractors)]
    text = random_code(code, room, rng, end_token)
    parts, last = [], 0
    for index in np.argsort(places, kind="stable"):
        parts += [text[last : places[index]], np.array([NEWLINE], np.int32), lines[index]]
        last = int(places[index])
    prompt = np.concatenate([*parts, text[last:], question])
    return Probe(tuple(prompt.tolist()), tuple(answer.tolist()), depth)


def copy_probe(length: int, rng: np.random.Generator, cue: int = 8) -> Probe:
    """Random letters and a newline, then their first `cue` letters again; the answer is the rest, newline included."""
    size = (length - 2) // 2
    if size <= cue:
        raise ConfigError(f"copying needs more than {2 * cue + 3} tokens, got {length}")
    segment = [*rng.choice(LETTERS, size).tolist(), NEWLINE]
    return Probe(tuple(segment + segment[:cue]), tuple(segment[cue:]), 0.0)


def right_tokens(predict: Predict, probes: Sequence[Probe], rows: int = 8) -> list[np.ndarray]:
    """Per probe, bool[len(answer)]: which answer tokens are the likeliest, given the right ones before them.

    If all are, greedy decoding gives the answer.

    Probes are padded at the end to the longest (causal models do not see that) and sent `rows` at a time.
    """
    width = max(len(probe.prompt) + len(probe.answer) for probe in probes)
    found: list[np.ndarray] = []
    for first in range(0, len(probes), rows):
        batch = probes[first : first + rows]
        tokens = np.zeros((rows, width), np.int32)
        for row, probe in zip(tokens, batch, strict=False):
            row[: len(probe.prompt) + len(probe.answer)] = probe.prompt + probe.answer
        predicted = np.asarray(predict(tokens))
        for row, probe in zip(predicted, batch, strict=False):
            start = len(probe.prompt) - 1
            found.append(row[start : start + len(probe.answer)] == np.array(probe.answer))
    return found
