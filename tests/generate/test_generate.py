"""The public calls: batches, samples, seeds, stops, streams, turns, hooks, and methods that users bring themselves."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import CacheConfig, ProcessorContext, Sampling
from kvjax.cache.codecs import Encoded
from kvjax.cache.policies import H2O, Full, StreamingLLM
from kvjax.cache.policies.bases import Positional
from kvjax.cache.policies.protocol import Read, appended, overlaps
from kvjax.train.tokenizer import byte_tokenizer
from tests.cache.tiny import CONFIG, model_of, random_tokens

MODEL = model_of()
BYTES = model_of(dataclasses.replace(CONFIG, vocab_size=260))
SPOKEN = kvjax.Model(BYTES.config, BYTES.params, byte_tokenizer())
CACHE = CacheConfig(page_size=4)
NEW = 12
PROMPTS = [random_tokens(seed, length).tolist() for seed, length in enumerate((5, 1, 9, 3))]
HOT = Sampling(temperature=1.5)


@pytest.fixture(scope="module")
def greedy() -> kvjax.GenerateOutput:
    return kvjax.generate(MODEL, PROMPTS, NEW, CACHE)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_ragged_batch_of_any_size_equals_each_prompt_alone(count: int, greedy: kvjax.GenerateOutput) -> None:
    out = kvjax.generate(MODEL, PROMPTS[:count], NEW, CACHE)
    assert out.tokens == greedy.tokens[:count]
    assert out.finish_reason == ["length"] * count
    assert out.text is None


def test_log_probabilities_are_those_of_score(greedy: kvjax.GenerateOutput) -> None:
    for prompt, tokens, logprobs in zip(PROMPTS, greedy.tokens, greedy.logprobs, strict=True):
        logits = kvjax.score(MODEL, [prompt + tokens])[0, len(prompt) - 1 : -1]
        expected = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(tokens)[:, None], 1)[:, 0]
        np.testing.assert_allclose(logprobs, expected, atol=1e-4)  # float32 sums in another order


def test_the_same_request_gives_the_same_tokens_whatever_its_batch_mates() -> None:
    seeds = (7, 8, 9, 10)
    together = kvjax.generate(MODEL, PROMPTS, NEW, CACHE, dataclasses.replace(HOT, seeds=seeds))
    order = (2, 0, 3, 1)
    shuffled = kvjax.generate(
        MODEL,
        [PROMPTS[i] for i in order],
        NEW,
        CACHE,
        dataclasses.replace(HOT, seeds=tuple(seeds[i] for i in order)),
    )
    assert [together.tokens[i] for i in order] == shuffled.tokens
    other = kvjax.generate(MODEL, PROMPTS, NEW, CACHE, dataclasses.replace(HOT, seeds=(1, 2, 3, 4)))
    assert other.tokens != together.tokens


def test_samples_of_a_prompt_share_its_pages_and_copy_only_what_they_write() -> None:
    prompt = random_tokens(3, 10).tolist()
    out = kvjax.generate(MODEL, [prompt], NEW, CACHE, dataclasses.replace(HOT, n=4))
    assert len({tuple(tokens) for tokens in out.tokens}) > 1
    # 10 tokens are two full pages and a half: three shared; all four write the third, three of them into a copy.
    assert (out.stats.shared_pages, out.stats.copied_pages) == (3, 3)
    # Their own pages: 10 + 11 tokens end in the sixth page, of which two stay shared.
    assert out.stats.peak_pages == 2 + 4 * 4
    first = kvjax.generate(MODEL, [prompt], NEW, CACHE, HOT)
    assert first.tokens[0] == out.tokens[0]


def test_a_stop_token_ends_its_sequence_only(greedy: kvjax.GenerateOutput) -> None:
    stop = greedy.tokens[0][4]
    out = kvjax.generate(MODEL, PROMPTS, NEW, CACHE, Sampling(stop_tokens=(stop,)))
    for tokens, free, reason in zip(out.tokens, greedy.tokens, out.finish_reason, strict=True):
        ends = free.index(stop) + 1 if stop in free else NEW
        assert tokens == free[:ends]
        assert reason == ("stop" if stop in free else "length")


def test_a_stop_string_ends_the_text_before_it_and_the_tokens_with_it() -> None:
    free = kvjax.generate(SPOKEN, ["x = 1"], 40, CACHE, HOT)
    assert free.text is not None
    stop = free.text[0][10:12]
    out = kvjax.generate(SPOKEN, ["x = 1"], 40, CACHE, dataclasses.replace(HOT, stop=stop))
    assert out.text == [free.text[0].split(stop)[0]]
    assert out.finish_reason == ["stop"]
    assert out.tokens[0] == free.tokens[0][: len(out.tokens[0])]
    assert len(out.logprobs[0]) == len(out.tokens[0])


def test_a_stream_gives_what_generate_gives() -> None:
    whole = kvjax.generate(SPOKEN, ["def f("], 30, CACHE, HOT)
    stream = kvjax.stream(SPOKEN, "def f(", 30, CACHE, HOT)
    pieces = list(stream)
    assert len(pieces) > 1
    assert ["".join(pieces)] == whole.text
    assert stream.output is not None
    assert stream.output.tokens == whole.tokens
    ids = kvjax.stream(MODEL, PROMPTS[0], NEW, CACHE)
    assert list(ids) == kvjax.generate(MODEL, PROMPTS[:1], NEW, CACHE).tokens[0]


@pytest.mark.parametrize("policy", [Full(), StreamingLLM(2, 6), H2O(3, 3)], ids=repr)
def test_turns_over_one_live_cache_equal_one_long_run(policy: Any) -> None:
    cache = CacheConfig(page_size=4, policy=policy)
    whole = kvjax.generate(MODEL, PROMPTS, NEW, cache)
    state = kvjax.prefill(MODEL, PROMPTS, cache)
    first, state = kvjax.extend(MODEL, state, max_new_tokens=5)
    second, state = kvjax.extend(MODEL, state, max_new_tokens=NEW - 5)
    assert [a + b for a, b in zip(first.tokens, second.tokens, strict=True)] == whole.tokens
    assert state.tokens == tuple((*p, *t) for p, t in zip(PROMPTS, whole.tokens, strict=True))


def test_a_second_prompt_in_a_conversation_equals_the_whole_text_at_once() -> None:
    state = kvjax.prefill(MODEL, PROMPTS, CACHE)
    said, state = kvjax.extend(MODEL, state, max_new_tokens=5)
    more = PROMPTS[::-1]
    answer, state = kvjax.extend(MODEL, state, more, max_new_tokens=NEW)
    texts = [p + t + m for p, t, m in zip(PROMPTS, said.tokens, more, strict=True)]
    assert answer.tokens == kvjax.generate(MODEL, texts, NEW, CACHE).tokens


def test_forks_of_a_state_go_their_own_ways() -> None:
    state = kvjax.fork(kvjax.prefill(MODEL, PROMPTS[:2], CACHE), 2)
    tails = [[1], [2, 3], [4, 5, 6], [7]]
    out, _ = kvjax.extend(MODEL, state, tails, max_new_tokens=NEW)
    texts = [PROMPTS[i // 2] + tail for i, tail in enumerate(tails)]
    assert out.tokens == kvjax.generate(MODEL, texts, NEW, CACHE).tokens


def only_even(logits: jax.Array, context: ProcessorContext) -> jax.Array:
    """Forbids odd tokens from the third on."""
    odd = (jnp.arange(logits.shape[1]) % 2 == 1) & (context.step >= 2)[:, None]
    return jnp.where(odd, -jnp.inf, logits)


def test_a_users_logit_processor_is_obeyed() -> None:
    out = kvjax.generate(MODEL, PROMPTS, NEW, CACHE, HOT, logit_processors=(only_even,))
    assert all(token % 2 == 0 for tokens in out.tokens for token in tokens[2:])
    assert any(token % 2 for tokens in out.tokens for token in tokens[:2])


def test_memory_bytes_sizes_the_pool() -> None:
    out = kvjax.generate(MODEL, PROMPTS[:1], NEW, CacheConfig(page_size=4, memory_bytes=50_000))
    assert 40_000 < out.stats.pool_bytes <= 50_000
    assert out.stats.pool_bytes == out.stats.pages_total * 4 * out.stats.kv_bytes_per_token


@dataclasses.dataclass(frozen=True)
class FirstTokens(Positional):
    """A user's policy: keeps the first `count` tokens, and the newest one in the slot behind them."""

    count: int
    rows: str = dataclasses.field(default="shared", init=False)
    in_order: bool = dataclasses.field(default=False, init=False)
    append_only: bool = dataclasses.field(default=False, init=False)

    def capacity(self, tokens: int) -> int:
        return min(tokens, self.count + 1)

    def slots(self, length: jax.Array, victim: jax.Array, seen: jax.Array, positions: jax.Array) -> jax.Array:
        behind = appended(length, seen, positions)
        newest = positions == jnp.max(positions, axis=1, keepdims=True)
        late = jnp.where(newest, self.count, -1)
        return jnp.where(positions < self.count, jnp.where(positions >= 0, positions, -1), late) + 0 * behind

    def touches(self, length: jax.Array, seen: jax.Array, n: jax.Array, starts: jax.Array, size: int) -> jax.Array:
        first = jnp.minimum(seen, self.count) + 0 * length
        last = jnp.minimum(seen + n, self.count + 1) + 0 * length
        return overlaps(jnp.where(n > 0, jnp.minimum(first, last - 1), last), last, starts, size)

    def reads(self, window: int | None) -> tuple[Read, ...]:
        return (Read(window=window),)

    def keep(self, state: Any, position: jax.Array) -> jax.Array:
        return position < self.count


@dataclasses.dataclass(frozen=True)
class Halves:
    """A user's codec: float16."""

    def encode(self, x: jax.Array) -> Encoded:
        return Encoded(x.astype(jnp.float16))

    def decode(self, stored: Encoded, dtype: Any) -> jax.Array:
        return stored.values.astype(dtype)

    def bytes_per_vector(self, width: int, dtype: Any) -> int:
        return 2 * width


def test_a_users_own_policy_and_codec_work_like_ours() -> None:
    everything = CacheConfig(page_size=4, policy=FirstTokens(100), codec=Halves())  # type: ignore[arg-type]
    ours = CacheConfig(page_size=4, codec=kvjax.codecs.Dense("float16"))
    out = kvjax.generate(MODEL, PROMPTS, NEW, everything)
    assert out.tokens == kvjax.generate(MODEL, PROMPTS, NEW, ours).tokens
    few = kvjax.generate(MODEL, PROMPTS, NEW, CacheConfig(page_size=4, policy=FirstTokens(4), codec=Halves()))  # type: ignore[arg-type]
    assert few.stats.peak_pages == 4 * 2
    assert few.stats.kv_bytes_per_token == 2 * 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.width
