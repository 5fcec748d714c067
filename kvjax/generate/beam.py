"""Beam search over the paged cache: beams are forks of one prompt, reordered and copied on write inside the scan."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.attention.paged import PagedAttend
from kvjax.cache.config import CacheConfig
from kvjax.cache.pages import Shortage, reserve, take
from kvjax.cache.size import power_of_two
from kvjax.cache.state import Cache
from kvjax.config import ModelConfig, Sampling
from kvjax.generate import beam_math
from kvjax.generate.beam_math import BeamState, Hypotheses
from kvjax.generate.compiles import compiled_programs
from kvjax.generate.contexts import Chunks
from kvjax.generate.forward import forward_token, logits_of
from kvjax.generate.output import GenerateOutput
from kvjax.generate.requests import stop_token_ids
from kvjax.generate.run import BLOCK_STEPS, output_of
from kvjax.generate.sampling import (
    LogitsProcessor,
    ProcessorContext,
    SamplingKind,
    check_finite,
    kind_of,
    make_state,
    penalise,
)
from kvjax.generate.state import out_of_pages, repeat, start
from kvjax.model import Model
from kvjax.typing import Params


@functools.partial(jax.jit, static_argnames=("config", "kind"), donate_argnames="beams")
def first_beams(
    params: Params,
    hidden: jax.Array,
    beams: BeamState,
    seen: jax.Array,
    presence: jax.Array | None,
    penalty: jax.Array,
    numbers: tuple[jax.Array, jax.Array, jax.Array],
    *,
    config: ModelConfig,
    kind: SamplingKind,
) -> tuple[BeamState, jax.Array, jax.Array | None]:
    """The first step, from the last hidden states of the prompts [B * k, hidden], all beams of a prompt alike.

    Returns the search, the beams' newest tokens int32[B * k] and the tokens present.
    """
    token = jnp.zeros(hidden.shape[0], jnp.int32)
    logits = logits_of(params, hidden, config)
    _, token, beams, presence = _advance(beams, logits, token, seen, presence, penalty, numbers, kind)
    return beams, token, presence


@functools.partial(
    jax.jit, static_argnames=("config", "attend", "kind", "steps"), donate_argnames=("cache", "beams", "presence")
)
def beam_block(
    params: Params,
    cache: Cache,
    beams: BeamState,
    token: jax.Array,
    presence: jax.Array | None,
    penalty: jax.Array,
    numbers: tuple[jax.Array, jax.Array, jax.Array],
    *,
    config: ModelConfig,
    attend: PagedAttend,
    kind: SamplingKind,
    steps: int,
) -> tuple[Cache, BeamState, jax.Array, jax.Array | None, Shortage]:
    """Up to `steps` steps for every prompt that is not done; pages are reserved step by step, as beams diverge.

    From the first shortage on nothing changes any more.
    """
    groups = len(cache.groups)
    none = Shortage(jnp.zeros(groups, jnp.int32), jnp.zeros(groups, jnp.int32))

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        cache, beams, token, presence, shortage = carry
        width = beams.running.scores.shape[1]
        active = jnp.repeat(~beams.done, width) & ~shortage.any
        cache, short = reserve(cache, active.astype(jnp.int32))
        active = active & ~short.any
        shortage = jax.tree.map(lambda old, new: jnp.where(shortage.any, old, new), shortage, short)
        hidden, cache = forward_token(params, cache, token, active, config=config, attend=attend)
        logits = logits_of(params, hidden, config)
        # A prompt that must not move is shown as done for this step.
        frozen = beams._replace(done=beams.done | shortage.any)
        parents, new_token, moved, presence = _advance(
            frozen, logits, token, cache.seen, presence, penalty, numbers, kind
        )
        beams = moved._replace(done=jnp.where(shortage.any, beams.done, moved.done))
        return (take(cache, parents), beams, jnp.where(active, new_token, token), presence, shortage), None

    carry, _ = jax.lax.scan(step, (cache, beams, token, presence, none), None, length=steps)
    return carry


def _advance(
    beams: BeamState,
    logits: jax.Array,
    token: jax.Array,
    position: jax.Array,
    presence: jax.Array | None,
    penalty: jax.Array,
    numbers: tuple[jax.Array, jax.Array, jax.Array],
    kind: SamplingKind,
) -> tuple[jax.Array, jax.Array, BeamState, jax.Array | None]:
    """Ranks continuations. Returns the rows to continue int32[B * k], their tokens, the search, the tokens present."""
    stop_tokens, length_penalty, max_new_tokens = numbers
    prompts, width = beams.running.scores.shape
    plain = jax.nn.log_softmax(logits, axis=-1)
    adjusted = plain
    if kind.penalised:
        assert presence is not None
        adjusted = penalise(adjusted, presence, penalty)
    context = ProcessorContext(beams.running.lengths.reshape(-1), position, token)
    for processor in kind.processors:
        adjusted = processor(adjusted, context)
    shape = (prompts, width, -1)
    parents, tokens, beams = beam_math.advance(
        beams, adjusted.reshape(shape), stop_tokens, length_penalty, max_new_tokens, reported=plain.reshape(shape)
    )
    rows = (jnp.arange(prompts)[:, None] * width + parents).reshape(-1)
    tokens = tokens.reshape(-1)
    if presence is not None:
        presence = presence[rows].at[jnp.arange(rows.size), tokens].set(True)
    return rows, tokens, beams, presence


def beam_search(
    model: Model,
    prompts: list[list[int]],
    max_new_tokens: int,
    cache: CacheConfig,
    sampling: Sampling,
    processors: Sequence[LogitsProcessor] = (),
    *,
    chunk: int | None = None,
    backend: str | None = None,
    context: int | None = None,
    chunks: Chunks | None = None,
) -> GenerateOutput:
    """The sampling.n best of sampling.beams hypotheses of each prompt; see `beam_math` for the rules.

    Raises:
      OutOfPages: `partial` holds the best texts up to then.
    """
    begun, compiles = time.perf_counter(), compiled_programs()
    width = sampling.beams
    padded = power_of_two(len(prompts))
    state = start(
        model,
        prompts,
        cache,
        copies=width,
        room=max_new_tokens,
        context=context,
        chunk=chunk,
        backend=backend,
        chunks=chunks,
    )
    parents = np.where(np.arange(padded) < len(prompts), np.arange(padded), -1)
    held, last = repeat(state, np.repeat(parents, width))
    jax.block_until_ready(last)
    prefill_seconds = time.perf_counter() - begun

    begun = time.perf_counter()
    kind = kind_of(sampling, processors)
    stop_tokens = stop_token_ids(model, sampling)
    ends = set(stop_tokens.tolist()) - {-1}
    # Every stop token costs candidates, so padding that only spares compilations is left out.
    numbers = (
        np.asarray(sorted(ends), np.int32),
        np.float32(sampling.length_penalty),
        np.int32(max_new_tokens),
    )
    rows = padded * width
    numbered = make_state(
        _one_each(sampling),
        [0] * len(prompts) * width,
        [p for p in prompts for _ in range(width)],
        model.config.vocab_size,
        rows,
    )
    presence, penalty = numbered.presence, np.full(rows, sampling.repetition_penalty, np.float32)
    beams = _init(padded, width, power_of_two(max(max_new_tokens, BLOCK_STEPS)), len(prompts))
    beams, token, presence = first_beams(
        model.params, last, beams, held.seen, presence, penalty, numbers, config=model.config, kind=kind
    )
    raised = None
    while raised is None and not np.asarray(beams.done).all():
        held, beams, token, presence, shortage = beam_block(
            model.params,
            held,
            beams,
            token,
            presence,
            penalty,
            numbers,
            config=model.config,
            attend=PagedAttend(backend, copies=width),
            kind=kind,
            steps=BLOCK_STEPS,
        )
        raised = out_of_pages(shortage, held, "the next tokens of the beams")
    best = jax.device_get(_finalise(beams, sampling.n, numbers[1]))
    output = _output(model, best, len(prompts), ends, held, prefill_seconds, begun, compiles, cut=raised is not None)
    if raised is not None:
        raised.partial = output
        raise raised
    return output


def _output(
    model: Model,
    best: Hypotheses,
    prompts: int,
    ends: set[int],
    cache: Cache,
    prefill_seconds: float,
    begun: float,
    compiles: int,
    cut: bool,
) -> GenerateOutput:
    tokens, logprobs, reasons = [], [], []
    for prompt in range(prompts):
        for place in range(best.scores.shape[1]):
            length = best.lengths[prompt, place]
            text = best.tokens[prompt, place, :length].tolist()
            tokens.append(text)
            logprobs.append(best.logprobs[prompt, place, :length].tolist())
            stopped = bool(text) and text[-1] in ends
            reasons.append("stop" if stopped else "out_of_pages" if cut else "length")
    check_finite(np.where(np.isnan(best.scores[:prompts]), np.nan, 0.0).reshape(-1, 1))
    texts = None
    if model.tokenizer is not None:
        bare = [t[:-1] if r == "stop" else t for t, r in zip(tokens, reasons, strict=True)]
        texts = [model.tokenizer.decode(t) for t in bare]
    return output_of(cache, tokens, texts, logprobs, reasons, prefill_seconds, time.perf_counter() - begun, compiles)


def _one_each(sampling: Sampling) -> Sampling:
    """Only the settings that make a row's state: a penalty."""
    return Sampling(repetition_penalty=sampling.repetition_penalty)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _init(prompts: int, beams: int, length: int, real: jax.Array) -> BeamState:
    state = beam_math.init(prompts, beams, length)
    return state._replace(done=jnp.arange(prompts) >= real)


_finalise = jax.jit(beam_math.finalise, static_argnums=1)
