"""LM-Infinite: the first tokens seen from a bounded distance, and the last ones (Han et al. 2023, 2308.16137)."""

from __future__ import annotations

import dataclasses

from kvjax.cache.policies.protocol import Read
from kvjax.cache.policies.streaming_llm import StreamingLLM
from kvjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class LMInfinite(StreamingLLM):
    """Keeps the first `sinks` and the last `window` tokens, the current one included, at distances of at most `window`.

    Token i sees j if j > i - window or j < sinks, as if it stood min(i - j, window) ahead of it (section 4, without the
    middle tokens). What is held, and where, is StreamingLLM's: sinks in slots 0 .. sinks-1, the rest in a ring behind
    them, one row for all layers and heads. Two partial results: the window by the query where it is, and each sink by
    the query turned to at most `window` ahead of it, which is the same number as a query at `window` and a key at 0.
    """

    sinks: int = 10
    window: int = 4096

    def reads(self, window: int | None) -> tuple[Read, ...]:
        """The sinks from at most `window` away, and the window from where it is."""
        farthest = self.window - (not self.sinks)
        if window is not None and farthest >= window:
            raise ConfigError(
                f"{self!r} sees tokens {farthest} positions back, but this model's layer only sees {window - 1} "
                f"positions back; choose window <= {window - bool(self.sinks)}"
            )
        recent = Read(first=self.sinks, window=self.window)
        if not self.sinks:
            return (recent,)
        return (Read(last=self.sinks, lag=self.window, slots=self.sinks), recent)
