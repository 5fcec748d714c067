"""Every exception that kvjax raises on purpose.

Each message names what was given, what is allowed and what to do about it.
"""

from __future__ import annotations

from typing import Any


class KvjaxError(Exception):
    """Base of all errors below, so that one `except` catches them."""


class ConfigError(KvjaxError, ValueError):
    """A configuration that means nothing, or two choices that cannot combine."""


class CheckpointError(KvjaxError):
    """A checkpoint that is missing, damaged, of an unknown kind, or not of the shape its config promises."""


class TrainingError(KvjaxError):
    """Training that cannot go on: a loss that is not finite, or batches that ended before the steps did."""


class RequestError(KvjaxError, ValueError):
    """A request that cannot be served: an empty prompt, token ids outside the vocabulary, a negative length."""


class OutOfPages(KvjaxError, MemoryError):
    """The page pool is too small for what was asked.

    Attributes:
      needed: pages the next step would have taken from the pool.
      available: pages that were free.
      partial: what was generated before the pool ran out (a `GenerateOutput`), or None if nothing was.
      state: the live `State`, whole and usable, where the call had consumed one; else None.
    """

    def __init__(self, message: str, *, needed: int = 0, available: int = 0, partial: Any = None):
        super().__init__(message)
        self.needed = needed
        self.available = available
        self.partial = partial
        self.state: Any = None
