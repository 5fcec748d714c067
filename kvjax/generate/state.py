"""`State`: sequences with their live cache, between calls."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from kvjax.cache.codecs.calibrated import calibrated
from kvjax.cache.codecs.waiting import waits
from kvjax.cache.config import CacheConfig
from kvjax.cache.layout import GroupLayout, group_layers
from kvjax.cache.pages import resize
from kvjax.cache.placement import pinned
from kvjax.cache.policies.optional import decides, drops_hidden
from kvjax.cache.size import context_bucket, power_of_two, size_groups
from kvjax.cache.state import Cache, empty_cache
from kvjax.config import ModelConfig
from kvjax.errors import ConfigError, RequestError
from kvjax.generate.contexts import Chunks, hold_contexts, memory_beside
from kvjax.generate.decode import take_sequences
from kvjax.generate.prefill import reserve_pages, run_prompts
from kvjax.generate.requests import check_chunk
from kvjax.generate.shortage import out_of_pages as out_of_pages
from kvjax.generate.shortage import span
from kvjax.model import Model
from kvjax.partition import AnyMesh, mesh_of


@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """Sequences and the cache that holds them. Calls that take one consume it, use the state they return; not saving.

    Attributes:
      cache: of at least len(tokens) sequences; those beyond are padding.
      config: the choices it was made with.
      tokens: every token of each sequence so far, prompts and generated ones.
      last: the hidden state of each sequence's last token [B, hidden], right after a prompt; else None.
      pending: how many of the last tokens of each sequence are not in the cache yet: 0 after a prompt, else 1.
      prompt_lengths: how many of each sequence's tokens came as its first prompt, from which a policy may have chosen.
      copies: so many sequences side by side came of one, by `fork` or several samples.
    """

    cache: Cache
    config: CacheConfig
    tokens: tuple[tuple[int, ...], ...]
    last: jax.Array | None
    pending: int
    prompt_lengths: tuple[int, ...] = ()
    copies: int = 1

    @property
    def batch(self) -> int:
        """Sequences that are real."""
        return len(self.tokens)


@functools.partial(jax.jit, static_argnames=("layouts", "batch", "pages", "recurrent", "mesh"))
def make_cache(
    layouts: tuple[GroupLayout, ...],
    batch: int,
    pages: tuple[tuple[int, int], ...],
    recurrent: tuple[tuple[tuple[int, ...], ...], ...] = (),
    mesh: AnyMesh | None = None,
) -> Cache:
    """`empty_cache`, compiled, on a mesh or (None) on the default device."""
    cache = empty_cache(layouts, batch, pages, recurrent)
    return cache if mesh is None else pinned(cache, mesh)


@functools.partial(jax.jit, static_argnames="pages")
def resize_cache(cache: Cache, pages: tuple[tuple[int, int], ...]) -> Cache:
    """`resize`, compiled."""
    return pinned(resize(cache, pages))


def layouts_of(model: Model, config: CacheConfig) -> tuple[GroupLayout, ...]:
    """The cache groups of a model under a config.

    Raises:
      ConfigError: a policy that weighs a prompt's tokens by attention, on a model most of whose layers never see them;
        or one that drops hidden states, or decides, on a model whose layers share what they must not.
    """
    if model.config.cross_from is not None and config.observes:
        raise ConfigError(
            f"{config.policy!r} keeps what a prompt attends to, but layers from cross_from={model.config.cross_from} "
            "on see only a prompt's last token; choose a policy that needs no attention weights"
        )
    coding = [other.codec for other in (config, *(other for _, other in config.overrides)) if waits(other.codec)]
    if model.config.cross_from is not None and coding:
        raise ConfigError(
            f"{coding[0]!r} codes a prompt layer by layer, once its exact attention is done, but layers from "
            f"cross_from={model.config.cross_from} on see only a prompt's last token; choose a codec that codes each "
            "token by itself, such as codecs.Int4()"
        )
    for segment in model.config.segments if drops_hidden(config.policy) else ():
        if len({model.config.cache_layer(layer) for layer in segment}) > 1:
            raise ConfigError(
                f"{config.policy!r} drops hidden states between layers, but layers {span(segment)} of this model read "
                "one another's keys and values across each other: there is no place between them; choose another policy"
            )
    layouts = group_layers(model.config.kv_spec, model.config.cache_windows, config, model.dtype.name)
    check_deciding(model.config, layouts)
    check_turning(model.config, layouts)
    return layouts


def check_turning(config: ModelConfig, layouts: tuple[GroupLayout, ...]) -> None:
    """Refuses to turn queries or keys of a model that merges its key heads after RoPE.

    Raises:
      ConfigError: naming the policy or codec.
    """
    if config.merged_keys is None:
        return
    for layout in layouts:
        reads = layout.policy.reads(layout.window)
        turns = decides(layout.policy) or any(read.turn is not None or read.lag is not None for read in reads)
        if turns or calibrated(layout.codec):
            raise ConfigError(
                f"{layout.policy if turns else layout.codec!r} turns queries or keys to other positions, but this "
                f"model merges {config.merged_keys} key heads into {config.num_kv_heads} after RoPE (merged_keys): "
                "what is merged cannot be turned; choose a policy and a codec that take keys as they are stored, or "
                'convert by to_gqa(..., method="mean")'
            )


def check_deciding(config: ModelConfig, layouts: tuple[GroupLayout, ...]) -> None:
    """Refuses models whose layers' queries and keys do not both belong to the layer that decides.

    Raises:
      ConfigError: naming the policy and the layers.
    """
    for layout in layouts:
        if not decides(layout.policy):
            continue
        if config.cross_from is not None:
            raise ConfigError(
                f"{layout.policy!r} decides about every token of a prompt by a layer's queries and keys, but layers "
                f"from cross_from={config.cross_from} on see only a prompt's last token; choose another policy"
            )
        for layer in range(config.num_layers):
            if config.kind(layer).reads and config.cache_layer(layer) in layout.layers:
                raise ConfigError(
                    f"{layout.policy!r} takes a channel of the queries for itself, but layer {layer} of this model "
                    "only reads another's keys and values: it decides about nothing, and whether its queries keep that "
                    "channel is nowhere defined; choose another policy for the layers that share, by overrides"
                )


def start(
    model: Model,
    prompts: list[list[int]],
    config: CacheConfig,
    *,
    copies: int = 1,
    room: int = 0,
    context: int | None = None,
    chunk: int | None = None,
    backend: str | None = None,
    chunks: Chunks | None = None,
) -> State:
    """A state that holds the prompts, its pools sized for `copies` of each and `room` tokens more.

    Args:
      chunks: per prompt its chunks of context.

    Raises:
      OutOfPages: the prompts do not fit in the pool.
    """
    chunk = check_chunk(chunk)
    layouts = layouts_of(model, config)
    tokens = max(context or 0, max(map(len, prompts)) + room)
    memory = memory_beside(model, config, chunks)
    pages = size_groups(layouts, power_of_two(len(prompts) * copies), tokens, memory)
    cache = make_cache(layouts, power_of_two(len(prompts)), pages, model.config.recurrent_shapes, mesh_of(model.params))
    lengths = np.zeros(cache.batch, np.int32)
    lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
    cache, shortage = reserve_pages(cache, lengths)
    if raised := out_of_pages(shortage, cache, "the prompts"):
        raise raised
    cache = hold_contexts(model, cache, chunks, config, backend)
    cache, last, _ = run_prompts(
        model, cache, prompts, context=context_bucket(tokens), fresh=True, chunk=chunk, backend=backend
    )
    return State(cache, config, tuple(map(tuple, prompts)), last, 0, tuple(map(len, prompts)))


def append(
    model: Model,
    state: State,
    prompts: list[list[int]],
    *,
    room: int,
    chunk: int | None = None,
    backend: str | None = None,
) -> State:
    """Adds a further prompt to every sequence, behind whatever is pending.

    Raises:
      OutOfPages: they do not fit; its `state` is the one given, unharmed.
    """
    chunk = check_chunk(chunk)
    if len(prompts) != state.batch:
        raise RequestError(f"the state has {state.batch} sequences, got {len(prompts)} prompts; give one for each")
    pieces = [[*held[len(held) - state.pending :], *prompt] for held, prompt in zip(state.tokens, prompts, strict=True)]
    state = make_room(state, max(map(len, pieces)) + room)
    lengths = np.zeros(state.cache.batch, np.int32)
    lengths[: len(pieces)] = [len(piece) for piece in pieces]
    cache, shortage = reserve_pages(state.cache, lengths)
    if raised := out_of_pages(shortage, cache, "the prompts"):
        raised.state = dataclasses.replace(state, cache=cache)
        raise raised
    cache, last, _ = run_prompts(model, cache, pieces, context=0, fresh=False, chunk=chunk, backend=backend)
    tokens = tuple((*held, *prompt) for held, prompt in zip(state.tokens, prompts, strict=True))
    return dataclasses.replace(state, cache=cache, tokens=tokens, last=last, pending=0)


def make_room(state: State, more: int) -> State:
    """Widens the tables, and pools whose size nobody fixed, so that every sequence can grow by `more` tokens."""
    longest = max(map(len, state.tokens)) + more
    groups = state.cache.groups
    layouts = tuple(group.layout for group in groups)
    wanted = size_groups(layouts, state.cache.batch, longest, None)
    pages = []
    for group, (per_row, pool) in zip(groups, wanted, strict=True):
        fixed = group.layout.num_pages is not None or state.config.memory_bytes is not None
        pages.append((max(per_row, group.table.shape[2]), group.num_pages if fixed else max(pool, group.num_pages)))
    if all((group.table.shape[2], group.num_pages) == p for group, p in zip(groups, pages, strict=True)):
        return state
    pages += [(group.table.shape[2], group.num_pages) for group in state.cache.context]
    return dataclasses.replace(state, cache=resize_cache(state.cache, tuple(pages)))


def multiply(state: State, n: int) -> State:
    """Every sequence n times, copies side by side, their pages shared."""
    if n == 1:
        return state
    sources = [index for index in range(state.batch) for _ in range(n)]
    parents = np.full(power_of_two(len(sources)), -1, np.int32)
    parents[: len(sources)] = sources
    cache, last = repeat(state, parents)
    tokens = tuple(state.tokens[i] for i in sources)
    lengths = tuple(state.prompt_lengths[i] for i in sources) if state.prompt_lengths else ()
    return dataclasses.replace(
        state, cache=cache, tokens=tokens, last=last, prompt_lengths=lengths, copies=state.copies * n
    )


def repeat(state: State, parents: np.ndarray) -> tuple[Cache, jax.Array | None]:
    """The cache and last hidden states of the sequences named by parents int32[B'], -1 for none."""
    cache = take_sequences(state.cache, parents.astype(np.int32))
    return cache, None if state.last is None else _rows(state.last, np.maximum(parents, 0))


_rows = jax.jit(lambda array, index: array[index])
