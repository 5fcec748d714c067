"""Documents one after another in rows of one length, so that no token of a batch is padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from kvjax.errors import ConfigError


def packed_batches(
    documents: Sequence[str],
    encode: Callable[[str], list[int]],
    length: int,
    batch_size: int,
    seed: int = 0,
    end_token: int | None = None,
    epochs: int | None = None,
) -> grain.DatasetIterator:
    """Batches of packed rows, documents in a new order every epoch; `get_state` and `set_state` are grain's.

    Each batch is a dict of `tokens`, `segments` (1, 2, ... within a row) and `positions`, int32[batch_size, length]
    each. A document that a row has no room for is cut, and its rest begins the next row, as a document of its own.

    Args:
      encode: text to token ids. end_token: follows each document; None: nothing does.
      epochs: None: without end.

    Raises:
      ConfigError: a length below 2.
    """
    if length < 2:
        raise ConfigError(f"length must be at least 2 tokens, one to read and one to predict; got {length}")
    end = [] if end_token is None else [end_token]
    texts = grain.MapDataset.source(documents).seed(seed).shuffle().repeat(epochs)
    tokens = texts.map(lambda text: np.asarray(encode(text) + end, np.int32))
    # Documents are tokenized ahead, on threads: the order stays the same.
    ahead = tokens.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=32))
    return iter(PackedRows(ahead, length).batch(batch_size, drop_remainder=True))


class PackedRows(grain.IterDataset):
    """Rows of `length` tokens out of a dataset of documents (int32[n] each); a last, short row is left out."""

    def __init__(self, parent: grain.IterDataset, length: int) -> None:
        super().__init__(parent)
        self._documents, self._length = parent, length

    def __iter__(self) -> _Rows:
        return _Rows(iter(self._documents), self._length)


class _Rows(grain.DatasetIterator):
    """Its place is that before the document at hand, and how much of that was used."""

    def __init__(self, documents: grain.DatasetIterator, length: int) -> None:
        super().__init__(documents)
        self._documents, self._length = documents, length
        self._before: dict[str, Any] = documents.get_state()
        self._left, self._used = np.zeros(0, np.int32), 0

    def __next__(self) -> dict[str, np.ndarray]:
        pieces: list[np.ndarray] = []
        missing = self._length
        while missing:
            if not len(self._left):
                self._before = self._documents.get_state()
                self._left, self._used = next(self._documents), 0
            piece, self._left = self._left[:missing], self._left[missing:]
            self._used += len(piece)
            missing -= len(piece)
            if len(piece):
                pieces.append(piece)
        return {
            "tokens": np.concatenate(pieces),
            "segments": np.concatenate([np.full(len(piece), i, np.int32) for i, piece in enumerate(pieces, 1)]),
            "positions": np.concatenate([np.arange(len(piece), dtype=np.int32) for piece in pieces]),
        }

    def get_state(self) -> dict[str, Any]:
        return {"documents": self._before, "used": self._used}

    def set_state(self, state: dict[str, Any]) -> None:
        self._documents.set_state(state["documents"])
        self._before, self._used = state["documents"], state["used"]
        self._left = next(self._documents)[self._used :] if self._used else np.zeros(0, np.int32)

    def __str__(self) -> str:
        return f"PackedRows(length={self._length})"
