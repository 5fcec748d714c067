"""`rollback`: the newest tokens of live sequences taken back, as if they had never been."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache.codecs import Encoded
from kvjax.cache.codecs.waiting import waits
from kvjax.cache.pages import truncate
from kvjax.cache.policies.optional import observes_steps
from kvjax.cache.state import Cache, Group
from kvjax.cache.tail import shortest
from kvjax.errors import RequestError
from kvjax.generate.live import check_live
from kvjax.generate.shortage import span
from kvjax.generate.state import State


def rollback(state: State, tokens: int | Sequence[int]) -> State:
    """Takes back the last tokens of every sequence, generated ones or a prompt's. Consumes the state.

    The cache is then what it would be had they never been fed, pages that become empty return to the pool, and a fork
    that shares pages keeps them. The last token that stays is fed again by the next `extend`: it counts as pending.
    No key or value moves; the price is one small program over the block tables.

    What is gone cannot be brought back, so it depends on how the cache is kept:

    - policies that only append, under codecs that code each token by itself: any number of tokens;
    - SnapKV, PyramidKV, KVMerger: tokens after the first prompt, of which they chose by the attention of all of it;
    - SlidingWindow, StreamingLLM, LMInfinite and layers that the model itself windows: any number until the ring has
      come round for the first time, then none;
    - policies that overwrite by attention or merge into what they hold (H2O, TOVA, DMC, ...): none;
    - KIVI: any number of the first `residual` + 1 tokens, then one, because what must be exact again lies nowhere any
      more; where the value lies within the key (MLA), back to the last multiple of `residual`;
    - models with recurrent layers: none, a sum does not tell its parts.

    Args:
      tokens: how many, of all sequences or of each; 0 leaves a sequence as it is, and one token must always stay.

    Returns:
      The state to go on with.

    Raises:
      RequestError: something else than such numbers, a consumed state, or tokens that cannot be taken back, with the
        reason and how many can; the state given is then as it was.
    """
    check_live(state)
    counts = _counts(state, tokens)
    if not any(counts):
        return state
    _check(state, counts)
    kept = tuple(held[: len(held) - n] for held, n in zip(state.tokens, counts, strict=True))
    seen = np.zeros(state.cache.batch, np.int32)
    seen[: state.batch] = [len(held) - 1 for held in kept]
    lengths = tuple(min(length, len(held)) for length, held in zip(state.prompt_lengths, kept, strict=False))
    cache = _filled(_truncate(_bare(state.cache), seen), state.cache)
    return dataclasses.replace(state, cache=cache, tokens=kept, last=None, pending=1, prompt_lengths=lengths)


class _Limit(NamedTuple):
    """How few tokens each sequence may be cut back to in the cache, int[B], and why no fewer."""

    least: np.ndarray
    reason: str


def _counts(state: State, tokens: Any) -> list[int]:
    """Tokens to take back, of each sequence."""
    try:
        given = np.asarray(None if isinstance(tokens, bool) else tokens)
    except ValueError:  # lists of unequal depth
        given = np.asarray(None)
    if given.dtype.kind not in "iu" or given.ndim > 1:
        raise RequestError(f"rollback takes a number of tokens, or one for each sequence, got {tokens!r:.80}")
    if given.ndim and len(given) != state.batch:
        raise RequestError(f"rollback got {len(given)} numbers for {state.batch} sequences; give one, or one for each")
    counts = [int(n) for n in np.broadcast_to(given, state.batch)]
    for index, (n, held) in enumerate(zip(counts, state.tokens, strict=True)):
        if n < 0:
            raise RequestError(f"rollback takes back at least 0 tokens, got {n}; kvjax.extend adds some")
        if n >= len(held):
            raise RequestError(
                f"sequence {index} has {len(held)} tokens, of which one must stay, so at most {len(held) - 1} can be "
                f"taken back, got {n}"
            )
    return counts


def _check(state: State, counts: list[int]) -> None:
    """Raises RequestError where some layer cannot go back as far as wanted."""
    if jax.tree.leaves(state.cache.recurrent):
        raise RequestError(
            "this model has recurrent layers, whose state is a sum over all tokens: none can be taken back; "
            "kvjax.save_state a state that is to be returned to"
        )
    seen, surveys = jax.device_get(_survey(_bare(state.cache)))
    limits = [_limit(state, group, seen, *survey) for group, survey in zip(state.cache.groups, surveys, strict=True)]
    for index, (n, held) in enumerate(zip(counts, state.tokens, strict=True)):
        limit = max(limits, key=lambda limit: int(limit.least[index]))
        # All that stays but the last token, which is fed again.
        most = len(held) - 1 - int(limit.least[index])
        if n > most:
            again = "" if n else ", not even to feed its last token again, as the others need it right after a prompt"
            raise RequestError(
                f"sequence {index} cannot lose its last {n} tokens{again}: {limit.reason}; at most {max(most, 0)} can "
                "be taken back; kvjax.save_state a state that is to be returned to"
            )


def _limit(state: State, group: Group, seen: np.ndarray, whole: np.ndarray, least: np.ndarray) -> _Limit:
    """What one group's policy and codec allow."""
    layout = group.layout
    policy, who = layout.policy, f"{layout.policy!r} (layers {span(layout.layers)})"
    if observes_steps(policy):
        return _Limit(seen, f"{who} has counted the attention of every token to those it holds")
    if not policy.append_only and (policy.observes or group.row_state):
        return _Limit(seen, f"{who} changes what it holds as tokens come, and what it was before is gone")
    if not policy.append_only:
        reason = f"{who} has written over older tokens, which the shorter text would still hold"
        return _Limit(np.where(whole, 0, seen), reason)
    if policy.observes:
        prompts = np.zeros_like(seen)
        prompts[: state.batch] = state.prompt_lengths or [len(tokens) for tokens in state.tokens]
        if np.all(least <= prompts):
            return _Limit(prompts, f"{who} has chosen from the prompt by the attention of all of its tokens")
        least = np.maximum(least, prompts)
    return _Limit(least, f"{layout.codec!r} (layers {span(layout.layers)}) has coded what would have to be exact again")


def _bare(cache: Cache) -> Cache:
    """The cache without what lies in pages or beside them, which no small program should see."""
    groups = tuple(
        dataclasses.replace(group, k=Encoded(None), v=None, page_state={}, tail={}) for group in cache.groups
    )
    return dataclasses.replace(cache, groups=groups, context=())


def _filled(bare: Cache, cache: Cache) -> Cache:
    """`bare` with that of `cache`."""
    groups = tuple(
        dataclasses.replace(new, k=old.k, v=old.v, page_state=old.page_state, tail=old.tail)
        for new, old in zip(bare.groups, cache.groups, strict=True)
    )
    return dataclasses.replace(bare, groups=groups, context=cache.context)


_truncate = jax.jit(truncate)


@jax.jit
def _survey(cache: Cache) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
    """seen int32[B]; and per group whether its rows hold every token in its place, and how short they can become."""
    found = []
    for group in cache.groups:
        slots = jnp.arange(group.position.shape[2])
        filled = slots < group.length[..., None]
        whole = (group.length == cache.seen) & jnp.all((group.position == slots) | ~filled, axis=2)
        least = jnp.zeros_like(cache.seen)
        if waits(group.layout.codec):
            # A token takes one slot of each row.
            least = cache.seen - jnp.min(group.length - shortest(group, group.length), axis=0)
        found.append((jnp.all(whole, axis=0), least))
    return cache.seen, found
