"""Beam search as pure functions of scores: no model, no cache.

Each step ranks all continuations of a prompt's beams. Those that end a text compete, by length-normalised score, for a
place among the finished hypotheses; the best of the others are the next beams. The rules, ties apart, are those of
`transformers.generate(num_beams=k, do_sample=False, early_stopping=False)`, so that both give the same texts:

- only a continuation among the k best of its step can become a hypothesis;
- a hypothesis scores the sum of its tokens' log-probabilities / its length ** length_penalty (Wu et al. 2016,
  1609.08144, section 7, with this simpler normalisation), its end token counted;
- a prompt is done when it has k hypotheses and its best beam, normalised at its present length, is no better than the
  worst of them; at the length limit, whatever is left competes as it stands.

L is the length of the token buffers, at least the number of tokens generated; k is beams per prompt.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Hypotheses(NamedTuple):
    """Sets of generated texts, one set per prompt.

    Attributes:
      scores: float32[B, k]; -inf: the place is empty.
      tokens: int32[B, k, L], -1 beyond a text's length.
      logprobs: float32[B, k, L], the model's log-probability of each token, 0 beyond.
      lengths: int32[B, k].
    """

    scores: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    lengths: jax.Array


class BeamState(NamedTuple):
    """What beam search carries from step to step.

    Attributes:
      running: the beams, best first; scores are plain sums of log-probabilities.
      finished: the best hypotheses so far, best first; scores are length-normalised.
      done: bool[B], nothing can improve the prompt's hypotheses any more.
    """

    running: Hypotheses
    finished: Hypotheses
    done: jax.Array


def init(prompts: int, beams: int, buffer_length: int) -> BeamState:
    """The state before the first step: every beam is the bare prompt, so only the first one counts.

    Padding prompts can be marked done from the start: `state._replace(done=...)`.
    """

    def empty() -> Hypotheses:
        return Hypotheses(
            scores=jnp.full((prompts, beams), -jnp.inf, jnp.float32),
            tokens=jnp.full((prompts, beams, buffer_length), -1, jnp.int32),
            logprobs=jnp.zeros((prompts, beams, buffer_length), jnp.float32),
            lengths=jnp.zeros((prompts, beams), jnp.int32),
        )

    running = empty()
    running = running._replace(scores=running.scores.at[:, 0].set(0.0))
    return BeamState(running, empty(), jnp.zeros(prompts, bool))


def advance(
    state: BeamState,
    logprobs: jax.Array,
    stop_tokens: jax.Array,
    length_penalty: jax.Array | float,
    max_new_tokens: jax.Array | int,
    reported: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, BeamState]:
    """One step of beam search.

    Args:
      logprobs: float32[B, k, V], log-probabilities of the next token of each beam, after any processor; `transformers`
        runs its processors on log-probabilities, not on logits. -inf forbids a token.
      stop_tokens: int32[E], tokens that end a text; negative ones are padding. E is static: each costs k candidates.
      length_penalty, max_new_tokens: numbers, may be traced; the buffers' length bounds max_new_tokens too.
      reported: float32[B, k, V], what to note as the tokens' log-probabilities; None: logprobs.

    Returns:
      parents: int32[B, k], which of the prompt's beams each next beam continues.
      tokens: int32[B, k], the token it continues it with.
      state: the next state. Of a prompt that is done nothing changes, its parents are its beams in place and its tokens
        are 0. A prompt whose log-probabilities hold NaN, or leave no token at all, is done with scores NaN.
    """
    prompts, beams, vocab_size = logprobs.shape
    running, finished, done = state
    totals = (running.scores[..., None] + logprobs.astype(jnp.float32)).reshape(prompts, -1)
    # Each beam has one continuation per stop token, so this many hold k that go on.
    count = min(beams * max(2, 1 + stop_tokens.shape[0]), totals.shape[-1])
    scores, flat = jax.lax.top_k(totals, count)
    parents, tokens = flat // vocab_size, flat % vocab_size
    broken = ~done & (jnp.any(jnp.isnan(totals), axis=-1) | (scores[:, 0] == -jnp.inf))

    source = reported if reported is not None else logprobs
    noted = jnp.take_along_axis(source.reshape(prompts, -1), flat, axis=-1)
    length = running.lengths[:, :1] + 1
    max_new_tokens = jnp.minimum(max_new_tokens, running.tokens.shape[-1])
    ends = jnp.any(tokens[..., None] == stop_tokens, axis=-1) | (length >= max_new_tokens)

    onward = jnp.where(ends, -jnp.inf, scores)
    # A vocabulary hardly larger than its stop tokens may leave fewer than k: the others get -inf and are never chosen.
    onward, best = jax.lax.top_k(onward, beams)
    next_running = _extend(running, onward, *_pick(best, parents, tokens, noted))

    hits = ends[:, :beams] & (scores[:, :beams] > -jnp.inf)
    normalised = jnp.where(hits, scores[:, :beams] / _norm(length, length_penalty), -jnp.inf)
    ended = _extend(running, normalised, parents[:, :beams], tokens[:, :beams], noted[:, :beams])
    next_finished = _best(_concatenate(finished, ended), beams)

    bound = next_running.scores[:, 0] / _norm(length[:, 0], length_penalty)
    hopeless = ~(bound > jnp.min(next_finished.scores, axis=-1))
    parents, tokens = _pick(best, parents, tokens)
    parents = jnp.where(done[:, None], jnp.arange(beams), parents)
    tokens = jnp.where(done[:, None], 0, tokens)
    next_running = _where(done, running, next_running)
    next_finished = _where(done, finished, next_finished)
    next_finished = next_finished._replace(scores=jnp.where(broken[:, None], jnp.nan, next_finished.scores))
    done = done | broken | hopeless | (length[:, 0] >= max_new_tokens)
    return parents, tokens, BeamState(next_running, next_finished, done)


def finalise(state: BeamState, n: int, length_penalty: jax.Array | float) -> Hypotheses:
    """The n best hypotheses of each prompt, best first, n at most k.

    Where a prompt is not done (the search was cut short) its beams compete too, as they stand.
    """
    running = state.running
    normalised = running.scores / _norm(jnp.maximum(running.lengths, 1), length_penalty)
    normalised = jnp.where(state.done[:, None] | (running.lengths == 0), -jnp.inf, normalised)
    return _best(_concatenate(state.finished, running._replace(scores=normalised)), n)


def _norm(length: jax.Array, length_penalty: jax.Array | float) -> jax.Array:
    return length.astype(jnp.float32) ** length_penalty


def _pick(which: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """array[b, which[b, j], ...] of each array [B, k, ...]."""
    picked = []
    for array in arrays:
        index = which.reshape(which.shape + (1,) * (array.ndim - 2))
        picked.append(jnp.take_along_axis(array, index, axis=1))
    return tuple(picked)


def _extend(
    beams: Hypotheses, scores: jax.Array, parents: jax.Array, tokens: jax.Array, logprobs: jax.Array
) -> Hypotheses:
    """The parents' texts, each with one more token."""
    old_tokens, old_logprobs, lengths = _pick(parents, beams.tokens, beams.logprobs, beams.lengths)
    here = jnp.arange(old_tokens.shape[-1]) == lengths[..., None]
    return Hypotheses(
        scores=scores,
        tokens=jnp.where(here, tokens[..., None], old_tokens),
        logprobs=jnp.where(here, logprobs[..., None], old_logprobs),
        lengths=lengths + 1,
    )


def _concatenate(first: Hypotheses, second: Hypotheses) -> Hypotheses:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), first, second)


def _best(hypotheses: Hypotheses, count: int) -> Hypotheses:
    """The best `count` of each prompt, best first; among equals the earlier."""
    _, order = jax.lax.top_k(hypotheses.scores, count)
    return Hypotheses(*_pick(order, *hypotheses))


def _where(prompts: jax.Array, chosen: Hypotheses, other: Hypotheses) -> Hypotheses:
    """For each prompt, one of two."""
    return jax.tree.map(lambda a, b: jnp.where(prompts.reshape((-1,) + (1,) * (a.ndim - 1)), a, b), chosen, other)
