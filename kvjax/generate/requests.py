"""Prompts as users give them, checked and turned into token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from kvjax.config import Sampling
from kvjax.errors import RequestError
from kvjax.model import Model

Prompts = Sequence[str] | Sequence[Sequence[int]]


def encode_prompts(model: Model, prompts: Any) -> list[list[int]]:
    """Token ids of each prompt.

    Raises:
      RequestError: no prompts, an empty one, text without a tokenizer, or ids outside the vocabulary.
    """
    if isinstance(prompts, str):
        raise RequestError(f"prompts must be a list; put the text in brackets: [{prompts[:20]!r}]")
    if not isinstance(prompts, Iterable):
        raise RequestError(f"prompts must be a list of texts or of token-id lists, got {prompts!r:.80}")
    prompts = list(prompts)
    if not prompts:
        raise RequestError("prompts is empty; give at least one prompt")
    return [encode_prompt(model, prompt, index) for index, prompt in enumerate(prompts)]


def encode_prompt(model: Model, prompt: Any, index: int = 0) -> list[int]:
    """Token ids of one prompt; `index` names it in errors."""
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise RequestError(f"prompt {index} is text, but the model has no tokenizer; give token ids")
        ids = list(model.tokenizer.encode(prompt).ids)
    else:
        try:
            array = np.asarray(prompt)
        except ValueError:  # lists of unequal depth
            array = np.asarray(None)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise RequestError(f"prompt {index} must be text or a flat list of integer token ids, got {prompt!r:.80}")
        ids = [int(token) for token in array]
    if not ids:
        raise RequestError(f"prompt {index} is empty; give at least one token (a beginning-of-text token will do)")
    wrong = next((token for token in ids if not 0 <= token < model.config.vocab_size), None)
    if wrong is not None:
        raise RequestError(
            f"prompt {index} has token id {wrong}; the vocabulary has ids 0 to {model.config.vocab_size - 1}"
        )
    return ids


def check_new_tokens(max_new_tokens: Any) -> int:
    """max_new_tokens as an int of at least 1."""
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 1:
        raise RequestError(
            f"max_new_tokens must be an integer of at least 1, got {max_new_tokens!r}; "
            "to only fill the cache use kvjax.prefill"
        )
    return int(max_new_tokens)


def check_chunk(chunk: Any) -> int | None:
    """prefill_chunk as it is, if it is None or an int of at least 1."""
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int | np.integer) or chunk < 1):
        raise RequestError(f"prefill_chunk must be None or an integer of at least 1, got {chunk!r}")
    return None if chunk is None else int(chunk)


def stop_token_ids(model: Model, sampling: Sampling) -> np.ndarray:
    """int32[n]: the model's own end tokens and the user's; n is padded so that it seldom compiles anew."""
    ids = sorted({*model.config.eos_token_ids, *sampling.stop_tokens})
    wrong = next((token for token in sampling.stop_tokens if not 0 <= token < model.config.vocab_size), None)
    if wrong is not None:
        raise RequestError(
            f"Sampling.stop_tokens has {wrong}; the vocabulary has ids 0 to {model.config.vocab_size - 1}"
        )
    padded = np.full(-(-max(len(ids), 1) // 8) * 8, -1, np.int32)
    padded[: len(ids)] = ids
    return padded


def seeds_of(sampling: Sampling, seed: int, prompts: int) -> list[int]:
    """One seed per prompt: the request's own, or the call's seed mixed with the prompt's place."""
    if sampling.seeds is not None:
        if len(sampling.seeds) != prompts:
            raise RequestError(f"Sampling.seeds has {len(sampling.seeds)} seeds for {prompts} prompts")
        return list(sampling.seeds)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise RequestError(f"seed must be an integer of at least 0, got {seed!r}")
    return [int(np.random.SeedSequence((seed, index)).generate_state(1)[0]) for index in range(prompts)]
