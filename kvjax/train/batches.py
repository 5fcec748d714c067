"""Batches of rows that are in memory, in a new order every epoch; and of whatever a caller iterates over."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import numpy as np

from kvjax.errors import ConfigError, RequestError, TrainingError
from kvjax.train.batch import as_batch


class Batches(Protocol):
    """An iterator of batches whose place can be stored, as grain's are."""

    def __next__(self) -> Any:
        """The next batch, as `as_batch` takes it."""

    def get_state(self) -> Any:
        """Where it is: something JSON can hold."""

    def set_state(self, state: Any) -> None:
        """Goes to a place that `get_state` gave."""


class ArrayBatches:
    """int32[examples, T] as batches without end; batch n is a function of (seed, n) alone.

    Each epoch has an order of its own; rows that do not fill its last batch are left out of it.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, seed: int) -> None:
        if len(tokens) < batch_size:
            raise ConfigError(f"{len(tokens)} examples do not fill a batch of {batch_size}; lower batch_size")
        self._tokens, self._rows, self._seed, self._taken = tokens, batch_size, seed, 0

    def __iter__(self) -> ArrayBatches:
        return self

    def __next__(self) -> np.ndarray:
        epoch, place = divmod(self._taken, len(self._tokens) // self._rows)
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._tokens))
        self._taken += 1
        return self._tokens[order[place * self._rows : (place + 1) * self._rows]]

    def fingerprint(self) -> str:
        """Of its shape, the sum of all tokens, and up to 4096 rows from its beginning to its end."""
        rows = np.linspace(0, len(self._tokens) - 1, min(len(self._tokens), 4096)).astype(int)
        return _digest(self._tokens.shape, int(self._tokens.sum(dtype=np.int64)), self._tokens[rows])

    def get_state(self) -> dict[str, int]:
        """How many batches were taken."""
        return {"taken": self._taken}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes there."""
        self._taken = state["taken"]


class CountedBatches:
    """Any iterator: its place is the number of batches taken, and going there takes them again."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches, self._taken = batches, 0
        self._ahead: list[Any] = []

    def __iter__(self) -> CountedBatches:
        return self

    def __next__(self) -> Any:
        batch = self._ahead.pop() if self._ahead else next(self._batches)
        self._taken += 1
        return batch

    def fingerprint(self) -> str:
        """Of its first batch, which is kept until it is taken."""
        self._ahead = [take(self, 0)]
        self._taken = 0
        return _digest(self._ahead[0])

    def get_state(self) -> dict[str, int]:
        """How many batches were taken."""
        return {"taken": self._taken}

    def set_state(self, state: dict[str, int]) -> None:
        """Takes as many as were taken."""
        while self._taken < state["taken"]:
            take(self, self._taken)


def batches_of(given: Any, batch_size: int, seed: int, vocab_size: int) -> Batches:
    """What a caller trains on, as `Batches`: an array of examples is checked here, batches as they come."""
    if hasattr(given, "shape"):
        tokens = np.asarray(given)
        if tokens.ndim != 2:
            raise RequestError(f"tokens must be int32[examples, T], got shape {list(tokens.shape)}")
        as_batch(tokens, len(tokens), vocab_size)
        return ArrayBatches(tokens, batch_size, seed)
    try:
        iterator = iter(given)
    except TypeError:
        raise RequestError(f"tokens must be int32[examples, T] or an iterable of batches, got {given!r:.80}") from None
    return iterator if hasattr(iterator, "get_state") else CountedBatches(iterator)


def take(batches: Batches, step: int) -> Any:
    """The next batch; `TrainingError` where there is none."""
    try:
        return next(batches)
    except StopIteration:
        raise TrainingError(f"the batches ended after {step}; give more, an endless iterator, or fewer steps") from None


def fingerprint(batches: Batches) -> str:
    """What tells these batches from others, before any was taken: cheap, not certain.

    Its own `fingerprint`; without, that of the first batch.
    """
    own = getattr(batches, "fingerprint", None)
    if own is not None:
        found: str = own()
        return found
    begin = batches.get_state()
    first = take(batches, 0)
    batches.set_state(begin)
    return _digest(first)


def _digest(*parts: Any) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(parts):
        array = np.asarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
