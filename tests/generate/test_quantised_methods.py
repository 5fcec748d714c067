"""Quantising codecs against the NumPy oracle, on the paths that share, reorder and extend what is coded.

Weights, caches and shapes are those of `tests.cache.tiny`. Logits are compared after a ragged batch of prompts, one of
a single token, and after every token forced behind them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import CacheConfig, Sampling
from kvjax.cache.codecs import FP8, KIVI, Dense, Int4
from kvjax.cache.policies import H2O, Full, PyramidKV, SlidingWindow, SnapKV
from kvjax.config import ModelConfig
from kvjax.errors import ConfigError
from kvjax.generate.decode import take_sequences
from tests.cache.tiny import (
    BATCH,
    CHUNK,
    LOGITS,
    MODEL,
    Choice,
    cache_of,
    feed,
    held_everywhere,
    logits_after,
    oracle,
    random_tokens,
)
from tests.generate.test_memory_contract import PAGES, abstract_cache, lower
from tests.generate.test_variant_matrix import VARIANTS
from tests.models.cases import BASE, model_of, random_params
from tests.oracles import codecs as oracle_codecs
from tests.oracles import decoder
from tests.oracles import policies as oracle_policies

FORCED = 9
ROWS = random_tokens(5, BATCH, 24).tolist()
RAGGED = [(tuple(row[:n]), tuple(row[n : n + FORCED])) for row, n in zip(ROWS, (10, 1, 15, 5), strict=True)]

SMALL_KIVI = KIVI(bits=2, group=4, residual=8)
"""Most sequences here code keys and values both at their prompt and while decoding."""

ONE_FLIP = 0.5
"""How far logits may be off once a code rounded the other way, float32 and float64 on two sides of a half: a fifteenth
of what a group spans in 4 bits, an eighth of a number in e4m3. In KIVI a scale that rounds to the next float16 moves
logits by up to 4e-4, too."""

SLOW = pytest.mark.slow


def equal_but_for_one(ours: Any, expected: Any) -> None:
    """All rows equal within `LOGITS`, but one in which a code may have flipped."""
    off = [float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(ours, expected, strict=True)]
    assert sum(error < LOGITS for error in off) >= len(off) - 1, off
    assert max(off) < ONE_FLIP, off


def prefilled(cache: CacheConfig, model: kvjax.Model = MODEL) -> kvjax.State:
    """The ragged prompts in a cache."""
    return kvjax.prefill(model, [list(p) for p, _ in RAGGED], cache, room=FORCED, prefill_chunk=CHUNK)


CELLS = [
    Choice(Full(), FP8(), 16),
    Choice(H2O(4, 3), FP8(), 4),
    Choice(Full(), Int4(4), 4),
    Choice(H2O(4, 3), Int4(8), 4),
    Choice(Full(), SMALL_KIVI, 4),
    Choice(SnapKV(6, 2, 3), KIVI(4, 4, 4), 4),
    *(
        pytest.param(Choice(policy, codec, size), marks=SLOW)
        for policy, codec, size in (
            (SlidingWindow(6), Int4(4), 16),
            (Full(), FP8(), 4),
            (SlidingWindow(6), FP8(), 4),
            (H2O(4, 3), FP8(), 16),
            (Full(), Int4(2), 16),
            (SlidingWindow(6), Int4(8), 4),
            (H2O(4, 3), Int4(4), 16),
            (Full(), KIVI(2, 8, 8), 8),
            (Full(), KIVI(4, 4, 12), 4),
            (PyramidKV(6, 2, 3, beta=4), KIVI(2, 4, 4), 4),
        )
    ),
]


@pytest.mark.parametrize("choice", CELLS, ids=str)
def test_logits_and_kept_sets_are_the_oracles(choice):
    pair = (choice, choice)
    results = [oracle(*text, pair) for text in RAGGED]
    state = prefilled(cache_of(pair))
    first = logits_after(MODEL, state)
    cache, block = feed(MODEL, state.cache, [forced for _, forced in RAGGED])
    ours = np.concatenate([first[:, None], block[:, :FORCED]], axis=1)
    equal_but_for_one(ours, [result.step_logits for result in results])
    for b, result in enumerate(results):
        if np.abs(ours[b] - result.step_logits).max() < LOGITS:
            assert held_everywhere(cache, b) == result.kept[-1]


@pytest.mark.parametrize(
    ("variant", "codec"),
    [
        ("mla", Int4(8)),
        ("mla", KIVI(2, 8, 8)),
        *(
            pytest.param(variant, codec, marks=SLOW)
            for variant, codec in (
                ("mla", FP8()),
                ("cla", FP8()),
                ("cla", SMALL_KIVI),
                ("cla", Int4(8)),
                ("windows", FP8()),
                ("windows", Int4(8)),
                ("sinks", SMALL_KIVI),
                ("moe", SMALL_KIVI),
            )
        ),
    ],
    ids=str,
)
def test_other_kinds_of_attention_equal_the_oracle(variant, codec):
    config = VARIANTS[variant]
    model = model_of(config)
    texts = [[token % config.vocab_size for token in (*prompt, *forced)] for prompt, forced in RAGGED]
    results = [
        decoder.run(
            random_params(config),
            config,
            text[: len(prompt)],
            text[len(prompt) :],
            oracle_policies.Full(),
            oracle_codecs.counterpart(codec),
        )
        for text, (prompt, _) in zip(texts, RAGGED, strict=True)
    ]
    prompts = [text[: len(prompt)] for text, (prompt, _) in zip(texts, RAGGED, strict=True)]
    cache = CacheConfig(page_size=getattr(codec, "page_size", 4), codec=codec)
    state = kvjax.prefill(model, prompts, cache, room=FORCED, prefill_chunk=CHUNK)
    first = logits_after(model, state)
    _, block = feed(model, state.cache, [text[len(p) :] for text, p in zip(texts, prompts, strict=True)])
    equal_but_for_one(
        np.concatenate([first[:, None], block[:, :FORCED]], axis=1), [result.step_logits for result in results]
    )


@pytest.mark.parametrize("codec", [FP8(), Int4(4)], ids=str)
def test_how_a_prompt_is_split_is_irrelevant(codec):
    tokens = np.asarray(ROWS)[:, :20]
    cache = CacheConfig(page_size=4, codec=codec)
    expected = kvjax.score(MODEL, tokens, cache, "prefill", prefill_chunk=CHUNK)
    for other in (
        kvjax.score(MODEL, tokens, cache, "prefill", prefill_chunk=16),
        kvjax.score(MODEL, tokens, cache, "decode", prompt_length=1, prefill_chunk=CHUNK),
    ):
        equal_but_for_one(other, expected)


@pytest.mark.parametrize("codec", [FP8(), Int4(4), SMALL_KIVI], ids=str)
def test_forks_that_diverge_equal_runs_that_never_shared_a_page(codec):
    cache = CacheConfig(page_size=4, codec=codec)
    state = prefilled(cache)
    live, _ = feed(MODEL, state.cache, [forced[:3] for _, forced in RAGGED])
    sources = [2, 0, 2, 0]
    live = take_sequences(live, np.array(sources, np.int32))
    more = random_tokens(3, BATCH, 6).tolist()
    live, shared = feed(MODEL, live, more)
    assert int(live.groups[0].copied) > 0
    texts = [[*RAGGED[source][1][:3], *row] for source, row in zip(sources, more, strict=True)]
    prompts = [list(RAGGED[source][0]) for source in sources]
    alone = kvjax.prefill(MODEL, prompts, cache, room=FORCED, prefill_chunk=CHUNK)
    _, apart = feed(MODEL, alone.cache, texts)
    equal_but_for_one(shared[:, :6], apart[:, 3:9])


@pytest.mark.parametrize("codec", [FP8(), Int4(4)], ids=str)
def test_a_second_prompt_behind_the_first_equals_one_prompt(codec):
    cache = CacheConfig(page_size=4, codec=codec)
    first, second = ([row[:9] for row in ROWS], [row[9:16] for row in ROWS])
    state = kvjax.prefill(MODEL, first, cache, room=16, prefill_chunk=CHUNK)
    out, _ = kvjax.extend(MODEL, state, second, max_new_tokens=4, prefill_chunk=CHUNK)
    whole = kvjax.generate(MODEL, [row[:16] for row in ROWS], 4, cache, prefill_chunk=CHUNK)
    assert sum(a == b for a, b in zip(out.tokens, whole.tokens, strict=True)) >= BATCH - 1


@SLOW
@pytest.mark.parametrize("codec", [FP8(), SMALL_KIVI, Int4(4)], ids=str)
def test_beams_over_codes_are_scored_as_forced_tokens_are(codec):
    cache = CacheConfig(page_size=4, codec=codec)
    prompt = list(RAGGED[0][0])
    out = kvjax.generate(MODEL, [prompt], 9, cache, Sampling(beams=3), prefill_chunk=CHUNK)
    tokens = np.array([[*prompt, *out.tokens[0]]])
    logits = kvjax.score(MODEL, tokens, cache, "decode", prompt_length=len(prompt), prefill_chunk=CHUNK)
    likely = np.asarray(jax.nn.log_softmax(logits, axis=-1))[0, len(prompt) - 1 : -1]
    forced = likely[np.arange(len(likely)), out.tokens[0]]
    np.testing.assert_allclose(out.logprobs[0], forced, rtol=0, atol=1e-4)  # the same codes; float32 in another batch


@pytest.mark.parametrize("codec", [FP8(), Int4(4)], ids=str)
def test_what_lies_in_the_pools_is_packed(codec):
    (group,) = prefilled(CacheConfig(page_size=4, codec=codec)).cache.groups
    width = MODEL.config.kv_spec.key_dim
    fp8 = jnp.uint8 if jax.default_backend() == "cpu" else jnp.float8_e4m3fn  # CPUs hold the bits
    wanted = {FP8(): (fp8, width), Int4(4): (jnp.uint8, width // 2)}[codec]
    for pool in (group.k, group.v):
        assert (pool.values.dtype, pool.values.shape[-1]) == wanted
    plan = kvjax.plan(MODEL.config, CacheConfig(page_size=4, codec=codec), context=64)
    assert group.pool_bytes == group.num_pages * 4 * plan.bytes_per_token


# KIVI


def test_a_kivi_prompts_attention_is_exact():
    tokens = np.asarray(ROWS)[:, :20]
    exact = kvjax.score(MODEL, tokens)
    for chunk in (CHUNK, 16):
        ours = kvjax.score(MODEL, tokens, CacheConfig(codec=SMALL_KIVI), "prefill", prefill_chunk=chunk)
        # The same products in other chunks: float32 noise.
        np.testing.assert_allclose(ours, exact, rtol=0, atol=2e-5)


def test_kivi_equals_dense_while_fewer_than_the_residual_are_held():
    tokens = np.asarray(ROWS)[:, :20]
    kivi, dense = (
        np.asarray(kvjax.score(MODEL, tokens, CacheConfig(page_size=4, codec=codec), "decode", 5, prefill_chunk=CHUNK))
        for codec in (KIVI(2, 4, 16), Dense())
    )
    # Step 16 is the first whose end codes anything, so only what follows it differs; before, float32 noise.
    np.testing.assert_allclose(kivi[:, :16], dense[:, :16], rtol=0, atol=2e-5)
    assert np.abs(kivi[:, 16:] - dense[:, 16:]).max() > 100 * LOGITS


@SLOW
def test_a_second_prompt_under_kivi_goes_in_as_forced_tokens_do():
    cache = CacheConfig(codec=SMALL_KIVI)
    first, second = ([row[:9] for row in ROWS], [row[9:16] for row in ROWS])
    state = kvjax.prefill(MODEL, first, cache, room=16, prefill_chunk=CHUNK)
    _, block = feed(MODEL, state.cache, second)
    state = kvjax.prefill(MODEL, first, cache, room=16, prefill_chunk=CHUNK)
    out, _ = kvjax.extend(MODEL, state, second, max_new_tokens=2, prefill_chunk=CHUNK)
    assert [tokens[0] for tokens in out.tokens] == block[:, 6].argmax(-1).tolist()


@SLOW
def test_layers_may_differ_in_whether_they_wait():
    """A group of several layers that share rows, put in layer by layer because another one's prompt must be."""
    pair = (Choice(Full(), SMALL_KIVI, 4), Choice(H2O(4, 3), Int4(4), 16))
    results = [oracle(*text, pair) for text in RAGGED]
    state = prefilled(cache_of(pair))
    first = logits_after(MODEL, state)
    _, block = feed(MODEL, state.cache, [forced for _, forced in RAGGED])
    ours = np.concatenate([first[:, None], block[:, :FORCED]], axis=1)
    equal_but_for_one(ours, [result.step_logits for result in results])


@pytest.mark.parametrize("policy", [Full(), SnapKV(6, 2, 3)], ids=str)
def test_kivi_plans_what_it_allocates(policy):
    cache = CacheConfig(codec=SMALL_KIVI, policy=policy)
    state = prefilled(cache)
    (group,) = state.cache.groups
    assert (group.k.values.dtype, group.k.values.shape[-1]) == (jnp.uint8, MODEL.config.kv_spec.key_dim // 4)
    plan = kvjax.plan(MODEL.config, cache, context=128, batch=BATCH)
    assert state.cache.pool_bytes == plan.pool_bytes
    assert sum(plan.bytes_per_layer) == plan.total_bytes
    tail = sum(leaf.nbytes for leaf in group.tail.values())
    assert plan.total_bytes == sum(plan.pages) * group.layout.page_bytes + tail
    limited = dataclasses.replace(cache, memory_bytes=plan.pool_bytes)
    assert prefilled(limited).cache.pool_bytes <= plan.pool_bytes


@pytest.mark.parametrize(
    "program", ["decode_block", "prefill_segment", *(pytest.param(p, marks=SLOW) for p in ("feed_tokens",))]
)
@pytest.mark.parametrize("policy", [Full(), pytest.param(SnapKV(6, 2, 3), marks=SLOW)], ids=str)
def test_kivi_leaves_the_pools_where_they_are(policy, program):
    # Pages of one layer and head are a quarter of those of all.
    cache = abstract_cache(Choice(policy, SMALL_KIVI, 4), PAGES if policy == Full() else 4 * PAGES)
    memory = lower(program, cache).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache.pool_bytes
    # Packed pools are small beside one layer's prompt, but a copy of even the smallest of them would be seen.
    pools = jax.tree.leaves((cache.groups[0].k, cache.groups[0].v))
    assert memory.temp_size_in_bytes < min(leaf.size * leaf.dtype.itemsize for leaf in pools) / 2


@SLOW
def test_nothing_compiles_after_warm_up_under_kivi():
    # One layer more than elsewhere: these programs are new to this process.
    model = model_of(ModelConfig(**{**BASE, "num_layers": 3, "hidden_size": 16, "intermediate_size": 16}))
    cache = CacheConfig(codec=SMALL_KIVI)
    assert kvjax.warmup(model, cache, batch=2, context=128, prefill_chunk=CHUNK) > 0
    tokens = (random_tokens(1, 128) % 61).tolist()
    for lengths, new in (((3,), 1), ((70,), 40), ((100, 2), 20)):
        out = kvjax.generate(model, [tokens[:n] for n in lengths], new, cache, prefill_chunk=CHUNK)
        assert out.stats.compiles == 0, (lengths, new)


@pytest.mark.parametrize("policy", [SlidingWindow(6), H2O(4, 3)], ids=str)
def test_kivi_is_refused_where_slots_are_overwritten(policy):
    with pytest.raises(ConfigError, match=r"codec=KIVI.* policy=.* no slot may be overwritten"):
        CacheConfig(codec=KIVI(), policy=policy)


def test_kivi_is_refused_where_it_cannot_serve():
    with pytest.raises(ConfigError, match=r"page_size=16 cannot go with .*give page_size=32 or None"):
        CacheConfig(page_size=16, codec=KIVI())
    with pytest.raises(ConfigError, match=r"policy=SlidingWindow\(window=6\)"):
        kvjax.plan(VARIANTS["windows"], CacheConfig(codec=SMALL_KIVI))
    with pytest.raises(ConfigError, match=r"KIVI\(group=32\) must divide .* 8 channels"):
        kvjax.plan(MODEL.config, CacheConfig(codec=KIVI()))


def test_a_group_that_does_not_divide_the_heads_width_is_refused():
    with pytest.raises(ConfigError, match=r"Int4\(group=32\) must divide .* 8 channels"):
        kvjax.generate(MODEL, [[1, 2, 3]], 2, CacheConfig(codec=Int4()))
