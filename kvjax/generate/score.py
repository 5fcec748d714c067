"""Teacher-forced logits along each of the three paths a token can take through a model."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.attention.dense import DenseAttend
from kvjax.attention.paged import PagedAttend
from kvjax.cache.config import CacheConfig
from kvjax.cache.size import context_bucket, power_of_two, size_groups
from kvjax.config import ModelConfig
from kvjax.errors import RequestError
from kvjax.generate.contexts import Contexts, context_of, encode_contexts, hold_contexts, memory_beside, padded_contexts
from kvjax.generate.decode import forced_block
from kvjax.generate.forward import apply, head, logits_of
from kvjax.generate.prefill import reserve_pages, run_prompts
from kvjax.generate.requests import check_chunk
from kvjax.generate.run import BLOCK_STEPS
from kvjax.generate.state import layouts_of, make_cache, out_of_pages
from kvjax.model import Model
from kvjax.partition import mesh_of
from kvjax.typing import Params


@functools.partial(jax.jit, static_argnames=("config", "backend"))
def forward(
    params: Params,
    tokens: jax.Array,
    contexts: jax.Array | None = None,
    *,
    config: ModelConfig,
    backend: str | None = None,
) -> jax.Array:
    """The training path, without a cache: int32[B, T] -> logits float32[B, T, V].

    contexts: int32[B, C, n], C chunks of context per sequence, padded with -1.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    context = None if contexts is None else context_of(params, contexts, config, backend)
    hidden, _ = apply(config, DenseAttend(config.cache_windows, backend), params, tokens, positions, context)
    return logits_of(params, hidden, config)


def score(
    model: Model,
    tokens: Any,
    cache: CacheConfig = CacheConfig(),
    path: Literal["forward", "prefill", "decode"] = "forward",
    prompt_length: int = 1,
    *,
    prefill_chunk: int | None = None,
    backend: str | None = None,
    contexts: Contexts | None = None,
) -> jax.Array:
    """Logits after every token of given sequences.

    Args:
      tokens: int32[B, T].
      cache: how keys and values are kept on the paths that have a cache.
      path: "forward": the training path, without a cache. "prefill": all of it through chunked prefill. "decode": the
        first prompt_length tokens through prefill, then one token a step through the same code as `generate`.
      contexts: the chunks of context of each sequence, as in `generate`.

    Returns:
      float32[B, T, V]; entry t is what the model says follows token t.

    Raises:
      RequestError: tokens of another shape or outside the vocabulary, an unknown path, prompt_length not in 1 .. T.
      OutOfPages: the pool is too small.
    """
    tokens = _checked(model, tokens)
    batch, length = tokens.shape
    chunks = encode_contexts(model, contexts, batch)
    if path == "forward":
        padded = None if chunks is None else padded_contexts(chunks, model.config.context_chunk)
        return forward(model.params, tokens, padded, config=model.config, backend=backend)
    if path not in ("prefill", "decode"):
        raise RequestError(f'path must be "forward", "prefill" or "decode", got {path!r}')
    if path == "prefill":
        prompt_length = length
    if not 1 <= prompt_length <= length:
        raise RequestError(f"prompt_length must be between 1 and the {length} tokens given, got {prompt_length}")
    prefill_chunk = check_chunk(prefill_chunk)
    layouts = layouts_of(model, cache)
    pages = size_groups(layouts, power_of_two(batch), length, memory_beside(model, cache, chunks))
    held = make_cache(layouts, power_of_two(batch), pages, model.config.recurrent_shapes, mesh_of(model.params))
    prompts = [row[:prompt_length].tolist() for row in tokens]
    lengths = np.zeros(held.batch, np.int32)
    lengths[:batch] = prompt_length
    held, shortage = reserve_pages(held, lengths)
    if raised := out_of_pages(shortage, held, "the sequences"):
        raise raised
    held = hold_contexts(model, held, chunks, cache, backend)
    held, _, hidden = run_prompts(
        model,
        held,
        prompts,
        context=context_bucket(length),
        fresh=True,
        chunk=prefill_chunk,
        backend=backend,
        keep_hidden=True,
    )
    parts = [head(model.params, piece, config=model.config) for piece in hidden]
    logits = [jnp.concatenate(parts, axis=1)[:batch, :prompt_length]]
    for start in range(prompt_length, length, BLOCK_STEPS):
        piece = np.zeros((held.batch, BLOCK_STEPS), np.int32)
        some = tokens[:, start : start + BLOCK_STEPS]
        piece[:batch, : some.shape[1]] = some
        count = np.where(np.arange(held.batch) < batch, some.shape[1], 0).astype(np.int32)
        held, block, shortage = forced_block(
            model.params, held, piece, count, config=model.config, attend=PagedAttend(backend)
        )
        if raised := out_of_pages(shortage, held, "the sequences"):
            raise raised
        logits.append(block[:batch, : some.shape[1]])
    return jnp.concatenate(logits, axis=1)


def _checked(model: Model, tokens: Any) -> np.ndarray:
    array = np.asarray(tokens)
    if array.ndim != 2 or not array.size or array.dtype.kind not in "iu":
        raise RequestError(f"score takes integer tokens[B, T], not empty; got {array.dtype} {array.shape}")
    if array.min() < 0 or array.max() >= model.config.vocab_size:
        raise RequestError(
            f"token ids must be 0 to {model.config.vocab_size - 1}, got {int(array.min())} to {int(array.max())}"
        )
    return array.astype(np.int32)
