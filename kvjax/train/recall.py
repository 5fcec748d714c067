"""Synthetic sequences that can only be predicted by looking far back: key=value recall and copying."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvjax.train.data import random_lines, random_window

LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8).astype(np.int32)
DIGITS = np.frombuffer(b"0123456789", np.uint8).astype(np.int32)
NEWLINE, EQUALS = ord("\n"), ord("=")


class Row:
    """A sequence under construction: tokens, and how much predicting each of them counts."""

    def __init__(self) -> None:
        self._tokens: list[np.ndarray] = []
        self._weights: list[np.ndarray] = []
        self.length = 0

    def add(self, tokens: Sequence[int] | np.ndarray, weight: float) -> None:
        """Appends tokens that all count `weight`."""
        self._tokens.append(np.asarray(tokens, np.int32))
        self._weights.append(np.full(len(tokens), weight, np.float32))
        self.length += len(tokens)

    def cut(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The first `length` tokens int32[length] and weights float32[length]."""
        return np.concatenate(self._tokens)[:length], np.concatenate(self._weights)[:length]


def random_code(code: np.ndarray, length: int, rng: np.random.Generator, end_token: int) -> np.ndarray:
    """Exactly `length` tokens of code from a random place, ends of files left out."""
    window = random_window(code, min(length + 64, len(code)), rng)
    window = window[window != end_token]
    return np.resize(window, length)


def random_pairs(count: int, rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    """`count` pairs of byte tokens: distinct keys of 3 to 6 letters, values of 3 to 6 digits or of 3 to 6 letters."""
    pairs: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}
    while len(pairs) < count:
        key = rng.choice(LETTERS, rng.integers(3, 7))
        value = rng.choice(DIGITS if rng.random() < 0.5 else LETTERS, rng.integers(3, 7))
        pairs.setdefault(key.tobytes(), (key, value))
    return list(pairs.values())


def add_pair(row: Row, pair: tuple[np.ndarray, np.ndarray], weight: float) -> None:
    """Appends the line `key=value`; the value and its newline count `weight`, the key nothing."""
    key, value = pair
    row.add([*key, EQUALS], 0.0)
    row.add([*value, NEWLINE], weight)


def dense_recall(
    length: int, filler: int, code: np.ndarray, end_token: int, rng: np.random.Generator, weight: float = 2.0
) -> tuple[np.ndarray, np.ndarray]:
    """New and repeated `key=value` lines in random order, up to `filler` tokens of code between them.

    Returns:
      tokens int32[length]; weights float32[length]: `weight` on the values of repeats, 1 on code, 0 on what is random.
    """
    row = Row()
    pairs = random_pairs(int(rng.integers(2, 3 + length // 48)), rng)
    filler = int(rng.integers(0, filler + 1))
    introduced = 0
    while row.length < length:
        if introduced and (introduced == len(pairs) or rng.random() < 0.6):
            add_pair(row, pairs[rng.integers(0, introduced)], weight)
        else:
            add_pair(row, pairs[introduced], 0.0)
            introduced += 1
        gap = int(rng.integers(0, filler + 1))
        if gap > 8:
            row.add(random_lines(code, gap, rng, end_token), 1.0)
    return row.cut(length)


def needle_recall(
    length: int, code: np.ndarray, end_token: int, rng: np.random.Generator, weight: float = 2.0
) -> tuple[np.ndarray, np.ndarray]:
    """Code with a few `key=value` lines scattered in it; at the end all are asked for again, in random order."""
    pairs = random_pairs(int(rng.integers(1, 13)), rng)
    asked = sum(len(key) + len(value) + 2 for key, value in pairs)
    room = max(length - 2 * asked, 0)
    places = np.sort(rng.integers(0, room + 1, len(pairs)))
    row = Row()
    gaps = np.diff(np.concatenate([[0], places, [room]]))
    for gap, pair in zip(gaps, [*pairs, None], strict=True):
        if gap > 8:
            row.add(random_lines(code, int(gap), rng, end_token), 1.0)
        if pair is not None:
            add_pair(row, pair, 0.0)
    while row.length < length:
        for index in rng.permutation(len(pairs)):
            add_pair(row, pairs[index], weight)
    return row.cut(length)


def copy_sequence(
    length: int, code: np.ndarray, end_token: int, rng: np.random.Generator, weight: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Segments of random letters, or of code lines, each followed by exact repetitions, which count.

    Sizes are log-uniform from 6 tokens to half the row: in short segments one letter tells where one is, which is what
    the first heads that copy learn; long ones then need more than a letter.
    """
    row = Row()
    while row.length < length:
        size = int(np.exp(rng.uniform(np.log(6), np.log(length / 2))))
        if size < 64 or rng.random() < 0.5:
            segment, first = np.append(rng.choice(LETTERS, size), NEWLINE), 0.0
        else:
            segment, first = random_lines(code, size, rng, end_token), 1.0
        row.add(segment, first)
        # The first tokens of a repetition can't be known to be one.
        row.add(segment[:2], 0.0)
        row.add(segment[2:], weight)
        for _ in range(int(rng.integers(0, 1 + min(8, length // (2 * size))))):
            row.add(segment, weight)
    return row.cut(length)
