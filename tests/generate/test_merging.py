"""KVMerger against the NumPy oracle, and what it promises of entries, pages and neighbours.

Weights, tokens, tolerances and where they come from are those of `tests.generate.test_eviction_methods`; models are
deeper, since the first two layers and the last merge nothing. What must be noticed was seen to move logits by 0.2 and
more: runs cut elsewhere, a pivot alone in place of the blend, or a plain mean.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import CacheConfig
from kvjax.cache.codecs import FP8, KIVI, Dense, Int4, Int8
from kvjax.cache.layout import KVSpec, group_layers
from kvjax.cache.policies import Full, KVMerger
from kvjax.cache.prompt import keep_prompt
from kvjax.cache.selects import Quest, SparQ
from kvjax.cache.state import empty_cache
from kvjax.config import ModelConfig
from kvjax.errors import ConfigError, OutOfPages
from tests.cache.tiny import BATCH, CHUNK, LOGITS, MARGIN, feed, held_everywhere, logits_after, random_tokens
from tests.generate.test_eviction_methods import FORCED, LENGTH, SINKS, Case, check_pages, compare
from tests.generate.test_quantised_methods import ONE_FLIP
from tests.models.cases import BASE, CLA, MLA, model_of, random_params
from tests.oracles import codecs as oracle_codecs
from tests.oracles import decoder, merging
from tests.oracles import selects as oracle_selects

POLICY = KVMerger(2, 2, 0.1)
"""Of the two longer prompts a third of the tokens merge into others."""

DEEP = ModelConfig(**{**BASE, "num_layers": 5})
VARIANTS = {
    "gqa": DEEP,
    "mla": dataclasses.replace(MLA, num_layers=4),
    "cla": dataclasses.replace(CLA, num_layers=8, owners=(0, 0, 2, 2, 4, 4, 6, 6)),
    "windows": ModelConfig(**{**BASE, "num_layers": 5}, windows=(6, None, 6, None, 6), local_rope_theta=20.0),
    "sinks": dataclasses.replace(SINKS, num_layers=4),
}
SEEDS: dict[str, int] = {}
"""Of some seeds tried, those whose tokens leave wide margins; 0 where it is not named."""

SCALES = 1e-3
"""How far logits may be off where scales are float16: of the thousands here a few round to the next one, each of which
moves logits by up to 5e-4."""

SLOW = pytest.mark.slow
MODEL = model_of(DEEP)


@functools.cache
def case(variant: str) -> Case:
    """A model of that kind, and its texts."""
    config = VARIANTS[variant]
    return Case(model_of(config), random_params(config), SEEDS.get(variant, 0))


@pytest.mark.parametrize("page_size", [4, pytest.param(16, marks=SLOW)])
def test_logits_and_kept_tokens_are_the_oracles_token_by_token(page_size):
    compare(case("gqa"), POLICY, Dense(), page_size, every_step=True)


@pytest.mark.parametrize(
    ("variant", "codec", "page_size"),
    [
        ("gqa", KIVI(2, 4, 4), 4),
        *(
            pytest.param(*cell, marks=SLOW)
            for cell in (
                ("gqa", Int8(), 4),
                ("mla", Dense(), 4),
                ("gqa", Int8(), 16),
                ("gqa", Int4(4), 16),
                ("gqa", FP8(), 4),
                ("gqa", KIVI(4, 8, 8), 8),
                ("mla", KIVI(2, 8, 8), 8),
                ("mla", Int8(), 16),
                ("cla", Dense(), 4),
                ("cla", KIVI(2, 4, 4), 4),
                ("windows", Dense(), 4),
                ("windows", Int8(), 4),
                ("sinks", Dense(), 4),
            )
        ),
    ],
    ids=str,
)
def test_a_cell_equals_the_oracle(variant, codec, page_size):
    rounding = SCALES if isinstance(codec, Int4 | KIVI) else LOGITS
    compare(case(variant), POLICY, codec, page_size, every_step=False, one_flip=ONE_FLIP, rounding=rounding)


@pytest.mark.parametrize(
    "select", [pytest.param(Quest(2, 0), marks=SLOW), pytest.param(SparQ(3, 6, 2), marks=SLOW)], ids=str
)
def test_a_select_reads_of_merged_entries_what_the_oracle_reads(select):
    chosen = case("gqa")
    cache = CacheConfig(page_size=4, policy=POLICY, select=select)
    state = kvjax.prefill(chosen.model, [p for p, _ in chosen.texts], cache, room=FORCED, prefill_chunk=CHUNK)
    _, block = feed(chosen.model, state.cache, [forced for _, forced in chosen.texts])
    policy = merging.KVMerger(POLICY.heavy, POLICY.recent, POLICY.threshold)
    for row, (prompt, forced) in zip(block, chosen.texts, strict=True):
        codec, reads = oracle_codecs.Dense(), oracle_selects.counterpart(select, 4)
        result = decoder.run(chosen.params, DEEP, prompt, forced, policy, codec, reads)
        assert result.margin > MARGIN, "these tokens leave a choice to rounding"
        np.testing.assert_allclose(row[:FORCED], result.step_logits[1:], rtol=0, atol=LOGITS)


# The rule alone


def prompt_of(seed: int, lengths: tuple[int, ...], tokens: int, heads: int = 2, width: int = 3) -> tuple[Any, ...]:
    """Scores float32[K, B, T] with many ties, positions int32[K, B, T], keys float32[K, B, T, D] with many twins."""
    rng = np.random.default_rng(seed)
    shape = (heads, len(lengths), tokens)
    order = np.broadcast_to(np.arange(tokens, dtype=np.int32), shape)
    position = np.where(order < np.array(lengths)[:, None], order, -1).astype(np.int32)
    score = rng.integers(1, 6, shape).astype(np.float32) * (position >= 0)
    keys = rng.standard_normal((*shape, width)).astype(np.float32)
    twin = rng.random(shape) < 0.3
    twin[..., 0] = False
    for t in range(1, tokens):
        keys[:, :, t] = np.where(twin[:, :, t, None], keys[:, :, t - 1], keys[:, :, t])
    return score, position, keys


@pytest.mark.parametrize(
    "policy",
    [
        KVMerger(0, 0, -1),
        KVMerger(3, 0, 0.3),
        KVMerger(2, 4, 0.9),
        KVMerger(0, 5, 0.0),
        KVMerger(40, 0, -1),
        KVMerger(1, 1, 2),
    ],
    ids=str,
)
def test_runs_pivots_and_weights_are_the_oracles_under_ties_and_twins(policy):
    lengths, tokens = (30, 1, 2, 17, 0), 30
    score, position, keys = prompt_of(0, lengths, tokens)
    placed = policy.placed((1, 2, 3), 5)
    # The layer at index 1 of its group is the model's third of five.
    state = {"score": jnp.asarray(score)}
    state |= jax.jit(placed.merge)(state, jnp.asarray(position), jnp.asarray(keys), 1)
    kept = np.asarray(placed.keep(state, jnp.asarray(position)))
    into, share = np.asarray(state["into"]), np.asarray(state["share"])
    oracle = merging.KVMerger(policy.heavy, policy.recent, policy.threshold)
    for head in range(2):
        for b, length in enumerate(lengths):
            entries = [
                merging.Entry(p, keys[head, b, p].astype(np.float64), keys[head, b, p, ::-1], float(score[head, b, p]))
                for p in range(length)
            ]
            expected, blends, _ = oracle.merge(entries)
            here = set(np.flatnonzero(kept[head, b]).tolist())
            assert here == expected
            sizes = np.bincount(into[head, b, :length], minlength=tokens)
            assert len(here) == length - sum(int(size) - 1 for size in sizes if size)
            assert set(np.flatnonzero(sizes > 1).tolist()) == set(blends)
            for pivot, (key, _) in blends.items():
                weights = np.where(into[head, b] == pivot, share[head, b], 0.0)[:length]
                # float32 against float64, of weights that sum to one.
                np.testing.assert_allclose(weights.sum(), 1, atol=1e-6)
                np.testing.assert_allclose(weights @ keys[head, b, :length], key, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("index", "merges"), [(0, False), (1, False), (2, True), (3, True), (4, False)])
def test_the_first_two_layers_and_the_last_merge_nothing(index, merges):
    score, position, keys = prompt_of(1, (30, 12), 30)
    policy = KVMerger(2, 2, 0.0).placed(tuple(range(5)), 5)
    into = np.asarray(jax.jit(policy.merge)({"score": score}, position, keys, index)["into"])
    assert (into != np.arange(30)).any() == merges


@pytest.mark.parametrize("codec", [Dense(), Int8(), Int4(4), FP8()], ids=str)
def test_identical_tokens_merge_to_themselves(codec):
    spec = KVSpec(layers=4, kv_heads=2, key_dim=8, value_dim=8)
    (layout,) = group_layers(spec, (), CacheConfig(page_size=4, policy=KVMerger(0, 2), codec=codec), "float32")
    rng = np.random.default_rng(2)
    one = {name: rng.standard_normal((1, 1, 2, 8)).astype(np.float32) for name in "kv"}
    coded = {name: codec.encode(jnp.broadcast_to(x, (1, 12, 2, 8))) for name, x in one.items()}
    cache = empty_cache((layout,), 1, [(4, 32)])
    weights = jnp.asarray(rng.random((1, 2, 12)), jnp.float32)
    group, kept = jax.jit(keep_prompt)(cache.groups[0], 2, jnp.array([12]), weights, coded["k"], coded["v"])
    # Ten tokens became one, at the most attended of them; two are recent.
    assert np.asarray(kept).sum(-1).tolist() == [[3], [3]]
    assert [int(np.flatnonzero(row)[0]) for row in kept[:, 0]] == np.argmax(weights[0, :, :10], axis=-1).tolist()
    for name, pool in (("k", group.k), ("v", group.v)):
        for head in range(2):
            page = int(group.table[4 + head, 0, 0])
            stored = type(pool)(*(None if leaf is None else leaf[page, 0, 0, :3] for leaf in pool))
            expected = codec.decode(codec.encode(jnp.asarray(one[name][0, 0, head])), "float32")
            # Weights of a tenth sum to one up to float32; a code does not feel that.
            np.testing.assert_allclose(codec.decode(stored, "float32"), np.stack([expected] * 3), rtol=0, atol=2e-6)


# Identities


def decoded(policy: Any, prompt_length: int = 15) -> np.ndarray:
    """float32[B, T, V] of the same tokens every time."""
    tokens = random_tokens(45, BATCH, LENGTH) % DEEP.vocab_size
    cache = CacheConfig(page_size=4, policy=policy)
    return np.asarray(kvjax.score(MODEL, tokens, cache, "decode", prompt_length=prompt_length, prefill_chunk=CHUNK))


@pytest.mark.parametrize(
    "policy",
    [
        KVMerger(0, 0, 2),
        pytest.param(KVMerger(9, 6, -1), marks=SLOW),
        pytest.param(KVMerger(0, LENGTH, -1), marks=SLOW),
    ],
    ids=str,
)
def test_nothing_to_merge_equals_full(policy):
    # Both are float32 and read in another order.
    np.testing.assert_allclose(decoded(policy), decoded(Full()), rtol=0, atol=5e-5)


PROMPTS = [(random_tokens(b, n) % DEEP.vocab_size).tolist() for b, n in enumerate((40, 1, 23, 31))]


def prefilled(prompts: list[list[int]], chunk: int = CHUNK, **more: Any) -> kvjax.State:
    """Prompts in a cache of small pages."""
    return kvjax.prefill(MODEL, prompts, CacheConfig(page_size=4, policy=POLICY, **more), prefill_chunk=chunk, room=9)


def test_neither_chunks_nor_batch_mates_matter():
    together = prefilled(PROMPTS)
    kept = [held_everywhere(together.cache, b, DEEP) for b in range(BATCH)]
    assert any(len(head) < 40 for layer in kept[0] for head in layer)
    mates = [[7] * 33, PROMPTS[2], [5] * 40, PROMPTS[0]]
    for other, rows in ((prefilled(PROMPTS, 16), {0: 0, 1: 1, 2: 2, 3: 3}), (prefilled(mates), {1: 2, 3: 0})):
        ours, expected = logits_after(MODEL, other), logits_after(MODEL, together)
        for b, same in rows.items():
            assert held_everywhere(other.cache, b, DEEP) == kept[same]
            # The same sums in other blocks.
            np.testing.assert_allclose(ours[b], expected[same], rtol=0, atol=5e-5)


@SLOW
def test_a_second_prompt_is_as_if_its_tokens_had_come_one_at_a_time():
    more = [tokens[:7] for tokens in (random_tokens(9, BATCH, 8) % DEEP.vocab_size).tolist()]
    out, state = kvjax.extend(MODEL, prefilled(PROMPTS), prompts=more, max_new_tokens=2, prefill_chunk=CHUNK)
    live, logits = feed(
        MODEL, prefilled(PROMPTS).cache, [[*row, new[0]] for row, new in zip(more, out.tokens, strict=True)]
    )
    chosen = logits[:, 6:8] - np.log(np.exp(logits[:, 6:8]).sum(-1, keepdims=True))
    for b, (new, logprobs) in enumerate(zip(out.tokens, out.logprobs, strict=True)):
        np.testing.assert_allclose(logprobs, chosen[b, [0, 1], new], rtol=0, atol=5e-5)  # float32 in another order
        assert held_everywhere(state.cache, b, DEEP) == held_everywhere(live, b, DEEP)


# Pages


def test_what_merged_gave_its_pages_back_and_a_pool_too_small_says_so():
    def pages(cache: Any) -> int:
        rows = [head for b in range(BATCH) for layer in held_everywhere(cache, b, DEEP) for head in layer]
        return sum(-(-len(row) // 4) for row in rows)

    state = prefilled(PROMPTS)
    (group,) = state.cache.groups
    used = int(group.used)
    full = 2 * sum(5 * -(-len(prompt) // 4) for prompt in PROMPTS)
    assert used == int(group.peak) == pages(state.cache) <= 0.9 * full, "two of five layers keep about half"
    live, _ = feed(MODEL, state.cache, [prompt[:FORCED] for prompt in PROMPTS])
    check_pages(live)
    assert int(live.groups[0].used) <= pages(live) + 2 * 5 * BATCH * 4, "no more than a block's room for each row"
    (group,) = prefilled(PROMPTS, num_pages=used).cache.groups
    assert int(group.top) == 0
    with pytest.raises(OutOfPages, match="the prompts need .* raise CacheConfig.num_pages"):
        prefilled(PROMPTS, num_pages=used - 1)


def test_a_plan_counts_on_nothing_to_merge():
    config = CacheConfig(page_size=4, policy=KVMerger(8, 8))
    merging, full = (kvjax.plan(DEEP, cache, context=100) for cache in (config, CacheConfig(page_size=4)))
    assert (merging.total_bytes, merging.bytes_per_token) == (full.total_bytes, full.bytes_per_token)


@SLOW
def test_nothing_compiles_after_warm_up():
    # Narrower than elsewhere: these programs are new to this process.
    model = model_of(ModelConfig(**{**BASE, "num_layers": 4, "hidden_size": 16, "intermediate_size": 16}))
    cache = CacheConfig(page_size=4, policy=KVMerger(1, 1, -0.5))
    assert kvjax.warmup(model, cache, batch=2, context=64, prefill_chunk=CHUNK) > 0
    tokens = (random_tokens(1, 64) % DEEP.vocab_size).tolist()
    for lengths, new in (((3,), 1), ((30,), 30), ((50, 2), 10)):
        out = kvjax.generate(model, [tokens[:n] for n in lengths], new, cache, prefill_chunk=CHUNK)
        assert out.stats.compiles == 0, (lengths, new)


# Settings


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KVMerger(-1, 4), "KVMerger.heavy must be an integer of at least 0, got -1"),
        (lambda: KVMerger(4, 0.5), "KVMerger.recent must be an integer of at least 0, got 0.5"),
        (lambda: KVMerger(True, 4), "KVMerger.heavy must be an integer of at least 0, got True"),
        (lambda: KVMerger(4, 4, 2.5), "KVMerger.threshold must be a number at least -1 and at most 2, got 2.5"),
        (lambda: KVMerger(4, 4, -2), "KVMerger.threshold must be a number at least -1 and at most 2, got -2"),
        (lambda: KVMerger(4, 4, float("nan")), "KVMerger.threshold must be a number .* got nan"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_equal_policies_are_one_static_argument_wherever_they_rule():
    assert KVMerger(4, 2) == KVMerger(4, 2, 0.75)
    assert hash(KVMerger(4, 2).placed((0, 1, 2), 4)) == hash(KVMerger(4, 2).placed((0, 1, 2), 4))
    assert KVMerger(4, 2).placed((2,), 4) != KVMerger(4, 2).placed((2,), 3)
