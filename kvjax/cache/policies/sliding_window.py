"""SlidingWindow: the last tokens only (Longformer, Beltagy et al. 2020, 2004.05150)."""

from __future__ import annotations

import dataclasses

from kvjax.cache.policies.protocol import Read, smallest_of
from kvjax.cache.policies.streaming_llm import StreamingLLM


@dataclasses.dataclass(frozen=True, init=False)
class SlidingWindow(StreamingLLM):
    """Token i sees tokens i - window + 1 .. i, and no others are held: a ring of `window` slots.

    A ring without sinks: everything but the model's own window is StreamingLLM's.
    """

    def __init__(self, window: int):
        super().__init__(0, window)

    def __repr__(self) -> str:
        return f"SlidingWindow(window={self.window})"

    def reads(self, window: int | None) -> tuple[Read, ...]:
        """Whichever window is narrower, this one or the model's own."""
        return (Read(window=smallest_of(self.window, window)),)
