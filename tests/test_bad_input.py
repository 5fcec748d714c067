"""What users get wrong is answered by an exception that says what was given and what to do; the next call works."""

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
from tests.cache.tiny import CHUNK, CONFIG, MODEL, VOCAB, model_of, random_tokens

SMALL = CacheConfig(page_size=4, num_pages=12)  # 48 slots, the pool of tests/generate/test_generate.py
NEXT = [[1, 2, 3], [4], [5] * 6]


def nothing_left(logits: jax.Array, context: kvjax.ProcessorContext) -> jax.Array:
    """Leaves nothing to draw from."""
    return jnp.full_like(logits, -jnp.inf)


def generate(prompts: Any, new: Any = 2, cache: CacheConfig = SMALL, model: Model = MODEL, **settings: Any) -> Any:
    """`kvjax.generate` with programs that other tests have compiled."""
    return kvjax.generate(model, prompts, new, cache, **({"prefill_chunk": CHUNK} | settings))


def works() -> None:
    """The next call is served."""
    assert [len(tokens) for tokens in generate(NEXT).tokens] == [2, 2, 2]


def dead_state() -> kvjax.State:
    """A state that a call has consumed."""
    state = kvjax.prefill(MODEL, NEXT, SMALL, prefill_chunk=CHUNK)
    kvjax.extend(MODEL, state, max_new_tokens=2)
    return state


BAD_REQUESTS: dict[str, tuple[Callable[[], Any], str]] = {
    "no prompts": (lambda: kvjax.generate(MODEL, []), "at least one prompt"),
    "nothing": (lambda: kvjax.generate(MODEL, None), "list of texts or of token-id lists, got None"),  # type: ignore
    "a flat list": (lambda: kvjax.generate(MODEL, [1, 2]), "prompt 0 must be text or a flat list .* got 1"),
    "an empty prompt": (lambda: kvjax.generate(MODEL, [[1], []]), "prompt 1 is empty"),
    "bare text": (lambda: kvjax.generate(MODEL, "text"), "must be a list"),
    "text without tokenizer": (lambda: kvjax.generate(MODEL, ["text"]), "no tokenizer"),
    "token id too large": (lambda: kvjax.generate(MODEL, [[1, VOCAB]]), f"token id {VOCAB}; .* 0 to {VOCAB - 1}"),
    "negative token id": (lambda: kvjax.generate(MODEL, [[-1]]), "token id -1"),
    "fractions": (lambda: kvjax.generate(MODEL, [[0.5, 1.0]]), "integer token ids"),
    "booleans": (lambda: kvjax.generate(MODEL, [[True]]), "integer token ids"),
    "huge token id": (lambda: kvjax.generate(MODEL, [[2**70]]), "integer token ids"),
    "uneven prompt": (lambda: kvjax.generate(MODEL, [[1, [2]]]), "flat list"),
    "nested prompt": (lambda: kvjax.generate(MODEL, [[[1, 2]]]), "flat list"),
    "no new tokens": (lambda: kvjax.generate(MODEL, NEXT, 0), "at least 1, got 0"),
    "negative new tokens": (lambda: kvjax.generate(MODEL, NEXT, -3), "got -3"),
    "boolean new tokens": (lambda: kvjax.generate(MODEL, NEXT, True), "got True"),
    "fractional new tokens": (lambda: kvjax.generate(MODEL, NEXT, 2.5), "got 2.5"),  # type: ignore[arg-type]
    "no chunk": (lambda: kvjax.generate(MODEL, NEXT, prefill_chunk=0), "prefill_chunk .* got 0"),
    "negative chunk": (lambda: kvjax.score(MODEL, [[1]], path="prefill", prefill_chunk=-1), "got -1"),
    "seed too large": (lambda: generate(NEXT, sampling=Sampling(seeds=(1, 2**32, 2))), "of prompt 1 is out of range"),
    "seeds of another count": (lambda: kvjax.generate(MODEL, NEXT, sampling=Sampling(seeds=(1, 2))), "2 seeds for 3"),
    "negative seed": (lambda: kvjax.generate(MODEL, NEXT, seed=-1), "seed must be"),
    "stop string without tokenizer": (lambda: kvjax.generate(MODEL, NEXT, sampling=Sampling(stop="a")), "stop_tokens"),
    "stop token outside": (lambda: kvjax.generate(MODEL, NEXT, sampling=Sampling(stop_tokens=(99,))), "has 99"),
    "stream of several": (lambda: kvjax.stream(MODEL, [1], sampling=Sampling(n=2)), "n=1"),
    "score of a flat list": (lambda: kvjax.score(MODEL, [1, 2]), r"tokens\[B, T\]"),
    "score outside the vocabulary": (lambda: kvjax.score(MODEL, [[VOCAB]]), f"0 to {VOCAB - 1}"),
    "score on an unknown path": (lambda: kvjax.score(MODEL, [[1]], path="sideways"), "sideways"),  # type: ignore
    "score with too long a prompt": (lambda: kvjax.score(MODEL, [[1]], path="decode", prompt_length=2), "got 2"),
    "a consumed state": (lambda: kvjax.extend(MODEL, dead_state()), "consumed by an earlier call"),
    "a fork of a consumed state": (lambda: kvjax.fork(dead_state(), 2), "consumed by an earlier call"),
    "fork into none": (lambda: kvjax.fork(None, 0), "at least 1"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_says_what_is_allowed(case: str) -> None:
    call, message = BAD_REQUESTS[case]
    with pytest.raises(RequestError, match=message):
        call()
    works()


BAD_CONFIGS: dict[str, tuple[Callable[[], Any], str]] = {
    "page size": (lambda: CacheConfig(page_size=3), "power of two, got 3"),
    "no pages": (lambda: CacheConfig(num_pages=0), "got 0"),
    "two sizes": (lambda: CacheConfig(num_pages=4, memory_bytes=4096), "not both"),
    "not a policy": (lambda: CacheConfig(policy="full"), "policy must be"),  # type: ignore[arg-type]
    "not a codec": (lambda: CacheConfig(codec=8), "codec must be"),  # type: ignore[arg-type]
    "a select": (lambda: CacheConfig(select=object()), "one of kvjax.selects, got <object"),
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
    works()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": [[4]]}, "has 3 sequences, got 1 prompts"),
        ({"prompts": [[4], [], [5]]}, "prompt 1 is empty"),
        ({"max_new_tokens": 0}, "at least 1, got 0"),
        ({"prefill_chunk": 0}, "prefill_chunk"),
        ({"sampling": Sampling(n=2)}, "n=2"),
        ({"sampling": Sampling(stop_tokens=(VOCAB,))}, f"has {VOCAB}"),
        ({"sampling": Sampling(stop="a")}, "tokenizer"),
        ({"logit_processors": [3]}, "must be callable"),
    ],
    ids=str,
)
def test_a_refused_turn_leaves_the_state_as_it_was(settings: dict[str, Any], message: str) -> None:
    state = kvjax.prefill(MODEL, NEXT, SMALL, prefill_chunk=CHUNK)
    with pytest.raises(KvjaxError, match=message):
        kvjax.extend(MODEL, state, **({"prompts": [[4], [5], [6]]} | settings))
    assert kvjax.extend(MODEL, state, max_new_tokens=2)[0].tokens == generate(NEXT).tokens


def test_a_prompt_longer_than_the_pool_is_out_of_pages_and_the_next_call_works() -> None:
    with pytest.raises(OutOfPages, match=r"need 17 more pages of 4 slots, but 12 of 12 are free .*num_pages") as caught:
        generate([[1] * 60, [2], [3]])
    assert (caught.value.needed, caught.value.available) == (17, 12)
    assert caught.value.partial is None
    works()


def test_weights_with_nan_are_reported_for_the_sequence_and_the_next_call_works() -> None:
    params = jax.tree.map(lambda leaf: leaf, MODEL.params)
    params["embed"] = {"embedding": params["embed"]["embedding"].at[9].set(np.nan)}
    broken = Model(CONFIG, params)
    with pytest.raises(KvjaxError, match="sequence 1: generated token 0 could not be drawn: its logits hold NaN"):
        generate([[1], [2, 9], [3]], model=broken)
    assert generate(NEXT, model=broken).tokens == generate(NEXT).tokens


def test_a_processor_that_leaves_nothing_to_draw_is_reported_and_the_next_call_works() -> None:
    with pytest.raises(KvjaxError, match="sequence 0: .* left every token at -inf"):
        generate(NEXT, logit_processors=[nothing_left])
    works()


@pytest.mark.slow
def test_a_context_smaller_than_the_call_needs_loses_no_token() -> None:
    prompts = random_tokens(0, 1, 150).tolist()
    cache = CacheConfig(page_size=4)
    assert generate(prompts, cache=cache, context=40).logprobs == generate(prompts, cache=cache).logprobs
