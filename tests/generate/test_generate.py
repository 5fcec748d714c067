"""What `generate`, `stream`, `prefill`, `extend` and `fork` promise, on the tiny model of `tests.cache.tiny`.

Greedy tokens are compared exactly: the likeliest logit is at least 3e-3 above the next, and float32 is off by 5e-6.
"""

from __future__ import annotations

import dataclasses
import string
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import kvjax
from kvjax import CacheConfig, ProcessorContext, Sampling
from kvjax.cache.codecs import Encoded
from kvjax.cache.policies import Full
from kvjax.cache.policies.protocol import EMPTY, Read, RowState, appended, highest_newest, oldest_lowest, overlaps
from kvjax.errors import OutOfPages
from tests.cache.tiny import (
    CHUNK,
    CONFIG,
    HEAVY,
    LOGITS,
    MARGIN,
    MODEL,
    PLAIN,
    STREAM,
    UNIFORM,
    VOCAB,
    cache_of,
    oracle,
    random_tokens,
)
from tests.oracles import decoder
from tests.oracles import policies as oracle_policies
from tests.oracles.weights import random_params

PROMPTS = [random_tokens(7, length).tolist() for length in (10, 1, 15, 5, 22)]
NEW = 9


def generate(prompts: list[Any], new: int = NEW, model: kvjax.Model = MODEL, **settings: Any) -> kvjax.GenerateOutput:
    """`kvjax.generate` with the programs that all tests here share."""
    return kvjax.generate(model, prompts, new, **({"cache": PLAIN, "prefill_chunk": CHUNK} | settings))


def with_tokenizer() -> kvjax.Model:
    """The model with a byte-level tokenizer of 64 bytes, without merges."""
    alphabet = "Ġ" + string.ascii_letters + string.digits + "."
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return dataclasses.replace(MODEL, tokenizer=tokenizer)


def log_probabilities(prompts: list[list[int]], tokens: list[list[int]]) -> list[np.ndarray]:
    """float32[new, V] per sequence: what the model without a cache says of each generated token."""
    padded = np.zeros((len(prompts), 32), np.int32)
    for row, prompt, generated in zip(padded, prompts, tokens, strict=True):
        row[: len(prompt) + len(generated)] = prompt + generated
    scores = np.asarray(jax.nn.log_softmax(kvjax.score(MODEL, padded)))
    return [
        row[len(prompt) - 1 : len(prompt) + len(generated) - 1]
        for row, prompt, generated in zip(scores, prompts, tokens, strict=True)
    ]


# Batches


def test_ragged_batches_of_any_size_generate_what_each_request_does():
    five = generate(PROMPTS)
    assert [len(tokens) for tokens in five.tokens] == [NEW] * 5
    assert five.finish_reason == ["length"] * 5
    assert five.text is None
    for size in (1, 2, 3):
        assert generate(PROMPTS[:size]).tokens == five.tokens[:size]
    assert generate(PROMPTS[2:]).tokens == five.tokens[2:]


def test_tokens_are_the_likeliest_and_log_probabilities_the_models_own():
    out = generate(PROMPTS[:4])
    for scores, tokens, logprobs in zip(
        log_probabilities(PROMPTS[:4], out.tokens), out.tokens, out.logprobs, strict=True
    ):
        assert scores.argmax(-1).tolist() == tokens
        np.testing.assert_allclose(logprobs, scores.max(-1), rtol=0, atol=LOGITS)


def test_stats_say_what_the_call_took():
    stats = generate(PROMPTS[:4]).stats
    assert stats.kv_bytes_per_token == 2 * 2 * (8 + 8) * 4  # layers, heads, key and value, float32
    assert stats.pages_total == 4 * 128 // 4
    assert stats.pool_bytes == stats.pages_total * 4 * stats.kv_bytes_per_token
    # The last token is drawn but never fed: 8 of the 9 come to the prompts' 10, 1, 15 and 5.
    assert stats.peak_pages == sum(-(-(length + NEW - 1) // 4) for length in (10, 1, 15, 5))
    assert (stats.shared_pages, stats.copied_pages) == (0, 0)
    assert stats.prefill_seconds > 0
    assert stats.tokens_per_second == pytest.approx(4 * NEW / stats.decode_seconds)


# Sampling

WARM = Sampling(temperature=1.0)


def test_samples_share_the_pages_of_their_prompt():
    prompts = [PROMPTS[0], PROMPTS[2][:8]]
    out = generate(prompts, sampling=dataclasses.replace(WARM, n=2))
    assert len(out.tokens) == 4
    assert out.tokens[0] != out.tokens[1]
    assert out.tokens[2] != out.tokens[3]
    # 10 tokens lie in 3 pages, the last half full: of its two holders one keeps it. 8 tokens fill their 2 pages.
    assert (out.stats.shared_pages, out.stats.copied_pages) == (5, 1)
    # 8 more tokens each: 5 pages of which 2 are shared, and 4 of which 2 are.
    assert out.stats.peak_pages == (2 + 3 + 3) + (2 + 2 + 2)
    # Every sample is one that the model would give alone: its log-probabilities are those of its own text.
    for scores, tokens, logprobs in zip(
        log_probabilities([prompts[0], prompts[0], prompts[1], prompts[1]], out.tokens),
        out.tokens,
        out.logprobs,
        strict=True,
    ):
        np.testing.assert_allclose(logprobs, scores[np.arange(NEW), tokens], rtol=0, atol=LOGITS)


def test_the_first_sample_is_the_one_that_would_be_alone():
    # Four sequences either way: at another padded batch size float32 may differ in its last bit.
    two = generate(PROMPTS[:2], sampling=dataclasses.replace(WARM, n=2, seeds=(5, 6)))
    one = generate(PROMPTS[:3], sampling=dataclasses.replace(WARM, seeds=(5, 6, 7)))
    assert two.tokens[::2] == one.tokens[:2]


def test_a_request_gives_the_same_tokens_whatever_its_batch_mates_and_place():
    first = generate(PROMPTS[:3], sampling=dataclasses.replace(WARM, seeds=(5, 6, 7)))
    second = generate(PROMPTS[3::-1], sampling=dataclasses.replace(WARM, seeds=(1, 7, 6, 5)))
    assert second.tokens[1:] == first.tokens[::-1]
    other = generate(PROMPTS[:3], sampling=dataclasses.replace(WARM, seeds=(8, 6, 7)))
    assert other.tokens[0] != first.tokens[0]
    assert other.tokens[1:] == first.tokens[1:]


def test_the_calls_seed_decides_where_requests_have_none():
    first, again, other = (generate(PROMPTS[:4], sampling=WARM, seed=seed).tokens for seed in (3, 3, 4))
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))
    same_prompt = generate([PROMPTS[0]] * 4, sampling=WARM).tokens
    assert len(set(map(tuple, same_prompt))) == 4, "each place in the batch has a seed of its own"


def odd_only(logits: jax.Array, context: ProcessorContext) -> jax.Array:
    """Forbids even tokens, and at the third draw all but token 33."""
    token = jnp.arange(logits.shape[-1])
    allowed = jnp.where((context.step == 2)[:, None], token == 33, token % 2 == 1)
    return jnp.where(allowed, logits, -jnp.inf)


def test_a_logits_processor_changes_what_is_drawn_but_not_the_log_probabilities():
    out = generate(PROMPTS[:4], logit_processors=[odd_only])
    for scores, tokens, logprobs in zip(
        log_probabilities(PROMPTS[:4], out.tokens), out.tokens, out.logprobs, strict=True
    ):
        likeliest = np.where(np.arange(VOCAB) % 2 == 1, scores, -np.inf).argmax(-1)
        likeliest[2] = 33
        assert likeliest.tolist() == tokens
        np.testing.assert_allclose(logprobs, scores[np.arange(NEW), tokens], rtol=0, atol=LOGITS)


# Stopping


def test_a_stop_token_ends_its_own_sequence_and_is_part_of_it():
    plain = generate(PROMPTS[:4])
    stop = plain.tokens[2][4]
    out = generate(PROMPTS[:4], sampling=Sampling(stop_tokens=(stop,)))
    for free, tokens, reason in zip(plain.tokens, out.tokens, out.finish_reason, strict=True):
        end = free.index(stop) + 1 if stop in free else NEW
        assert tokens == free[:end]
        assert reason == ("stop" if stop in free else "length")
    assert "stop" in out.finish_reason


def test_a_stop_string_ends_the_text_before_it():
    model = with_tokenizer()
    plain = generate(PROMPTS[:4], model=model)
    assert plain.text is not None
    assert plain.text == [model.tokenizer.decode(tokens) for tokens in plain.tokens]
    stop = plain.text[2][3:5]
    out = generate(PROMPTS[:4], model=model, sampling=Sampling(stop=(stop, "never seen")))
    for free, text, tokens, reason in zip(plain.text, out.text or [], out.tokens, out.finish_reason, strict=True):
        assert text == free.split(stop)[0]
        assert reason == ("stop" if stop in free else "length")
        # One token is one character here: tokens go on to the end of the stop string.
        assert len(tokens) == (free.index(stop) + len(stop) if stop in free else NEW)
    assert out.finish_reason[2] == "stop"


def test_text_prompts_are_tokenized():
    model = with_tokenizer()
    texts = [model.tokenizer.decode(prompt) for prompt in PROMPTS[:4]]
    assert generate(texts, model=model).tokens == generate(PROMPTS[:4]).tokens


# Streaming


@pytest.mark.parametrize("stop", [False, True])
def test_streamed_text_is_what_generate_returns(stop):
    model = with_tokenizer()
    sampling = Sampling()
    if stop:
        text = generate(PROMPTS[:1], 20, model=model).text
        assert text is not None
        sampling = Sampling(stop=text[0][12:14])
    whole = generate(PROMPTS[:1], 20, model=model, sampling=sampling)
    stream = kvjax.stream(model, PROMPTS[0], 20, PLAIN, sampling, prefill_chunk=CHUNK)
    assert stream.output is None
    pieces = list(stream)
    assert len(pieces) > 2
    assert whole.text == ["".join(pieces)]
    assert stream.output is not None
    assert stream.output.tokens == whole.tokens
    assert stream.output.finish_reason == whole.finish_reason == ["stop" if stop else "length"]


def test_without_a_tokenizer_token_ids_are_streamed():
    assert list(kvjax.stream(MODEL, PROMPTS[0], 20, PLAIN, prefill_chunk=CHUNK)) == generate(PROMPTS[:1], 20).tokens[0]


# Turns over a live cache


def two_turns(cache: CacheConfig) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Five tokens behind four prompts, more prompts, and four tokens behind those."""
    more = [random_tokens(11, length).tolist() for length in (3, 8, 1, 5)]
    state = kvjax.prefill(MODEL, PROMPTS[:4], cache, prefill_chunk=CHUNK)
    first, state = kvjax.extend(MODEL, state, max_new_tokens=5)
    second, state = kvjax.extend(MODEL, state, more, max_new_tokens=4, prefill_chunk=CHUNK)
    texts = [list(prompt) for prompt in state.tokens]
    turns = zip(PROMPTS, first.tokens, more, second.tokens, strict=False)
    assert texts == [[token for part in turn for token in part] for turn in turns]
    return first.tokens, more, second.tokens


@pytest.mark.parametrize("policy", [Full(), pytest.param(STREAM, marks=pytest.mark.slow)], ids=str)
def test_turns_equal_one_long_prompt_where_tokens_are_kept_by_position(policy):
    cache = cache_of(UNIFORM[policy])
    first, more, second = two_turns(cache)
    assert generate(PROMPTS[:4], 5, cache=cache).tokens == first
    long = [prompt + tokens + added for prompt, tokens, added in zip(PROMPTS, first, more, strict=False)]
    assert generate(long, 4, cache=cache).tokens == second


def test_turns_under_a_policy_that_scores_tokens_go_on_from_what_it_holds():
    first, more, second = two_turns(cache_of(UNIFORM[HEAVY]))
    for prompt, tokens, added, last in zip(PROMPTS, first, more, second, strict=False):
        result = oracle(tuple(prompt), tuple(tokens + added + last), UNIFORM[HEAVY])
        assert result.margin > MARGIN, "these tokens leave a choice to rounding"
        likeliest = result.step_logits.argmax(-1).tolist()
        assert likeliest[:5] == tokens
        assert likeliest[-5:-1] == last


@pytest.mark.parametrize("policy", [Full(), HEAVY, pytest.param(STREAM, marks=pytest.mark.slow)], ids=str)
def test_generation_in_pieces_equals_generation_at_once(policy):
    cache = cache_of(UNIFORM[policy])
    state = kvjax.prefill(MODEL, PROMPTS[:4], cache, prefill_chunk=CHUNK)
    pieces: list[list[int]] = [[], [], [], []]
    for new in (1, 6, 2):
        out, state = kvjax.extend(MODEL, state, max_new_tokens=new)
        for piece, tokens in zip(pieces, out.tokens, strict=True):
            piece += tokens
    assert pieces == generate(PROMPTS[:4], 9, cache=cache).tokens


@pytest.mark.parametrize("kind", ["string", "token"])
def test_a_turn_after_a_stop_goes_on_from_the_last_token_given(kind):
    # Either ends the first sequence in the middle of a block, and what the block would go on with must not be held.
    model = with_tokenizer()
    plain = generate(PROMPTS[:4], 6, model=model)
    assert plain.text is not None
    sampling = Sampling(stop=plain.text[0][1:3]) if kind == "string" else Sampling(stop_tokens=(plain.tokens[0][2],))
    state = kvjax.prefill(model, PROMPTS[:4], PLAIN, prefill_chunk=CHUNK)
    first, state = kvjax.extend(model, state, max_new_tokens=6, sampling=sampling)
    assert first.tokens[0] == plain.tokens[0][:3]
    second, _ = kvjax.extend(model, state, [[9, 8]] * 4, max_new_tokens=4, prefill_chunk=CHUNK)
    long = [prompt + tokens + [9, 8] for prompt, tokens in zip(PROMPTS, first.tokens, strict=False)]
    assert second.tokens == generate(long, 4).tokens


NEWLINE = 40
"""In `with_newlines`."""


def with_newlines() -> kvjax.Model:
    """The model with letters and byte tokens, whose text is certain only with the token after them."""
    vocab = {"<0x0A>" if token == NEWLINE else chr(0x100 + token): token for token in range(64)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return dataclasses.replace(MODEL, tokenizer=tokenizer)


def newline_second(logits: jax.Array, context: ProcessorContext) -> jax.Array:
    """The second token drawn is a newline."""
    forced = (context.step == 1)[:, None] == (jnp.arange(logits.shape[-1]) == NEWLINE)
    return jnp.where(forced, logits, -jnp.inf)


def test_what_was_drawn_before_a_stop_was_certain_stays_part_of_the_state():
    model = with_newlines()
    state = kvjax.prefill(model, PROMPTS[:2], PLAIN, prefill_chunk=CHUNK)
    stop = Sampling(stop="\n")
    first, state = kvjax.extend(model, state, max_new_tokens=6, sampling=stop, logit_processors=[newline_second])
    assert [tokens[1:] for tokens in first.tokens] == [[NEWLINE]] * 2
    drawn = [tokens[len(prompt) :] for prompt, tokens in zip(PROMPTS, state.tokens, strict=False)]
    assert [list(tokens[:2]) for tokens in drawn] == first.tokens
    assert [len(tokens) for tokens in drawn] == [3, 3], "the token by which it became certain"
    second, _ = kvjax.extend(model, state, [[9, 8]] * 2, max_new_tokens=4, prefill_chunk=CHUNK)
    long = [prompt + list(tokens) + [9, 8] for prompt, tokens in zip(PROMPTS, drawn, strict=False)]
    assert second.tokens == generate(long, 4).tokens


def test_forks_of_a_state_take_different_turns():
    state = kvjax.fork(kvjax.prefill(MODEL, PROMPTS[:2], PLAIN, prefill_chunk=CHUNK), 2)
    more = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
    out, state = kvjax.extend(MODEL, state, more, max_new_tokens=NEW, prefill_chunk=CHUNK)
    long = [PROMPTS[b // 2] + added for b, added in enumerate(more)]
    assert out.tokens == generate(long).tokens
    assert out.stats.copied_pages == 2, "the open pages of 10 and of 1 token, of two holders each"


@pytest.mark.slow
def test_a_state_grows_beyond_what_it_was_made_for():
    prompts = random_tokens(12, 4, 120).tolist()
    state = kvjax.prefill(MODEL, prompts, PLAIN, prefill_chunk=CHUNK)
    out, state = kvjax.extend(MODEL, state, max_new_tokens=20)
    assert state.cache.groups[0].table.shape[2] == 256 // 4
    assert out.tokens == generate(prompts, 20).tokens


# A pool that is too small

TIGHT = CacheConfig(page_size=4, num_pages=12)


def test_a_full_pool_keeps_what_every_request_has_and_the_next_call_works():
    expected = generate([*PROMPTS[:3], [1]], 12).tokens
    with pytest.raises(OutOfPages, match=r"12 are free .*raise CacheConfig.num_pages or memory_bytes") as raised:
        generate(PROMPTS[:3], 12, cache=TIGHT)
    error = raised.value
    assert error.needed > error.available
    # With 6 more tokens each the prompts of 10, 1 and 15 fill 4 + 2 + 6 pages; a seventh was drawn but has no slot.
    assert error.partial.tokens == [tokens[:7] for tokens in expected[:3]]
    assert [len(logprobs) for logprobs in error.partial.logprobs] == [7] * 3
    assert error.partial.finish_reason == ["out_of_pages"] * 3
    assert error.partial.stats.peak_pages == 12
    assert generate(PROMPTS[:3], 7, cache=TIGHT).tokens == [tokens[:7] for tokens in expected[:3]]


def test_what_had_ended_before_the_pool_was_full_keeps_its_reason():
    stop = generate(PROMPTS[:3], 2, cache=TIGHT).tokens[1][1]
    with pytest.raises(OutOfPages) as raised:
        generate(PROMPTS[:3], 30, cache=TIGHT, sampling=Sampling(stop_tokens=(stop,)))
    assert raised.value.partial.finish_reason[1] == "stop"
    assert "out_of_pages" in raised.value.partial.finish_reason
    # What one does not take, the others can.
    assert max(map(len, raised.value.partial.tokens)) > 7


def test_a_live_state_survives_a_turn_that_does_not_fit():
    state = kvjax.prefill(MODEL, PROMPTS[:3], TIGHT, prefill_chunk=CHUNK)
    first, state = kvjax.extend(MODEL, state, max_new_tokens=2)
    with pytest.raises(OutOfPages) as raised:
        kvjax.extend(MODEL, state, [[1] * 20] * 3, max_new_tokens=4, prefill_chunk=CHUNK)
    assert raised.value.partial is None
    again = raised.value.state
    assert [list(tokens) for tokens in again.tokens] == [
        prompt + tokens for prompt, tokens in zip(PROMPTS, first.tokens, strict=False)
    ]
    out, _ = kvjax.extend(MODEL, again, [[3]] * 3, max_new_tokens=3, prefill_chunk=CHUNK)
    long = [prompt + tokens + [3] for prompt, tokens in zip(PROMPTS, first.tokens, strict=False)]
    assert out.tokens == generate([*long, [1]], 3).tokens[:3]


def test_a_live_state_survives_running_out_in_the_middle_of_a_turn():
    state = kvjax.prefill(MODEL, PROMPTS[:3], TIGHT, prefill_chunk=CHUNK)
    with pytest.raises(OutOfPages) as raised:
        kvjax.extend(MODEL, state, max_new_tokens=30)
    partial, state = raised.value.partial, raised.value.state
    assert [list(tokens) for tokens in state.tokens] == [
        prompt + tokens for prompt, tokens in zip(PROMPTS, partial.tokens, strict=False)
    ]
    with pytest.raises(OutOfPages) as raised:
        kvjax.extend(MODEL, state, max_new_tokens=1)
    assert raised.value.partial.tokens == [[], [], []]
    assert raised.value.state.tokens == state.tokens


def test_memory_bytes_sizes_the_pool():
    cache = CacheConfig(page_size=4, memory_bytes=12 * 4 * 256 + 1000)
    out = generate(PROMPTS[:3], 7, cache=cache)
    assert out.stats.pages_total == 12
    assert out.stats.pool_bytes == 12 * 4 * 256
    assert out.tokens == generate(PROMPTS[:3], 7, cache=TIGHT).tokens


# Methods that users bring


@dataclasses.dataclass(frozen=True)
class Popular:
    """A policy written from the protocol alone: per layer, the `budget` tokens that all heads look at most."""

    budget: int
    rows: Literal["layer"] = "layer"
    observes: bool = True
    in_order: bool = False
    append_only: bool = False

    def capacity(self, tokens: int) -> int:
        return min(tokens, self.budget + 1)

    def slots(self, length: jax.Array, victim: jax.Array, seen: jax.Array, positions: jax.Array) -> jax.Array:
        behind = appended(length, seen, positions)
        return jnp.where((victim[..., None] >= 0) & (behind >= 0), victim[..., None], behind)

    def touches(self, length: jax.Array, seen: jax.Array, n: jax.Array, starts: jax.Array, page_size: int) -> jax.Array:
        # Cautious: everything a row may ever hold, as soon as it gets a token.
        end = jnp.where(n > 0, jnp.minimum(length + n, self.budget + 1), 0)
        return overlaps(jnp.zeros_like(length), end, starts, page_size)

    def reads(self, window: int | None) -> tuple[Read, ...]:
        return (Read(window=window),)

    def row_state(self, rows: int, batch: int, slots: int) -> RowState:
        return {"popularity": jnp.zeros((rows, batch, slots), jnp.float32)}

    def prompt_rows(self, positions: jax.Array, lengths: jax.Array) -> jax.Array:
        return (positions >= 0).astype(jnp.float32)

    def observe(self, state: RowState, weights: jax.Array, active: jax.Array) -> RowState:
        added = jnp.where(active[:, None], jnp.sum(weights, axis=0, keepdims=True), 0.0)
        return {"popularity": state["popularity"] + added}

    def victims(self, state: RowState, position: jax.Array, length: jax.Array) -> jax.Array:
        score = jnp.where(position >= 0, state["popularity"], jnp.inf)
        return jnp.where(length > self.budget, oldest_lowest(score, position), EMPTY)

    def keep(self, state: RowState, position: jax.Array) -> jax.Array:
        return highest_newest(jnp.where(position >= 0, state["popularity"], -jnp.inf), position, self.budget)


@dataclasses.dataclass(frozen=True)
class Coarse:
    """A codec written from the protocol alone: 6-bit codes, one scale of the largest element per vector."""

    def encode(self, x: jax.Array) -> Encoded:
        scale = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1) / 31
        codes = jnp.round(x / jnp.where(scale > 0, scale, 1)[..., None])
        return Encoded(jnp.clip(codes, -31, 31).astype(jnp.int8), scale)

    def decode(self, stored: Encoded, dtype: Any) -> jax.Array:
        assert stored.scale is not None
        return (stored.values * stored.scale[..., None]).astype(dtype)

    def bytes_per_vector(self, width: int, dtype: Any) -> int:
        return width + 4


@dataclasses.dataclass(frozen=True)
class PopularOracle(oracle_policies.Full):
    budget: int

    def keep(self, held: list[Any], rows: Any, query: int) -> oracle_policies.Decision:
        scores = {entry.position: entry.score for entry in held[0]}
        for entries in held[1:]:
            for entry in entries:
                scores[entry.position] += entry.score
        kept, margin = oracle_policies.top(scores, self.budget)
        return oracle_policies.Decision([set(kept) for _ in held], margin)


@dataclasses.dataclass(frozen=True)
class CoarseOracle:
    def roundtrip(self, x: np.ndarray) -> np.ndarray:
        scale = np.max(np.abs(x), axis=-1, keepdims=True) / 31
        return np.rint(x / scale) * scale


def test_policies_and_codecs_that_users_write_work_like_ours():
    assert isinstance(Popular(6), kvjax.Policy)
    assert isinstance(Coarse(), kvjax.Codec)
    out = generate(PROMPTS[:4], cache=CacheConfig(page_size=4, policy=Popular(6), codec=Coarse()))
    assert out.stats.kv_bytes_per_token == 2 * 2 * 2 * (8 + 4)
    exact = 0
    for prompt, tokens, logprobs in zip(PROMPTS, out.tokens, out.logprobs, strict=False):
        result = decoder.run(random_params(CONFIG, 1), CONFIG, prompt, tokens[:-1], PopularOracle(6), CoarseOracle())
        assert result.margin > MARGIN, "these tokens leave a choice to rounding"
        logits = result.step_logits
        logits = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
        if np.abs(logits[np.arange(NEW), tokens] - logprobs).max() < LOGITS:
            exact += 1
            assert logits.argmax(-1).tolist() == tokens
    # A code near a half may fall to the other side in float32; two in four texts would be no accident.
    assert exact >= 3
    plain = generate(PROMPTS[:4]).logprobs
    assert max(np.abs(np.subtract(a, b)).max() for a, b in zip(out.logprobs, plain, strict=True)) > 0.05
