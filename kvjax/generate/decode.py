"""The decode loop: a scan over steps inside one compiled block, with the cache carried and donated."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.attention.paged import PagedAttend
from kvjax.cache.codecs import Encoded
from kvjax.cache.pages import Shortage, reserve, take
from kvjax.cache.placement import pinned
from kvjax.cache.state import Cache, Group
from kvjax.config import ModelConfig
from kvjax.generate.forward import forward_token, logits_of
from kvjax.generate.sampling import ProcessorContext, SamplingKind, SamplingState, draw
from kvjax.typing import Params

NO_TOKEN = -1
"""Marks, in what a block returns, that a sequence produced nothing at that step."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loop:
    """What is carried between steps beside the cache.

    Attributes:
      token: int32[B], each sequence's newest token, not yet in the cache.
      done: bool[B]; count: int32[B], tokens generated so far; limit: int32[B], how many are wanted.
      sampling: numbers of the draw.
    """

    token: Any
    done: Any
    count: Any
    limit: Any
    sampling: SamplingState


class Block(NamedTuple):
    """What a block gives back: tokens int32[steps, B] (-1: none), their float32[steps, B] log-probabilities."""

    tokens: jax.Array
    logprobs: jax.Array
    shortage: Shortage


@functools.partial(jax.jit, static_argnames=("config", "kind"), donate_argnames="loop")
def first_token(
    params: Params,
    hidden: jax.Array,
    loop: Loop,
    seen: jax.Array,
    stop_tokens: jax.Array,
    *,
    config: ModelConfig,
    kind: SamplingKind,
) -> tuple[Loop, jax.Array, jax.Array]:
    """Draws the token that follows a prompt, from its last hidden state [B, hidden].

    Returns the loop, tokens int32[1, B] and log-probabilities float32[1, B].
    """
    active = ~loop.done & (loop.count < loop.limit)
    return _advance(loop, logits_of(params, hidden, config), seen, active, stop_tokens, kind)


@functools.partial(jax.jit, static_argnames=("config", "attend", "kind", "steps"), donate_argnames=("cache", "loop"))
def decode_block(
    params: Params,
    cache: Cache,
    loop: Loop,
    halt: jax.Array,
    stop_tokens: jax.Array,
    allowed: jax.Array,
    *,
    config: ModelConfig,
    attend: PagedAttend,
    kind: SamplingKind,
    steps: int,
) -> tuple[Cache, Loop, Block]:
    """Up to `steps` tokens for every sequence that is not done.

    Args:
      halt: bool[B], sequences the host has ended since the last block.
      stop_tokens: int32[n], token ids that end a sequence; -1 pads.
      allowed: int32[], steps to really take, at most `steps`; fewer where the pool is nearly full.

    Returns:
      The cache and loop, consumed and renewed, and the block. On a shortage nothing was generated and nothing changed.
    """
    loop = dataclasses.replace(loop, done=loop.done | halt)
    wanted = jnp.minimum(loop.limit - loop.count, allowed)
    cache, shortage = reserve(cache, jnp.where(loop.done, 0, jnp.maximum(wanted, 0)))
    allowed = jnp.where(shortage.any, 0, allowed)

    def step(carry: tuple[Cache, Loop], order: jax.Array) -> tuple[tuple[Cache, Loop], tuple[jax.Array, jax.Array]]:
        cache, loop = carry
        active = ~loop.done & (loop.count < loop.limit) & (order < allowed)
        hidden, cache = forward_token(params, cache, loop.token, active, config=config, attend=attend)
        loop, tokens, logprobs = _advance(
            loop, logits_of(params, hidden, config), cache.seen, active, stop_tokens, kind
        )
        return (cache, loop), (tokens[0], logprobs[0])

    (cache, loop), (tokens, logprobs) = jax.lax.scan(step, (cache, loop), jnp.arange(steps))
    return cache, loop, Block(tokens, logprobs, shortage)


@functools.partial(jax.jit, static_argnames=("config", "attend"), donate_argnames="cache")
def forced_block(
    params: Params, cache: Cache, tokens: jax.Array, count: jax.Array, *, config: ModelConfig, attend: PagedAttend
) -> tuple[Cache, jax.Array, Shortage]:
    """Teacher forcing through the step of `decode_block`: tokens int32[B, steps], of which count int32[B] are real.

    Returns the cache, logits float32[B, steps, V] after each token, and the shortage.
    """
    cache, shortage = reserve(cache, count)

    def step(cache: Cache, inputs: tuple[jax.Array, jax.Array]) -> tuple[Cache, jax.Array]:
        token, order = inputs
        hidden, cache = forward_token(params, cache, token, order < count, config=config, attend=attend)
        return cache, logits_of(params, hidden, config)

    cache, logits = jax.lax.scan(step, cache, (tokens.T, jnp.arange(tokens.shape[1])))
    return cache, jnp.swapaxes(logits, 0, 1), shortage


def take_sequences(cache: Cache, parents: np.ndarray | jax.Array) -> Cache:
    """`take`, compiled. The pools stay where they are: only tables and counts pass through the device program."""
    nothing = Encoded(None)

    def bare(groups: tuple[Group, ...]) -> tuple[Group, ...]:
        return tuple(dataclasses.replace(group, k=nothing, v=None) for group in groups)

    def filled(taken: tuple[Group, ...], held: tuple[Group, ...]) -> tuple[Group, ...]:
        return tuple(dataclasses.replace(new, k=old.k, v=old.v) for new, old in zip(taken, held, strict=True))

    taken = _take_compiled(dataclasses.replace(cache, groups=bare(cache.groups), context=bare(cache.context)), parents)
    return dataclasses.replace(
        taken, groups=filled(taken.groups, cache.groups), context=filled(taken.context, cache.context)
    )


@jax.jit
def _take_compiled(cache: Cache, parents: jax.Array) -> Cache:
    return pinned(take(cache, parents))


def _advance(
    loop: Loop,
    logits: jax.Array,
    position: jax.Array,
    active: jax.Array,
    stop_tokens: jax.Array,
    kind: SamplingKind,
) -> tuple[Loop, jax.Array, jax.Array]:
    """Draws for the active sequences. Returns the loop, tokens [1, B] and log-probabilities [1, B]."""
    context = ProcessorContext(loop.count, position, loop.token)
    drawn, logprob, sampling = draw(logits, loop.sampling, context, kind, active)
    token = jnp.where(active, drawn, loop.token)
    stopped = jnp.any(drawn[:, None] == stop_tokens, axis=1)
    loop = Loop(
        token=token,
        # What cannot be drawn ends the sequence: the host sees the NaN and raises.
        done=loop.done | (active & (stopped | jnp.isnan(logprob))),
        count=loop.count + active,
        limit=loop.limit,
        sampling=sampling,
    )
    return loop, jnp.where(active, drawn, NO_TOKEN)[None], jnp.where(active, logprob, 0.0)[None]
