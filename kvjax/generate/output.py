"""What a call gives back."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Stats:
    """What a call cost.

    Attributes:
      kv_bytes_per_token: bytes one held token takes, over all layers and heads, scales included.
      context_bytes_per_token: bytes one token of the encoded contexts takes, for all layers together; 0: none is held.
      pool_bytes: bytes of the page pools. pages_total: pages in them.
      peak_pages: most pages in use at once. shared_pages: most pages held by more than one sequence at once.
      copied_pages: pages copied because a sequence wrote to a shared one.
      prefill_seconds, decode_seconds: wall time, waiting for the device included.
      tokens_per_second: generated tokens over decode_seconds, all sequences together.
      compiles: programs compiled during the call.
    """

    kv_bytes_per_token: int = 0
    context_bytes_per_token: int = 0
    pool_bytes: int = 0
    pages_total: int = 0
    peak_pages: int = 0
    shared_pages: int = 0
    copied_pages: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    tokens_per_second: float = 0.0
    compiles: int = 0


@dataclasses.dataclass(frozen=True)
class GenerateOutput:
    """Generated sequences, prompt-major: sample j of prompt i is entry i * n + j.

    Attributes:
      tokens: generated token ids, the stop token included.
      text: the same as text, without what stopped it; None for a model without tokenizer.
      logprobs: log-probability of each token under the model's own logits, before any sampling setting.
      finish_reason: "length", "stop", or in `OutOfPages.partial` "out_of_pages" for what was cut off.
      stats: what the call cost.
    """

    tokens: list[list[int]]
    text: list[str] | None
    logprobs: list[list[float]]
    finish_reason: list[str]
    stats: Stats
