"""Prompts into the cache, in chunks of one fixed size, so that no prompt length compiles anything new.

Chunk-major: all layers for one chunk, then the next; for policies that append or slide. Layer-major: the whole prompt
through one layer, then the next; for policies that select from the prompt by its attention. Its peak memory is one
layer's keys and values, never the whole cache's.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.attention.paged import PagedAttend
from kvjax.attention.scratch import ScratchAttend, empty_scratch
from kvjax.cache.calibrated import first_of, keep_first, tables_of
from kvjax.cache.codecs.waiting import waits
from kvjax.cache.page_state import ended
from kvjax.cache.pages import Shortage, late_shortage, reserve
from kvjax.cache.placement import pinned
from kvjax.cache.policies.optional import decides, drops_hidden, observes_steps, takes_late
from kvjax.cache.prompt import keep_prompt
from kvjax.cache.state import Cache
from kvjax.config import LayerKind, ModelConfig
from kvjax.generate.forward import apply, forward_token, layer_of, rotate_of
from kvjax.generate.shortage import out_of_pages
from kvjax.model import Model
from kvjax.models import Layer
from kvjax.typing import Params

CPU_CHUNK, ACCELERATOR_CHUNK = 64, 256


def default_chunk() -> int:
    """Tokens per prefill chunk: on an accelerator enough to be bound by arithmetic, on CPU few, for short prompts."""
    return CPU_CHUNK if jax.default_backend() == "cpu" else ACCELERATOR_CHUNK


@functools.partial(jax.jit, donate_argnames="cache")
def reserve_pages(cache: Cache, n: jax.Array) -> tuple[Cache, Shortage]:
    """`reserve`, compiled; consumes the cache."""
    cache, shortage = reserve(cache, n)
    return pinned(cache), shortage


@functools.partial(jax.jit, static_argnames=("config", "attend"), donate_argnames=("cache", "last"))
def prefill_chunk(
    params: Params,
    cache: Cache,
    last: jax.Array,
    tokens: jax.Array,
    count: jax.Array,
    *,
    config: ModelConfig,
    attend: PagedAttend,
) -> tuple[Cache, jax.Array, jax.Array]:
    """One chunk tokens int32[B, C] through all layers; of row b the first count[b] int32 are real.

    Returns the cache, the hidden state of each sequence's last token so far [B, hidden], and all of the chunk's.
    """
    order = jnp.arange(tokens.shape[1])
    positions = jnp.where(order < count[:, None], cache.seen[:, None] + order, -1)
    hidden, cache = apply(config, attend, params, tokens, positions, cache)
    return cache, _last_of(hidden, count, last), hidden


@functools.partial(jax.jit, static_argnames=("config", "attend"), donate_argnames=("cache", "last"))
def feed_tokens(
    params: Params,
    cache: Cache,
    last: jax.Array,
    tokens: jax.Array,
    count: jax.Array,
    *,
    config: ModelConfig,
    attend: PagedAttend,
) -> tuple[Cache, jax.Array, jax.Array]:
    """The same as `prefill_chunk`, one token at a time: for policies that score each token as it comes."""

    def step(cache: Cache, inputs: tuple[jax.Array, jax.Array]) -> tuple[Cache, jax.Array]:
        token, order = inputs
        hidden, cache = forward_token(params, cache, token, order < count, config=config, attend=attend)
        return cache, hidden

    cache, hidden = jax.lax.scan(step, cache, (tokens.T, jnp.arange(tokens.shape[1])))
    hidden = jnp.swapaxes(hidden, 0, 1)
    return cache, _last_of(hidden, count, last), hidden


@functools.partial(jax.jit, static_argnames=("config", "attend"), donate_argnames=("cache", "last"))
def prefill_below(
    params: Params,
    cache: Cache,
    last: jax.Array,
    tokens: jax.Array,
    count: jax.Array,
    *,
    config: ModelConfig,
    attend: PagedAttend,
) -> tuple[Cache, jax.Array]:
    """`prefill_chunk` through the layers below `read_from` only.

    Returns the cache, and what layers above will be given of each sequence's last tokens [B, reach, hidden].
    """
    order = jnp.arange(tokens.shape[1])
    positions = jnp.where(order < count[:, None], cache.seen[:, None] + order, -1)
    hidden, cache = apply(config, attend, params, tokens, positions, cache, method="below")
    newest = count[:, None] + jnp.arange(last.shape[1])
    return cache, jnp.take_along_axis(jnp.concatenate([last, hidden], axis=1), newest[..., None], axis=1)


@functools.partial(jax.jit, static_argnames=("config", "attend"), donate_argnames="cache")
def prefill_above(
    params: Params, cache: Cache, last: jax.Array, new: jax.Array, *, config: ModelConfig, attend: PagedAttend
) -> tuple[Cache, jax.Array]:
    """The last tokens of each sequence, last [B, reach, hidden], through the layers from `read_from` on.

    Only the last new int32[B] of them were given since these layers last ran; where that is none, nothing changes.
    """
    order = jnp.arange(last.shape[1]) - last.shape[1]
    positions = jnp.where(order >= -new[:, None], cache.seen[:, None] + order, -1)
    hidden, cache = apply(config, attend, params, last, positions, cache, method="above")
    return cache, hidden[:, -1]


@functools.partial(jax.jit, static_argnames="config")
def embed(params: Params, tokens: jax.Array, *, config: ModelConfig) -> jax.Array:
    """int32[B, T] -> [B, T, hidden]."""
    embedded: jax.Array = apply(config, None, params, tokens, method="embed_tokens")
    return embedded


class Prompt(NamedTuple):
    """A batch of prompts on its way through the layers.

    Attributes:
      hidden: [B, T, hidden]. tokens: int32[B, T], their ids; None where no policy asks for them.
      positions: int32[B, T], where they stand, ascending, -1 is padding; None: side by side from 0 on.
    """

    hidden: jax.Array
    tokens: jax.Array | None = None
    positions: jax.Array | None = None


class Place(NamedTuple):
    """A layer within a segment: its kind, which of the segment's owners it reads, and that owner's cache group."""

    kind: LayerKind
    owner: int
    group: int


@functools.partial(
    jax.jit, static_argnames=("config", "places", "chunk", "backend"), donate_argnames=("cache", "prompt")
)
def prefill_segment(
    params: tuple[Params, ...],
    cache: Cache,
    prompt: Prompt,
    lengths: jax.Array,
    index: jax.Array,
    *,
    config: ModelConfig,
    places: tuple[Place, ...],
    chunk: int,
    backend: str | None,
) -> tuple[Cache, Prompt]:
    """A whole prompt through one layer, or through layers that share keys and values.

    Of the keys and values goes into the cache what the policy keeps; where it says so, only the hidden states of what
    it keeps go on. `params` are the layers' own subtrees; `index` int32[owners], the owners' places in their cache
    groups, is traced, so that segments alike share one compilation. T is a multiple of `chunk`; lengths int32[B] are
    those of the prompts as given.
    """
    columns = prompt.positions
    groups = {place.owner: place.group for place in places}
    layouts = {owner: cache.groups[group].layout for owner, group in groups.items()}

    def body(i: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        hidden, scratches = carry
        start = i * chunk
        order = start + jnp.arange(chunk)
        positions = jnp.where(order < lengths[:, None], order, -1)
        if columns is not None:
            positions = jax.lax.dynamic_slice_in_dim(columns, start, chunk, axis=1)
        x = jax.lax.dynamic_slice_in_dim(hidden, start, chunk, axis=1)
        scratches = {owner: dataclasses.replace(scratch, offset=start) for owner, scratch in scratches.items()}
        made: dict[int, Any] = {}
        for own_params, (kind, owner, _) in zip(params, places, strict=True):
            module = Layer(config, ScratchAttend(layouts[owner], backend), kind)
            carried = (x, scratches[owner])
            (x, scratches[owner]), new = module.apply(
                {"params": own_params}, carried, 0, positions, made[owner] if kind.reads else None
            )
            made.setdefault(owner, new)
        return jax.lax.dynamic_update_slice_in_dim(hidden, x, start, axis=1), scratches

    scratches = {
        owner: empty_scratch(
            layout,
            lengths,
            prompt.hidden.shape[1],
            cache.context,
            columns,
            tables_of(cache.groups[groups[owner]], index[owner]),
            first_of(cache.groups[groups[owner]], index[owner]),
        )
        for owner, layout in layouts.items()
    }
    longest = jnp.max(lengths if columns is None else jnp.sum(columns >= 0, axis=1))
    hidden, scratches = jax.lax.fori_loop(0, (longest + chunk - 1) // chunk, body, (prompt.hidden, scratches))
    prompt = prompt._replace(hidden=hidden)
    held = list(cache.groups)
    for owner, scratch in scratches.items():
        number = groups[owner]
        held[number], kept = keep_prompt(
            # What a select remembers of pages is made of the first tokens as they are kept.
            keep_first(held[number], index[owner], scratch.first),
            index[owner],
            lengths,
            scratch.weights,
            scratch.k,
            scratch.v,
            prompt.tokens,
            columns,
            rotate_of(config),
        )
        if drops_hidden(layouts[owner].policy):
            prompt = _survivors(prompt, kept[0])
    return pinned(dataclasses.replace(cache, groups=tuple(held))), prompt


def _survivors(prompt: Prompt, kept: jax.Array) -> Prompt:
    """Only the tokens marked in kept bool[B, T], moved together to the front."""
    order = jnp.argsort(~kept, axis=1, stable=True)
    gone = ~jnp.take_along_axis(kept, order, axis=1)

    def moved(array: jax.Array) -> jax.Array:
        return jnp.take_along_axis(array, order.reshape(*order.shape, *(1,) * (array.ndim - 2)), axis=1)

    assert prompt.positions is not None
    tokens = None if prompt.tokens is None else moved(prompt.tokens)
    return Prompt(moved(prompt.hidden), tokens, jnp.where(gone, -1, moved(prompt.positions)))


@functools.partial(jax.jit, static_argnames="config", donate_argnames=("cache", "hidden"))
def finish_prompt(
    params: Params,
    cache: Cache,
    hidden: jax.Array,
    lengths: jax.Array,
    positions: jax.Array | None = None,
    *,
    config: ModelConfig,
) -> tuple[Cache, jax.Array, jax.Array]:
    """After the last layer: what was seen, the last hidden states [B, hidden], and all of them [B, T, hidden].

    Those of tokens that did not come this far are NaN: there is none.
    """
    hidden = apply(config, None, params, hidden, method="finish")
    order = jnp.arange(hidden.shape[0])
    count = lengths if positions is None else jnp.sum(positions >= 0, axis=1)
    last = hidden[order, jnp.maximum(count - 1, 0)]
    if positions is not None:
        target = jnp.where(positions >= 0, positions, hidden.shape[1])
        hidden = jnp.full_like(hidden, jnp.nan).at[order[:, None], target].set(hidden, mode="drop")
    cache = dataclasses.replace(ended(cache, rotate_of(config)), seen=cache.seen + lengths)
    return cache, last, hidden


def by_layer(cache: Cache) -> bool:
    """Whether a fresh prompt must go through layer by layer."""
    return any(
        group.layout.policy.observes or decides(group.layout.policy) or waits(group.layout.codec)
        for group in cache.groups
    )


def token_by_token(cache: Cache) -> bool:
    """Whether later tokens, of further prompts too, must come one at a time."""
    return any(
        observes_steps(group.layout.policy) or decides(group.layout.policy) or waits(group.layout.codec)
        for group in cache.groups
    )


def run_prompts(
    model: Model,
    cache: Cache,
    prompts: list[list[int]],
    *,
    context: int,
    fresh: bool,
    chunk: int | None = None,
    backend: str | None = None,
    keep_hidden: bool = False,
) -> tuple[Cache, jax.Array, list[jax.Array]]:
    """Puts prompts, one per sequence (an empty one adds nothing), into a cache whose pages are reserved.

    Args:
      context: the bucketed context of the cache's tables: the size of layer-major buffers.
      fresh: the cache holds nothing yet.
      keep_hidden: also return hidden states, a list of [B, chunk, hidden].

    Returns:
      The cache, the last hidden states [B, hidden], the list.

    Raises:
      OutOfPages: the pool does not hold what a policy keeps that can't tell before.
    """
    chunk = chunk or default_chunk()
    lengths = np.zeros(cache.batch, np.int32)
    lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
    if fresh and by_layer(cache):
        width = -(-max(context, int(lengths.max())) // chunk) * chunk
        tokens = _padded(prompts, cache.batch, 0, width)
        prompt = Prompt(embed(model.params, tokens, config=model.config), jnp.asarray(tokens))
        policies = [group.layout.policy for group in cache.groups]
        if any(map(drops_hidden, policies)):
            order = np.arange(width, dtype=np.int32)
            prompt = prompt._replace(positions=jnp.asarray(np.where(order < lengths[:, None], order, np.int32(-1))))
        for segment in model.config.segments:
            places, index = _places(model.config, cache, segment)
            cache, prompt = prefill_segment(
                tuple(layer_of(model.params, layer) for layer in segment),
                cache,
                prompt,
                lengths,
                index,
                config=model.config,
                places=places,
                chunk=chunk,
                backend=backend,
            )
        cache, last, hidden = finish_prompt(
            model.params, cache, prompt.hidden, lengths, prompt.positions, config=model.config
        )
        if any(map(takes_late, policies)) and (raised := out_of_pages(late_shortage(cache), cache, "the prompts")):
            raise raised
        return cache, last, [hidden] if keep_hidden else []
    attend = PagedAttend(backend, prompt=True)
    run = feed_tokens if token_by_token(cache) else prefill_chunk
    early = model.config.read_from is not None and not keep_hidden
    reach = (model.config.reach,) if early else ()
    last = jnp.asarray(np.zeros((cache.batch, *reach, model.config.hidden_size), model.dtype))
    kept: list[jax.Array] = []
    for start in range(0, int(lengths.max()), chunk):
        count = np.clip(lengths - start, 0, chunk).astype(np.int32)
        tokens = _padded(prompts, cache.batch, start, chunk)
        if early:
            cache, last = prefill_below(model.params, cache, last, tokens, count, config=model.config, attend=attend)
            continue
        cache, last, hidden = run(model.params, cache, last, tokens, count, config=model.config, attend=attend)
        if keep_hidden:
            kept.append(hidden)
    if early:
        cache, last = prefill_above(model.params, cache, last, lengths, config=model.config, attend=attend)
    return cache, last, kept


def _places(config: ModelConfig, cache: Cache, segment: tuple[int, ...]) -> tuple[tuple[Place, ...], np.ndarray]:
    """Where the layers of a segment find their keys and values, and each owner's index in its cache group."""
    numbers = sorted({config.cache_layer(layer) for layer in segment})
    located = [cache.locate(number) for number in numbers]
    places = []
    for layer in segment:
        owner = numbers.index(config.cache_layer(layer))
        places.append(Place(config.kind(layer), owner, located[owner][0]))
    return tuple(places), np.array([index for _, index in located], np.int32)


def _padded(prompts: list[list[int]], batch: int, start: int, width: int) -> np.ndarray:
    """int32[B, width]: tokens start .. start + width of each prompt, 0 beyond its end."""
    tokens = np.zeros((batch, width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=False):
        piece = prompt[start : start + width]
        row[: len(piece)] = piece
    return tokens


def _last_of(hidden: jax.Array, count: jax.Array, last: jax.Array) -> jax.Array:
    chosen = hidden[jnp.arange(hidden.shape[0]), jnp.maximum(count - 1, 0)]
    return jnp.where((count > 0)[:, None], chosen, last)
