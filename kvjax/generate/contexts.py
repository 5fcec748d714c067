"""Chunks of context as users give them: checked, encoded, and put into the cache before the prompts.

Chunks are encoded side by side in batches of one fixed size, so that neither their number nor their lengths compile
anything new; pages come in powers of two, as those of prompts do.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.attention.context import Context
from kvjax.attention.dense import DenseAttend
from kvjax.cache.config import CacheConfig
from kvjax.cache.context import context_group, write_chunks
from kvjax.cache.layout import GroupLayout, context_layout
from kvjax.cache.size import context_bucket, power_of_two
from kvjax.cache.state import Cache, Group
from kvjax.config import ModelConfig
from kvjax.errors import ConfigError, RequestError
from kvjax.generate.requests import encode_prompt
from kvjax.model import Model
from kvjax.models import Encoder
from kvjax.typing import Params

Contexts = Sequence[Sequence[str | Sequence[int]] | None]
"""Per prompt its chunks, each text or token ids; None or an empty list for a prompt without context."""

Chunks = list[list[list[int]]]
"""The same as token ids."""

CPU_CHUNKS, ACCELERATOR_CHUNKS = 4, 16
"""Chunks per call of the encoder."""


def encode_contexts(model: Model, contexts: Any, prompts: int) -> Chunks | None:
    """Token ids of every chunk of each of `prompts` prompts; None if there is no chunk at all.

    Raises:
      RequestError: a model without encoder, another number of contexts than prompts, a chunk that is empty, too long or
        has ids outside the encoder's vocabulary.
    """
    if contexts is None:
        return None
    config = model.config
    if config.encoder is None:
        raise RequestError(
            "contexts need a model with an encoder (ModelConfig.encoder), this one has none; put the text in prompts"
        )
    if isinstance(contexts, str) or not isinstance(contexts, Sequence) or len(contexts) != prompts:
        raise RequestError(
            f"contexts must be a list with one list of chunks (None: no context) for each of the {prompts} prompts, "
            f"got {contexts!r:.80}"
        )
    chunks = [_chunks_of(model, given, index) for index, given in enumerate(contexts)]
    return chunks if any(chunks) else None


def _chunks_of(model: Model, given: Any, index: int) -> list[list[int]]:
    """One prompt's chunks."""
    config = model.config
    assert config.encoder is not None
    if given is None:
        return []
    if isinstance(given, str) or not isinstance(given, Sequence) or any(isinstance(chunk, int) for chunk in given):
        raise RequestError(
            f"the context of prompt {index} must be a list of chunks, each text or a list of token ids, got "
            f"{given!r:.80}; put a single chunk in brackets"
        )
    # A chunk is a prompt to the encoder, with its vocabulary.
    reader = dataclasses.replace(model, config=config.encoder)
    chunks = []
    for number, chunk in enumerate(given):
        try:
            ids = encode_prompt(reader, chunk, number)
        except RequestError as error:
            raise RequestError(f"context of prompt {index}, chunk as {error}") from error
        if len(ids) > config.context_chunk:
            raise RequestError(
                f"context of prompt {index}: chunk {number} has {len(ids)} tokens, the model reads at most "
                f"{config.context_chunk} (ModelConfig.context_chunk); split it"
            )
        chunks.append(ids)
    return chunks


def encode(
    params: Params, chunks: jax.Array, config: ModelConfig, backend: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Chunks int32[N, T], padded with -1 -> encoded [N, T, E], real bool[N, T]. params: the whole model's."""
    assert config.encoder is not None
    real = chunks >= 0
    positions = jnp.where(real, jnp.arange(chunks.shape[1]), -1)
    module = Encoder(config.encoder, DenseAttend(backend=backend, causal=False))
    encoded: Any = module.apply({"params": params["encoder"]}, jnp.maximum(chunks, 0), positions)
    return encoded, real


def context_of(params: Params, contexts: jax.Array, config: ModelConfig, backend: str | None = None) -> Context:
    """Contexts int32[B, C, T] of C chunks each, padded with -1, for a pass without a cache. Differentiable."""
    batch, count, width = contexts.shape
    encoded, real = encode(params, contexts.reshape(batch * count, width), config, backend)
    return Context(encoded.reshape(batch, count * width, -1), real.reshape(batch, count * width))


def padded_contexts(chunks: Chunks, width: int) -> np.ndarray:
    """int32[B, C, width], padded with -1."""
    padded = np.full((len(chunks), max(map(len, chunks)), width), -1, np.int32)
    for row, several in zip(padded, chunks, strict=True):
        for place, chunk in zip(row, several, strict=False):
            place[: len(chunk)] = chunk
    return padded


def context_pages(layout: GroupLayout, chunks: Chunks) -> tuple[int, int]:
    """(pages per row, pages in the pool) for these chunks, in powers of two."""
    totals = [sum(map(len, several)) for several in chunks]
    per_row = layout.pages_per_row(context_bucket(max(totals)))
    return per_row, power_of_two(max(sum(map(layout.pages_per_row, totals)), per_row))


def layout_of(model: Model, config: CacheConfig) -> GroupLayout:
    """The group of a model's context."""
    spec = model.config.context_spec
    assert spec is not None
    return context_layout(spec, config, model.dtype.name)


def memory_beside(model: Model, config: CacheConfig, chunks: Chunks | None) -> int | None:
    """Of CacheConfig.memory_bytes, what the context leaves to the model's own keys and values.

    Raises:
      ConfigError: nothing is left.
    """
    if config.memory_bytes is None or chunks is None:
        return config.memory_bytes
    layout = layout_of(model, config)
    taken = context_pages(layout, chunks)[1] * layout.page_bytes
    if taken >= config.memory_bytes:
        raise ConfigError(
            f"the context alone takes {taken} bytes of CacheConfig.memory_bytes={config.memory_bytes}; give more, or "
            "fewer chunks"
        )
    return config.memory_bytes - taken


@functools.partial(jax.jit, static_argnames=("layout", "pages"))
def _open(totals: jax.Array, *, layout: GroupLayout, pages: tuple[int, int]) -> Group:
    return context_group(layout, totals, pages)


@functools.partial(jax.jit, static_argnames=("config", "backend"), donate_argnames="group")
def _store(
    params: Params,
    group: Group,
    chunks: jax.Array,
    owner: jax.Array,
    start: jax.Array,
    *,
    config: ModelConfig,
    backend: str | None,
) -> Group:
    """Encodes chunks int32[N, T] (-1: padding) and stores each from slot start[i] of sequence owner[i] on."""
    encoded, real = encode(params, chunks, config, backend)
    count = jnp.sum(real, axis=1, dtype=jnp.int32)
    return write_chunks(group, group.layout.codec.encode(encoded[:, :, None]), owner, start, count)


def hold_contexts(
    model: Model, cache: Cache, chunks: Chunks | None, config: CacheConfig, backend: str | None = None
) -> Cache:
    """The cache with the chunks of each sequence encoded and held; without chunks as it is."""
    if chunks is None:
        return cache
    layout = layout_of(model, config)
    totals = np.zeros(cache.batch, np.int32)
    totals[: len(chunks)] = [sum(map(len, several)) for several in chunks]
    group = _open(totals, layout=layout, pages=context_pages(layout, chunks))
    listed: list[tuple[int, int, list[int]]] = []
    for owner, several in enumerate(chunks):
        start = 0
        for chunk in several:
            listed.append((owner, start, chunk))
            start += len(chunk)
    size = CPU_CHUNKS if jax.default_backend() == "cpu" else ACCELERATOR_CHUNKS
    for first in range(0, len(listed), size):
        some = listed[first : first + size]
        tokens = np.full((size, model.config.context_chunk), -1, np.int32)
        where = np.zeros((2, size), np.int32)
        for row, (owner, start, chunk) in enumerate(some):
            tokens[row, : len(chunk)] = chunk
            where[:, row] = owner, start
        group = _store(model.params, group, tokens, *where, config=model.config, backend=backend)
    return dataclasses.replace(cache, context=(group,))
