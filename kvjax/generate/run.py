"""The host side of decoding: blocks of steps until every sequence has ended."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from kvjax.attention.paged import PagedAttend
from kvjax.cache.state import Cache
from kvjax.config import Sampling
from kvjax.generate.compiles import compiled_programs
from kvjax.generate.decode import NO_TOKEN, Loop, decode_block, first_token
from kvjax.generate.output import GenerateOutput, Stats
from kvjax.generate.requests import stop_token_ids
from kvjax.generate.sampling import LogitsProcessor, check_finite, kind_of, make_state
from kvjax.generate.state import State, make_room, out_of_pages
from kvjax.generate.stopping import StopStrings, TextStream, truncate_tokens
from kvjax.model import Model

BLOCK_STEPS = 16
"""Steps per compiled block: between blocks the host sees tokens, ends sequences and may stop early."""


class Transcript:
    """What one sequence has produced so far, and whether and why it has ended."""

    def __init__(self, stop: tuple[str, ...], tokenizer: Any, stop_tokens: frozenset[int], limit: int):
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.surplus: list[int] = []
        self.reason: str | None = None
        self.pieces: list[str] = []
        self._given = 0
        self._stop_tokens = stop_tokens
        self._limit = limit
        self._text = TextStream(tokenizer) if tokenizer is not None else None
        self._tokenizer, self._strings = tokenizer, stop
        self._stop = StopStrings(stop)

    def add(self, token: int, logprob: float) -> None:
        """Takes in a token; afterwards `reason` says whether it was the last."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in self._stop_tokens:
            self._finish("stop")
            return
        if self._text is not None:
            self._emit(self._stop.push(self._text.push([token])))
            if self._stop.found is not None:
                self._cut()
                return
        if len(self.tokens) >= self._limit:
            self._finish("length")

    def close(self) -> None:
        """Ends what is unfinished because the pool was full."""
        if self.reason is None:
            self._finish("out_of_pages")

    def take_text(self) -> str:
        """The text that became certain since the last call."""
        text = "".join(self.pieces[self._given :])
        self._given = len(self.pieces)
        return text

    def _cut(self) -> None:
        """Ends at the token that completed a stop string: its text may have become certain only some tokens later.

        These are no part of the output, but the cache has them.
        """
        self.reason = "stop"
        count = len(truncate_tokens(self.tokens, self._tokenizer, self._strings).tokens)
        self.surplus = self.tokens[count:]
        del self.tokens[count:], self.logprobs[count:]

    def _emit(self, text: str) -> None:
        if text:
            self.pieces.append(text)

    def _finish(self, reason: str) -> None:
        self.reason = reason
        if self._text is not None:
            self._emit(self._stop.push(self._text.finish()))
            if self._stop.found is not None:
                self._cut()
            else:
                self._emit(self._stop.finish())


@dataclasses.dataclass
class Run:
    """One call's decoding, as it goes on: iterating over `blocks` advances it."""

    model: Model
    state: State
    transcripts: list[Transcript]
    prefill_seconds: float
    decode_seconds: float = 0.0
    compiles_before: int = 0

    def output(self) -> GenerateOutput:
        """What has been generated up to now."""
        return output_of(
            self.state.cache,
            [transcript.tokens for transcript in self.transcripts],
            None if self.model.tokenizer is None else ["".join(t.pieces) for t in self.transcripts],
            [transcript.logprobs for transcript in self.transcripts],
            [transcript.reason or "length" for transcript in self.transcripts],
            self.prefill_seconds,
            self.decode_seconds,
            self.compiles_before,
        )


def output_of(
    cache: Cache,
    tokens: list[list[int]],
    text: list[str] | None,
    logprobs: list[list[float]],
    reasons: list[str],
    prefill_seconds: float,
    decode_seconds: float,
    compiles_before: int,
) -> GenerateOutput:
    """The output of a call, with what its cache knows of costs."""
    stats = dataclasses.replace(
        cache_stats(cache),
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
        tokens_per_second=sum(map(len, tokens)) / decode_seconds if decode_seconds else 0.0,
        compiles=compiled_programs() - compiles_before,
    )
    return GenerateOutput(tokens, text, logprobs, reasons, stats)


def cache_stats(cache: Cache) -> Stats:
    """The part of `Stats` that the cache knows."""
    counters = jax.device_get([(g.peak, g.shared, g.copied) for g in (*cache.groups, *cache.context)])
    peak, shared, copied = (int(sum(values)) for values in zip(*counters, strict=True))
    return Stats(
        kv_bytes_per_token=sum(group.layout.bytes_per_token for group in cache.groups),
        context_bytes_per_token=sum(group.layout.bytes_per_token for group in cache.context),
        pool_bytes=cache.pool_bytes,
        pages_total=sum(group.num_pages for group in (*cache.groups, *cache.context)),
        peak_pages=peak,
        shared_pages=shared,
        copied_pages=copied,
    )


def begin(
    model: Model,
    state: State,
    max_new_tokens: int,
    sampling: Sampling,
    *,
    prefill_seconds: float,
    compiles_before: int,
) -> Run:
    """A run about to generate from a state."""
    ends = frozenset(stop_token_ids(model, sampling).tolist()) - {-1}
    transcripts = [Transcript(sampling.stop, model.tokenizer, ends, max_new_tokens) for _ in state.tokens]
    return Run(model, state, transcripts, prefill_seconds, compiles_before=compiles_before)


def blocks(
    run: Run,
    max_new_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int],
    prompts: Sequence[Sequence[int]],
    processors: Sequence[LogitsProcessor] = (),
    *,
    steps: int = BLOCK_STEPS,
    backend: str | None = None,
) -> Iterator[Run]:
    """Decodes block by block, yielding the run after each, until every sequence has ended.

    Args:
      seeds, prompts: one per group of `sampling.n` sequences.

    Raises:
      OutOfPages: the pool is full; `partial` holds what every sequence has so far, `state` the live state.
      KvjaxError: the logits were not finite.
    """
    model, begun = run.model, time.perf_counter()
    state = make_room(run.state, max_new_tokens)
    cache, batch = state.cache, state.cache.batch
    kind = kind_of(sampling, processors)
    stop_tokens = stop_token_ids(model, sampling)
    newest = np.zeros(batch, np.int32)
    newest[: state.batch] = [tokens[-1] for tokens in state.tokens]
    loop = Loop(
        token=newest,
        done=np.arange(batch) >= state.batch,
        count=np.zeros(batch, np.int32),
        limit=np.full(batch, max_new_tokens, np.int32),
        sampling=make_state(sampling, seeds, prompts, model.config.vocab_size, batch),
    )
    halt = np.zeros(batch, bool)

    def absorb(tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Hands a block's tokens to the transcripts and notes who has ended."""
        for index, transcript in enumerate(run.transcripts):
            for token, logprob in zip(tokens[:, index], logprobs[:, index], strict=True):
                if token != NO_TOKEN and transcript.reason is None:
                    transcript.add(int(token), float(logprob))
            halt[index] = transcript.reason is not None
        history = (
            (*held, *transcript.tokens, *transcript.surplus)
            for held, transcript in zip(state.tokens, run.transcripts, strict=True)
        )
        # Unless it has just been drawn from a prompt and generation goes on, the newest token is pending.
        run.state = dataclasses.replace(state, cache=cache, tokens=tuple(history), last=None, pending=1)
        run.decode_seconds = time.perf_counter() - begun
        check_finite([transcript.logprobs for transcript in run.transcripts])

    if state.last is not None:
        loop, tokens, logprobs = first_token(
            model.params, state.last, loop, cache.seen, stop_tokens, config=model.config, kind=kind
        )
        absorb(np.asarray(tokens), np.asarray(logprobs))
        yield run
    allowed = steps
    while not halt[: state.batch].all():
        cache, loop, block = decode_block(
            model.params,
            cache,
            loop,
            halt,
            stop_tokens,
            np.int32(allowed),
            config=model.config,
            attend=PagedAttend(backend, copies=state.copies),
            kind=kind,
            steps=steps,
        )
        absorb(np.asarray(block.tokens), np.asarray(block.logprobs))
        if raised := out_of_pages(block.shortage, cache, f"the next {allowed} tokens"):
            if allowed > 1:
                allowed //= 2  # what room there is can still be used
                continue
            for transcript in run.transcripts:
                transcript.close()
            raised.partial, raised.state = run.output(), run.state
            raise raised
        yield run
