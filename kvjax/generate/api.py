"""The public calls: generate, stream, prefill, extend, fork, score."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from kvjax.cache.config import CacheConfig
from kvjax.config import Sampling
from kvjax.errors import RequestError
from kvjax.generate import run as running
from kvjax.generate.compiles import compiled_programs
from kvjax.generate.contexts import Contexts, encode_contexts
from kvjax.generate.live import check_fits, check_live
from kvjax.generate.output import GenerateOutput
from kvjax.generate.requests import (
    Prompts,
    check_new_tokens,
    encode_prompt,
    encode_prompts,
    seeds_of,
    stop_token_ids,
)
from kvjax.generate.sampling import LogitsProcessor, kind_of
from kvjax.generate.state import State, append, multiply, start
from kvjax.model import Model


def generate(
    model: Model,
    prompts: Prompts,
    max_new_tokens: int = 64,
    cache: CacheConfig = CacheConfig(),
    sampling: Sampling = Sampling(),
    seed: int = 0,
    logit_processors: Sequence[LogitsProcessor] = (),
    *,
    prefill_chunk: int | None = None,
    backend: str | None = None,
    context: int | None = None,
    contexts: Contexts | None = None,
) -> GenerateOutput:
    """Continues prompts.

    Args:
      prompts: list of texts or of token-id lists, of any lengths.
      max_new_tokens: tokens to generate at most, per sequence.
      cache: how keys and values are kept.
      sampling: how tokens are drawn; sampling.n continuations of each prompt share its pages, sampling.beams searches.
      seed: with the prompt's place it seeds each prompt, unless sampling.seeds does.
      logit_processors: pure functions (logits float32[B, V], ProcessorContext) -> float32[B, V], run after the
        repetition penalty and before the temperature; hashable, since they are compiled in.
      prefill_chunk: tokens per prefill chunk; None: 64 on CPU, 256 on accelerators.
      backend: attention kernel; None: the best that can serve.
      context: size tables and pools for sequences of this many tokens instead of what the call needs.
      contexts: for a model with an encoder, the chunks of context of each prompt, texts or token-id lists of at most
        `ModelConfig.context_chunk` tokens, which it reads beside the prompt in any order; None: a prompt without.

    Returns:
      Tokens, text, log-probabilities and statistics, prompt-major where sampling.n > 1.

    Raises:
      RequestError: an empty prompt, ids outside the vocabulary, max_new_tokens < 1, contexts the model cannot read.
      OutOfPages: the pool is too small; `partial` holds what was generated for every request.
    """
    begun, compiles = time.perf_counter(), compiled_programs()
    requests = encode_prompts(model, prompts)
    chunks = encode_contexts(model, contexts, len(requests))
    max_new_tokens = check_new_tokens(max_new_tokens)
    seeds = seeds_of(sampling, seed, len(requests))
    _check_sampling(model, sampling, logit_processors)
    if sampling.beams > 1:
        from kvjax.generate.beam import beam_search

        return beam_search(
            model,
            requests,
            max_new_tokens,
            cache,
            sampling,
            logit_processors,
            chunk=prefill_chunk,
            backend=backend,
            context=context,
            chunks=chunks,
        )
    state = start(
        model,
        requests,
        cache,
        copies=sampling.n,
        room=max_new_tokens,
        context=context,
        chunk=prefill_chunk,
        backend=backend,
        chunks=chunks,
    )
    state = multiply(state, sampling.n)
    jax.block_until_ready(state.last)
    run = running.begin(
        model,
        state,
        max_new_tokens,
        sampling,
        prefill_seconds=time.perf_counter() - begun,
        compiles_before=compiles,
    )
    for _ in running.blocks(run, max_new_tokens, sampling, seeds, requests, logit_processors, backend=backend):
        pass
    return run.output()


def stream(
    model: Model,
    prompt: str | Sequence[int],
    max_new_tokens: int = 64,
    cache: CacheConfig = CacheConfig(),
    sampling: Sampling = Sampling(),
    seed: int = 0,
    logit_processors: Sequence[LogitsProcessor] = (),
    *,
    block_steps: int = 4,
    prefill_chunk: int | None = None,
    backend: str | None = None,
    contexts: Contexts | None = None,
) -> Stream:
    """Continues one prompt, giving text as it comes (token ids for a model without tokenizer).

    Args:
      block_steps: tokens generated between two looks of the host; fewer give smoother text, more give speed.

    The other arguments and errors are those of `generate`; sampling.n and sampling.beams must be 1. Requests are
    checked at once, generation begins with the first `next`.
    """
    if sampling.n > 1 or sampling.beams > 1:
        raise RequestError(f"stream gives one text; set n=1 and beams=1, got n={sampling.n}, beams={sampling.beams}")
    request = encode_prompt(model, prompt)
    chunks = encode_contexts(model, contexts, 1)
    max_new_tokens = check_new_tokens(max_new_tokens)
    seeds = seeds_of(sampling, seed, 1)
    _check_sampling(model, sampling, logit_processors)

    def runs() -> Iterator[running.Run]:
        begun, compiles = time.perf_counter(), compiled_programs()
        state = start(model, [request], cache, room=max_new_tokens, chunk=prefill_chunk, backend=backend, chunks=chunks)
        jax.block_until_ready(state.last)
        run = running.begin(
            model,
            state,
            max_new_tokens,
            sampling,
            prefill_seconds=time.perf_counter() - begun,
            compiles_before=compiles,
        )
        yield from running.blocks(
            run,
            max_new_tokens,
            sampling,
            seeds,
            [request],
            logit_processors,
            steps=block_steps,
            backend=backend,
        )

    return Stream(runs(), text=model.tokenizer is not None)


class Stream:
    """An iterator over pieces of text, or over token ids. After the last, `output` holds the whole, with statistics."""

    def __init__(self, runs: Iterator[running.Run], text: bool):
        self.output: GenerateOutput | None = None
        self._pieces = self._iterate(runs, text)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._pieces)

    def _iterate(self, runs: Iterator[running.Run], text: bool) -> Iterator[Any]:
        given = 0
        for run in runs:
            transcript = run.transcripts[0]
            if transcript.reason is not None:
                self.output = run.output()
            if text:
                if piece := transcript.take_text():
                    yield piece
            else:
                yield from transcript.tokens[given:]
                given = len(transcript.tokens)


def prefill(
    model: Model,
    prompts: Prompts,
    cache: CacheConfig = CacheConfig(),
    *,
    room: int = 0,
    prefill_chunk: int | None = None,
    backend: str | None = None,
    contexts: Contexts | None = None,
) -> State:
    """Puts prompts into a fresh cache and stops there.

    Args:
      room: tokens per sequence to make room for beyond the prompts. A cache whose size is not fixed grows when it must,
        at the price of one copy and one compilation.
      contexts: as in `generate`; later turns (`extend`) read them too.

    Returns:
      A `State` for `extend` and `fork`.
    """
    requests = encode_prompts(model, prompts)
    chunks = encode_contexts(model, contexts, len(requests))
    return start(model, requests, cache, room=room, chunk=prefill_chunk, backend=backend, chunks=chunks)


def extend(
    model: Model,
    state: State,
    prompts: Prompts | None = None,
    max_new_tokens: int = 64,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    logit_processors: Sequence[LogitsProcessor] = (),
    *,
    prefill_chunk: int | None = None,
    backend: str | None = None,
) -> tuple[GenerateOutput, State]:
    """Another turn over a live cache: adds a prompt to every sequence, if given, and continues.

    The state given is consumed; go on with the one returned, or on `OutOfPages` with the exception's `state`.
    sampling.n must be 1 (`fork` the state instead), and so must sampling.beams.

    Raises:
      RequestError: as `generate`, or the state was consumed before, or is one of a model of other shapes.
      OutOfPages: as `generate`.
    """
    begun, compiles = time.perf_counter(), compiled_programs()
    check_live(state)
    check_fits(model, state)
    if sampling.n > 1 or sampling.beams > 1:
        raise RequestError(
            f"extend continues each sequence once; kvjax.fork the state for more, got n={sampling.n}, "
            f"beams={sampling.beams}"
        )
    max_new_tokens = check_new_tokens(max_new_tokens)
    # A turn draws other noise than the turn before it.
    seeds = [(s + sum(map(len, state.tokens))) % 2**32 for s in seeds_of(sampling, seed, state.batch)]
    _check_sampling(model, sampling, logit_processors)
    if prompts is not None:
        requests = encode_prompts(model, prompts)
        state = append(model, state, requests, room=max_new_tokens, chunk=prefill_chunk, backend=backend)
    history = state.tokens
    run = running.begin(
        model,
        state,
        max_new_tokens,
        sampling,
        prefill_seconds=time.perf_counter() - begun,
        compiles_before=compiles,
    )
    # A stop string ends a text in the middle of a block: one step at a time leaves nothing behind it in the cache.
    steps = 1 if sampling.stop else running.BLOCK_STEPS
    for _ in running.blocks(
        run, max_new_tokens, sampling, seeds, history, logit_processors, steps=steps, backend=backend
    ):
        pass
    return run.output(), run.state


def fork(state: State, n: int) -> State:
    """Every sequence n times, side by side, their pages shared until one of them writes. Consumes the state.

    The copies go on like separate runs, whatever the policy, codec and select: a page is copied when one of its holders
    is about to write to it, and what lies beside the pages is each sequence's own. The fork itself moves no page and
    takes none. It shares its pools with the state given: the first call that extends either of the two ends the other,
    so ask for one copy more to keep the original, or `save_state` it.

    Raises:
      RequestError: n is no integer of at least 1, or the state was consumed before.
    """
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
        raise RequestError(f"fork needs an integer n of at least 1, got {n!r}")
    check_live(state)
    return multiply(state, int(n))


def _check_sampling(model: Model, sampling: Sampling, processors: Sequence[LogitsProcessor]) -> None:
    """Refuses what decoding would refuse, before a state is consumed."""
    stop_token_ids(model, sampling)
    kind_of(sampling, processors)
    if sampling.stop and model.tokenizer is None:
        raise RequestError("Sampling.stop needs a tokenizer; use stop_tokens with a model that has none")
