"""Questions through a live cache: the prompt as `generate` takes it, then one token a step, and what that cost."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from kvjax.attention.paged import PagedAttend
from kvjax.cache.config import CacheConfig
from kvjax.cache.state import Cache
from kvjax.evaluate.memory import Footprint, footprint_of
from kvjax.evaluate.tasks import Question
from kvjax.generate.compiles import compiled_programs
from kvjax.generate.decode import forced_block
from kvjax.generate.forward import head
from kvjax.generate.run import BLOCK_STEPS
from kvjax.generate.state import out_of_pages, start
from kvjax.model import Model


@dataclasses.dataclass
class Cost:
    """What a run has cost so far. Times leave out every call during which something compiled.

    Attributes:
      prefill_tokens, prefill_seconds; decode_tokens, decode_seconds: tokens of all sequences, and their time.
      footprint: of the cache after its last batch.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    footprint: Footprint | None = None


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some logits of a batch of questions.

    Attributes:
      first: index of the batch's first question; count: how many of its rows are questions, the others repeat one.
      start: logits[:, i] predict token start + i of the continuations.
      logits: float32[B, n, V]; meaningless behind a continuation's end.
    """

    first: int
    count: int
    start: int
    logits: jax.Array


def forced_logits(
    model: Model, questions: Sequence[Question], cache: CacheConfig, cost: Cost, *, batch: int, context: int
) -> Iterator[Piece]:
    """Runs questions through a cache, `batch` at a time, and gives their logits as they come.

    All batches have the same shapes, so that a cache compiles once for all tasks: a last, short one is filled up.

    Args:
      cost: counted up as the run goes on.
      context: tokens per sequence that tables and pools are made for, as in `kvjax.generate`.

    Raises:
      OutOfPages: a pool of fixed size is too small.
    """
    for first in range(0, len(questions), batch):
        some = list(questions[first : first + batch])
        count = len(some)
        some += [some[0]] * (batch - count)
        state, last = _prompts(model, some, cache, cost, context)
        yield Piece(first, count, 0, last)
        held = state
        longest = max(len(question.continuation) for question in some)
        for begin in range(0, longest - 1, BLOCK_STEPS):
            held, logits = _steps(model, held, some, begin, cost)
            yield Piece(first, count, begin + 1, logits)
        cost.footprint = footprint_of(held, batch)


def _prompts(
    model: Model, questions: Sequence[Question], cache: CacheConfig, cost: Cost, context: int
) -> tuple[Cache, jax.Array]:
    """The prompts in a fresh cache, and the logits float32[B, 1, V] after them."""
    compiles, begun = compiled_programs(), time.perf_counter()
    # A short prompt may have the longest continuation: rows need no room for the longest of each together, which would
    # round up to shapes of their own.
    longest = max(len(question.prompt) + len(question.continuation) for question in questions)
    room = longest - max(len(question.prompt) for question in questions)
    state = start(model, [list(question.prompt) for question in questions], cache, room=room, context=context)
    assert state.last is not None
    logits = head(model.params, state.last, config=model.config)[: len(questions), None]
    jax.block_until_ready((logits, state.cache))
    if compiled_programs() == compiles:
        cost.prefill_seconds += time.perf_counter() - begun
        cost.prefill_tokens += sum(len(question.prompt) for question in questions)
    return state.cache, logits


def _steps(model: Model, held: Cache, questions: Sequence[Question], begin: int, cost: Cost) -> tuple[Cache, jax.Array]:
    """Feeds continuation tokens begin, begin + 1, ...: the cache, consumed and renewed, and what follows each."""
    tokens = np.zeros((held.batch, BLOCK_STEPS), np.int32)
    counts = np.zeros(held.batch, np.int32)
    for row, question in enumerate(questions):
        # What follows the last token is not asked.
        piece = question.continuation[begin : min(begin + BLOCK_STEPS, len(question.continuation) - 1)]
        tokens[row, : len(piece)] = piece
        counts[row] = len(piece)
    compiles, begun = compiled_programs(), time.perf_counter()
    held, logits, shortage = forced_block(model.params, held, tokens, counts, config=model.config, attend=PagedAttend())
    if raised := out_of_pages(shortage, held, "the continuations"):
        raise raised
    jax.block_until_ready((logits, held))
    if compiled_programs() == compiles:
        cost.decode_seconds += time.perf_counter() - begun
        cost.decode_tokens += int(counts.sum())
    return held, logits[: len(questions)]
