"""What users get wrong is answered by an exception that names what was given and what to do, and the next call works."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import CacheConfig, Sampling, policies
from kvjax.errors import ConfigError, KvjaxError, OutOfPages, RequestError
from kvjax.model import Model
from tests.cache.tiny import CONFIG, VOCAB, model_of

MODEL = model_of()
SMALL = CacheConfig(page_size=4, num_pages=8)  # 32 slots
NEXT = [[1, 2, 3]]


def works(model: Model = MODEL) -> None:
    """The next call is served."""
    assert len(kvjax.generate(model, NEXT, 2, SMALL).tokens[0]) == 2


BAD_REQUESTS: dict[str, tuple[Callable[[], Any], str]] = {
    "no prompts": (lambda: kvjax.generate(MODEL, []), "at least one prompt"),
    "empty prompt": (lambda: kvjax.generate(MODEL, [[1], []]), "prompt 1 is empty"),
    "bare text": (lambda: kvjax.generate(MODEL, "text"), "must be a list"),
    "text without tokenizer": (lambda: kvjax.generate(MODEL, ["text"]), "no tokenizer"),
    "token id too large": (lambda: kvjax.generate(MODEL, [[1, VOCAB]]), f"token id {VOCAB}; .* 0 to {VOCAB - 1}"),
    "negative token id": (lambda: kvjax.generate(MODEL, [[-1]]), "token id -1"),
    "fractions": (lambda: kvjax.generate(MODEL, [[0.5, 1.0]]), "integer token ids"),
    "nested prompt": (lambda: kvjax.generate(MODEL, [[[1, 2]]]), "flat list"),
    "no new tokens": (lambda: kvjax.generate(MODEL, NEXT, 0), "at least 1, got 0"),
    "negative new tokens": (lambda: kvjax.generate(MODEL, NEXT, -3), "got -3"),
    "boolean new tokens": (lambda: kvjax.generate(MODEL, NEXT, True), "got True"),
    "seeds of another count": (lambda: kvjax.generate(MODEL, NEXT, sampling=Sampling(seeds=(1, 2))), "2 seeds for 1"),
    "negative seed": (lambda: kvjax.generate(MODEL, NEXT, seed=-1), "seed must be"),
    "stop string without tokenizer": (lambda: kvjax.generate(MODEL, NEXT, sampling=Sampling(stop="a")), "stop_tokens"),
    "stop token outside": (lambda: kvjax.generate(MODEL, NEXT, sampling=Sampling(stop_tokens=(99,))), "has 99"),
    "stream of several": (lambda: kvjax.stream(MODEL, [1], sampling=Sampling(n=2)), "n=1"),
    "score of a flat list": (lambda: kvjax.score(MODEL, [1, 2]), r"tokens\[B, T\]"),
    "score outside the vocabulary": (lambda: kvjax.score(MODEL, [[VOCAB]]), f"0 to {VOCAB - 1}"),
    "score on an unknown path": (lambda: kvjax.score(MODEL, [[1]], path="sideways"), "sideways"),  # type: ignore
    "score with too long a prompt": (lambda: kvjax.score(MODEL, [[1]], path="decode", prompt_length=2), "got 2"),
    "fork into none": (lambda: kvjax.fork(None, 0), "at least 1"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_says_what_is_allowed(case: str) -> None:
    call, message = BAD_REQUESTS[case]
    with pytest.raises(RequestError, match=message):
        call()


BAD_CONFIGS: dict[str, tuple[Callable[[], Any], str]] = {
    "page size": (lambda: CacheConfig(page_size=3), "power of two, got 3"),
    "no pages": (lambda: CacheConfig(num_pages=0), "got 0"),
    "two sizes": (lambda: CacheConfig(num_pages=4, memory_bytes=4096), "not both"),
    "not a policy": (lambda: CacheConfig(policy="full"), "policy must be"),  # type: ignore[arg-type]
    "not a codec": (lambda: CacheConfig(codec=8), "codec must be"),  # type: ignore[arg-type]
    "a select": (lambda: CacheConfig(select=object()), "sparse reads"),
    "overlapping overrides": (lambda: CacheConfig(overrides=(((0,), SMALL), ((0,), SMALL))), "distinct"),
    "nested overrides": (lambda: CacheConfig(overrides=(((0,), CacheConfig(overrides=(((1,), SMALL),))),)), "its own"),
    "layer beyond": (lambda: kvjax.generate(MODEL, NEXT, cache=CacheConfig(overrides=(((2,), SMALL),))), r"layer 2"),
    "too little memory": (lambda: kvjax.generate(MODEL, NEXT, cache=CacheConfig(memory_bytes=100)), "at least"),
    "window": (lambda: policies.SlidingWindow(0), "got 0"),
    "sinks": (lambda: policies.StreamingLLM(-1, 4), "got -1"),
    "budget": (lambda: policies.TOVA(0), "got 0"),
    "nothing kept": (lambda: policies.H2O(0, 0), "keep something"),
    "temperature": (lambda: Sampling(temperature=-1), "temperature"),
    "top_p": (lambda: Sampling(top_p=0), "top_p"),
    "sampled beams": (lambda: Sampling(beams=2, temperature=1.0), "deterministic"),
    "beams with stop strings": (lambda: Sampling(beams=2, stop="a"), "stop_tokens"),
    "heads": (lambda: dataclasses.replace(CONFIG, num_kv_heads=3), "multiple"),
    "odd head": (lambda: dataclasses.replace(CONFIG, head_dim=7), "even"),
    "windows": (lambda: dataclasses.replace(CONFIG, windows=(1,)), "1 entries for 2 layers"),
    "unknown key": (lambda: kvjax.ModelConfig.from_dict({"hidden": 4}), "unknown key 'hidden'"),
    "missing key": (lambda: kvjax.ModelConfig.from_dict({"hidden_size": 4}), "missing key 'vocab_size'"),
    "missing file": (lambda: kvjax.init("nowhere.toml"), "nowhere.toml"),
    "StreamingLLM wider than the model's window": (
        lambda: kvjax.generate(
            model_of(dataclasses.replace(CONFIG, windows=(8, 8))),
            NEXT,
            cache=CacheConfig(policy=policies.StreamingLLM(2, 8)),
        ),
        "sees only 8",
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_an_impossible_config_says_why(case: str) -> None:
    call, message = BAD_CONFIGS[case]
    with pytest.raises(ConfigError, match=message):
        call()


def test_a_prompt_longer_than_the_pool_is_out_of_pages_and_the_next_call_works() -> None:
    with pytest.raises(OutOfPages, match=r"need 10 more pages of 4 slots, but 8 of 8 are free .*num_pages") as caught:
        kvjax.generate(MODEL, [[1] * 40], 2, SMALL)
    assert (caught.value.needed, caught.value.available) == (10, 8)
    works()


def test_a_full_pool_keeps_what_was_generated_for_every_request() -> None:
    prompts = [[1] * 9, [2] * 5]
    free = kvjax.generate(MODEL, prompts, 20, CacheConfig(page_size=4))
    with pytest.raises(OutOfPages) as caught:
        kvjax.generate(MODEL, prompts, 20, SMALL)  # 13 pages wanted, of 8
    partial = caught.value.partial
    for tokens, wanted, logprobs in zip(partial.tokens, free.tokens, partial.logprobs, strict=True):
        assert 1 < len(tokens) < 20
        assert tokens == wanted[: len(tokens)]
        assert len(logprobs) == len(tokens)
    assert partial.finish_reason == ["out_of_pages"] * 2
    works()


def test_a_conversation_goes_on_after_its_pool_was_full() -> None:
    state = kvjax.prefill(MODEL, [[1] * 9, [2] * 5], SMALL)
    with pytest.raises(OutOfPages) as caught:
        kvjax.extend(MODEL, state, max_new_tokens=20)
    kept = caught.value.state
    assert [len(tokens) for tokens in kept.tokens] == [
        9 + len(caught.value.partial.tokens[0]),
        5 + len(caught.value.partial.tokens[1]),
    ]
    with pytest.raises(OutOfPages) as again:
        kvjax.extend(MODEL, kept, [[3] * 30, [3] * 30])
    assert again.value.state.tokens == kept.tokens


def test_weights_with_nan_are_reported_for_the_sequence_and_the_next_call_works() -> None:
    params = jax.tree.map(lambda leaf: leaf, MODEL.params)
    params["norm"] = {"scale": jnp.full_like(params["norm"]["scale"], np.nan)}
    with pytest.raises(KvjaxError, match="sequence 0: generated token 0 could not be drawn"):
        kvjax.generate(Model(CONFIG, params), NEXT, 2, SMALL)
    works()
