"""DMC while it reads and decodes: against the NumPy oracle, token by token, and the identities it promises.

Random weights give keys whose last channel is far below 5, where every token is appended; `gated` scatters it about
that, so that about half of them join, with decisions that are clear ones. What is compared are logits and the very
positions held, after a ragged batch of prompts, one of a single token, and after every token forced behind them.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import numpy as np
import pytest

import kvjax
from kvjax import CacheConfig
from kvjax.attention.blending import one_further
from kvjax.cache.codecs import FP8, KIVI, Dense, Int4, Int8
from kvjax.cache.policies import DMC, Full
from kvjax.cache.selects import Quest, SparQ
from kvjax.cache.state import Cache
from kvjax.config import ModelConfig, RopeScaling
from kvjax.errors import ConfigError, OutOfPages
from kvjax.generate.decode import take_sequences
from kvjax.generate.state import layouts_of
from kvjax.models.rotary import rotary
from tests.cache.tiny import BATCH, CHUNK, LOGITS, STEPS, Choice, feed, logits_after
from tests.generate.test_eviction_methods import check_pages, positions_held
from tests.generate.test_memory_contract import abstract_cache, check_memory, lower
from tests.models.cases import BASE, MLA, YARN, model_of, random_params
from tests.oracles import codecs as oracle_codecs
from tests.oracles import decoder, selects
from tests.oracles.merging import DMC as OracleDMC

LENGTH, FORCED = 24, 9
PROMPTS = (10, 1, 15, 5)

MARGIN = 1e-2
"""How far deciding channels of the tokens used are from the threshold: float32 and float64 differ by 1e-4 at most."""

ONE_FLIP = 0.3
"""How far logits may be off once a code rounded the other way, float32 and float64 on two sides of a half. Blends are
coded anew with every token, so that a flip lives on in its entry."""

SLOW = pytest.mark.slow

GATED = ModelConfig(**BASE, qkv_bias=True)
VARIANTS: dict[str, ModelConfig] = {
    "gqa": GATED,
    "mqa": ModelConfig(**{**BASE, "num_kv_heads": 1}, qkv_bias=True),
    "mha": ModelConfig(**{**BASE, "num_kv_heads": 4}, qkv_bias=True),
    "mla": dataclasses.replace(MLA, qkv_bias=True),
    "windows": ModelConfig(**{**BASE, "num_layers": 3}, qkv_bias=True, windows=(6, None, 6), local_rope_theta=20.0),
    "sinks": ModelConfig(**BASE, qkv_bias=True, attention_sinks=True, attention_soft_cap=4.0),
    "yarn": ModelConfig(
        **BASE,
        qkv_bias=True,
        rope_scaling=dataclasses.replace(YARN, attention_factor=1.0),
        rope_interleaved=True,
        query_scale=0.3,
    ),
    "longrope": ModelConfig(
        **BASE,
        qkv_bias=True,
        rotary_fraction=0.5,
        rope_scaling=RopeScaling(
            "longrope",
            factor=8.0,
            original_max_position_embeddings=64,
            short_factor=(1.0, 1.5),
            long_factor=(2.0, 7.0),
            attention_factor=1.0,
        ),
    ),
}


@functools.cache
def gated(config: ModelConfig, bias: float | None = None, seed: int = 0) -> Any:
    """Parameters whose deciding channel is `bias` (None: scattered about 5), with importances all over (0, 1)."""
    params = copy.deepcopy(random_params(config))
    rng = np.random.default_rng(seed)
    width = config.latent.key_dim if config.latent else config.width
    for layer in range(config.num_layers):
        attention = params[f"layers_{layer}"]["attention"]
        key = attention["kv_down" if config.latent else "k"]
        weight = key["weight"][width - 1 :: width]
        weight[:] = 0.0 if bias is not None else 6.0 * rng.standard_normal(weight.shape) / config.hidden_size**0.5
        key["bias"][width - 1 :: width] = 5.0 if bias is None else bias
        if not config.latent:
            attention["q"]["bias"][width - 1 :: width] -= 5.0
    return params


def without_neurons(config: ModelConfig, params: Any) -> Any:
    """The same, both channels zero."""
    params = copy.deepcopy(params)
    for layer in range(config.num_layers):
        for name in "qk":
            for leaf in params[f"layers_{layer}"]["attention"][name].values():
                leaf[config.width - 1 :: config.width] = 0.0
    return params


def tokens_of(seed: int) -> np.ndarray:
    """int[B, T]."""
    return np.random.default_rng(seed).integers(0, 61, (BATCH, LENGTH))


def texts_of(seed: int) -> list[tuple[list[int], list[int]]]:
    """Prompts, and the tokens forced behind each."""
    return [(row[:n].tolist(), row[n : n + FORCED].tolist()) for row, n in zip(tokens_of(seed), PROMPTS, strict=True)]


SEEDS = {"sinks": 2, "yarn": 1, "mqa": 2, "mha": 1}
"""Of some seeds tried, those whose tokens leave wide margins; 0 where it is not named."""


def check(variant: str, codec: Any, page_size: int, every_step: bool, select: Any = None) -> Cache:
    """The ragged batch has the oracle's logits and holds what the oracle holds."""
    config = VARIANTS[variant]
    params, texts = gated(config), texts_of(SEEDS.get(variant, 0))
    results = [
        decoder.run(
            params, config, *text, OracleDMC(), oracle_codecs.counterpart(codec),
            None if select is None else selects.counterpart(select, page_size),
        )
        for text in texts
    ]  # fmt: skip
    margin = min(result.margin for result in results)
    assert margin > (MARGIN if select is None else 1e-4), f"these tokens leave a choice to rounding: {margin}"
    model = model_of(config, params)
    cache = CacheConfig(page_size=page_size, policy=DMC(), codec=codec, select=select)
    state = kvjax.prefill(model, [p for p, _ in texts], cache, room=FORCED, prefill_chunk=CHUNK)
    live, logits = state.cache, [logits_after(model, state)[:, None]]
    kept = [[positions_held(live, config, b) for b in range(BATCH)]]
    forced = [tokens for _, tokens in texts]
    pieces = [[tokens[i : i + 1] for tokens in forced] for i in range(FORCED)] if every_step else [forced]
    for piece in pieces:
        live, block = feed(model, live, piece)
        logits.append(block[:, : len(piece[0])])
        kept.append([positions_held(live, config, b) for b in range(BATCH)])
    ours = np.concatenate(logits, axis=1)
    off = [float(np.abs(row - result.step_logits).max()) for row, result in zip(ours, results, strict=True)]
    exact = [error < LOGITS for error in off]
    # A flipped code is rare: one sequence of the four may have seen one.
    assert sum(exact) >= BATCH - (codec != Dense()), off
    assert max(off) < (LOGITS if codec == Dense() else ONE_FLIP), off
    steps = range(FORCED + 1) if every_step else (0, FORCED)
    for b, result in enumerate(results):
        for ours_then, step in zip(kept, steps, strict=True):
            assert ours_then[b] == result.kept[step], f"sequence {b}, step {step}"
    longest = [len(positions) for heads in results[2].kept[-1] for positions in heads]
    assert 3 < min(longest) <= max(longest) < PROMPTS[2] + FORCED - 3, "these weights show nothing"
    check_pages(live)
    return live


@pytest.mark.parametrize(
    ("codec", "page_size"),
    [
        pytest.param(Dense(), 4, marks=SLOW),
        pytest.param(Dense(), 16, marks=SLOW),
        pytest.param(Int8(), 4, marks=SLOW),
        (Int8(), 16),
    ],
    ids=str,
)
def test_logits_and_kept_tokens_are_the_oracles_token_by_token(codec, page_size):
    check("gqa", codec, page_size, every_step=True)


@pytest.mark.parametrize(
    ("variant", "codec"),
    [
        ("mla", Dense()),
        *(
            pytest.param(variant, codec, marks=SLOW)
            for variant, codec in (
                ("windows", Dense()),
                ("sinks", Dense()),
                ("yarn", Dense()),
                ("mqa", Dense()),
                ("mha", Dense()),
                ("longrope", Dense()),
                ("gqa", FP8()),
                ("gqa", Int4(4)),
                ("mla", Int8()),
                ("windows", Int8()),
                ("sinks", Int8()),
                ("yarn", Int8()),
            )
        ),
    ],
    ids=str,
)
def test_a_cell_equals_the_oracle(variant, codec):
    check(variant, codec, 4, every_step=False)


@SLOW
@pytest.mark.parametrize("select", [Quest(2, dense_layers=1), SparQ(4, 5, 2)], ids=str)
def test_sparse_reads_of_blends_equal_the_oracle(select):
    check("gqa", Dense(), 4, every_step=False, select=select)


# Rotation


ROTATIONS = {
    "plain": GATED,
    "scaled": dataclasses.replace(VARIANTS["yarn"], rope_scaling=YARN, rope_interleaved=False),
    "scaled and reordered": dataclasses.replace(VARIANTS["yarn"], rope_scaling=YARN),
    "scaled in part": dataclasses.replace(
        VARIANTS["longrope"], rope_scaling=dataclasses.replace(VARIANTS["longrope"].rope_scaling, attention_factor=None)
    ),
    "latent": VARIANTS["mla"],
}
"""The factors of YaRN and LongRoPE on cos and sin must not count twice."""


@pytest.mark.parametrize("name", ROTATIONS)
def test_turning_a_stored_key_on_is_rotating_it_to_the_next_position(name):
    rotate = rotary(ROTATIONS[name])
    k = np.random.default_rng(0).standard_normal((2, 5, 3, ROTATIONS[name].kv_spec.key_dim)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 8, 9, 50, 51]], np.int32)
    # Two rotations in float32 instead of one.
    np.testing.assert_allclose(one_further(rotate(k, positions), rotate), rotate(k, positions + 1), rtol=0, atol=1e-5)


# Identities


def decoded(params: Any, policy: Any, prompt_length: int, chunk: int = CHUNK, page_size: int = 4) -> np.ndarray:
    """float32[B, T, V] of the same tokens every time."""
    cache = CacheConfig(page_size=page_size, policy=policy)
    score = functools.partial(kvjax.score, model_of(GATED, params), tokens_of(1), cache, "decode")
    return np.asarray(score(prompt_length=prompt_length, prefill_chunk=chunk))


@pytest.mark.parametrize("length", [11, pytest.param(LENGTH, marks=SLOW)])
def test_a_prompt_is_what_its_tokens_are_one_by_one(length):
    params = gated(GATED)
    # Sums over the same entries in another order; a blend that is off by one token moves logits by 1e-2 and more.
    np.testing.assert_allclose(decoded(params, DMC(), length), decoded(params, DMC(), 1), rtol=0, atol=1e-4)


@SLOW
def test_how_a_prompt_is_split_is_irrelevant():
    params = gated(GATED)
    np.testing.assert_allclose(decoded(params, DMC(), LENGTH, 16), decoded(params, DMC(), LENGTH, 3), rtol=0, atol=1e-4)


@SLOW
def test_layers_may_merge_beside_layers_that_do_not():
    model, tokens = model_of(GATED, gated(GATED)), tokens_of(1)
    cache = CacheConfig(page_size=4, policy=DMC(), overrides=(((1,), CacheConfig(page_size=16)),))
    prompt, steps = (
        np.asarray(kvjax.score(model, tokens, cache, "decode", length, prefill_chunk=CHUNK)) for length in (11, 1)
    )
    np.testing.assert_allclose(prompt, steps, rtol=0, atol=1e-4)
    assert np.abs(prompt - decoded(gated(GATED), DMC(), 11)).max() > 100 * LOGITS


@pytest.mark.parametrize("length", [11, pytest.param(1, marks=SLOW)])
def test_always_appending_is_full_without_the_two_channels(length):
    params = gated(GATED, -100.0)
    ours = decoded(params, DMC(), length)
    # Both are float32 and read in another order.
    np.testing.assert_allclose(ours, decoded(without_neurons(GATED, params), Full(), length), rtol=0, atol=5e-5)
    assert np.abs(ours - decoded(params, Full(), length)).max() > 100 * LOGITS, "the channels matter to others"


def test_always_joining_leaves_one_slot_that_is_the_mean_by_importance():
    params, tokens = gated(GATED, 100.0), tokens_of(2)
    model, cache = model_of(GATED, params), CacheConfig(page_size=4, policy=DMC())
    state = kvjax.prefill(model, [row[:11].tolist() for row in tokens], cache, room=STEPS, prefill_chunk=CHUNK)
    live, _ = feed(model, state.cache, [row[11:LENGTH].tolist() for row in tokens])
    (group,) = live.groups
    assert np.all(np.asarray(group.length) == 1)
    assert np.all(np.asarray(group.position)[..., 0] == LENGTH - 1)
    params = decoder.to_float64(params)
    weights = params["layers_0"]
    x = decoder.rms_norm(params["embed"]["embedding"][tokens], weights["attention_norm"]["scale"], GATED.norm_eps)
    query, value = (decoder.dense(x, weights["attention"][name]).reshape(BATCH, LENGTH, -1, 8) for name in "qv")
    omega = 1 / (1 + np.exp(-query[..., -1].reshape(BATCH, LENGTH, 2, 2).mean(-1) - 5))
    assert omega.min() < 0.1 < 0.9 < omega.max()
    means = np.einsum("btk,btkd->bkd", omega, value) / omega.sum(1)[..., None]
    pages = np.asarray(group.table)[:2, :, 0].T  # the first layer's rows
    # 24 blends in turn, each rounded to float32.
    np.testing.assert_allclose(np.asarray(group.v.values)[pages, 0, 0, 0], means, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.asarray(group.row_state["weight"])[:2, :, 0].T, omega.sum(1), rtol=1e-5)


# Turns, forks, pages


def ready(config: ModelConfig = GATED) -> kvjax.Model:
    """A model about half of whose tokens join."""
    return model_of(config, gated(config))


@SLOW
def test_a_second_prompt_is_as_if_its_tokens_had_come_one_at_a_time():
    model, tokens = ready(), tokens_of(1).tolist()
    cache = CacheConfig(page_size=4, policy=DMC())
    first, second = [row[:10] for row in tokens], [row[10:19] for row in tokens]
    state = kvjax.prefill(model, first, cache, room=12, prefill_chunk=CHUNK)
    _, state = kvjax.extend(model, state, prompts=second, max_new_tokens=1, prefill_chunk=CHUNK)
    alone = kvjax.prefill(model, first, cache, room=12, prefill_chunk=CHUNK)
    live, _ = feed(model, alone.cache, second)
    for b in range(BATCH):
        assert positions_held(state.cache, GATED, b) == positions_held(live, GATED, b)


def test_forks_that_diverge_equal_runs_that_never_shared_a_page():
    model, cache = ready(), CacheConfig(page_size=4, policy=DMC())
    first, second = tokens_of(4)[:2, :12].tolist()
    more = np.random.default_rng(5).integers(0, 61, (BATCH, STEPS)).tolist()
    state = kvjax.prefill(model, [first, second, first, first], cache, room=3 * STEPS, prefill_chunk=CHUNK)
    live, _ = feed(model, state.cache, [first[:3], second[:3], [], []])
    live = take_sequences(live, np.array([0, 0, 1, 1], np.int32))
    live, _ = feed(model, live, [row[:5] for row in more])
    # Again, in another order; the fourth is dropped while it still shares the second prompt's pages.
    sources = [2, 0, 1, 1]
    live = take_sequences(live, np.array(sources, np.int32))
    live, shared = feed(model, live, [row[5:9] for row in more])
    check_pages(live)
    assert sum(int(group.copied) for group in live.groups) > 0
    prompts = [first if source < 2 else second for source in sources]
    texts = [
        [*(first if source < 2 else second)[:3], *more[source][:5], *more[b][5:9]] for b, source in enumerate(sources)
    ]
    state = kvjax.prefill(model, prompts, cache, room=3 * STEPS, prefill_chunk=CHUNK)
    alone_live, alone = feed(model, state.cache, texts)
    # The same sums over slots in another order.
    np.testing.assert_allclose(shared[:, :4], alone[:, 8:12], rtol=0, atol=1e-4)
    for b in range(BATCH):
        assert positions_held(live, GATED, b) == positions_held(alone_live, GATED, b)


def test_what_joins_takes_no_pages_and_all_of_them_come_back():
    model, prompts = ready(), np.random.default_rng(0).integers(0, 61, (BATCH, 100)).tolist()
    cache = CacheConfig(page_size=4, policy=DMC())
    (group,) = kvjax.prefill(model, prompts, cache, prefill_chunk=CHUNK).cache.groups
    length, table = np.asarray(group.length), np.asarray(group.table)
    assert np.array_equal((table >= 0).sum(-1), -(-length // 4)), "not one page more than the entries need"
    full = group.layout.rows * BATCH * 25
    assert 0.3 * full < int(group.used) < 0.8 * full
    assert int(group.peak) == int(group.used), "not even for a moment"
    gone = take_sequences(kvjax.prefill(model, prompts, cache, prefill_chunk=CHUNK).cache, NOBODY)
    check_pages(gone)
    assert int(gone.groups[0].used) == 0
    used = int(group.used)
    with pytest.raises(OutOfPages, match="the prompts need .* raise CacheConfig.num_pages"):
        kvjax.prefill(model, prompts, dataclasses.replace(cache, num_pages=used - 1), prefill_chunk=CHUNK)


NOBODY = np.full(BATCH, -1, np.int32)


@pytest.mark.parametrize("program", ["prefill_segment", "decode_block"])
@pytest.mark.parametrize("codec", [Dense(), pytest.param(Int8(), marks=SLOW)], ids=str)
def test_pools_are_updated_in_place_and_never_copied(program, codec):
    cache = abstract_cache(Choice(DMC(), codec, 16))
    check_memory(lower(program, cache), cache)


@SLOW
def test_nothing_compiles_after_warm_up():
    # One layer more than elsewhere: these programs are new to this process.
    config = ModelConfig(**{**BASE, "num_layers": 3, "hidden_size": 16, "intermediate_size": 16}, qkv_bias=True)
    model, cache = ready(config), CacheConfig(page_size=4, policy=DMC())
    assert kvjax.warmup(model, cache, batch=2, context=128, prefill_chunk=CHUNK) > 0
    tokens = np.random.default_rng(1).integers(0, 61, 128).tolist()
    for lengths, new in (((3,), 1), ((70,), 40), ((100, 2), 20), ((1, 90), 17)):
        out = kvjax.generate(model, [tokens[:n] for n in lengths], new, cache, prefill_chunk=CHUNK)
        assert out.stats.compiles == 0, (lengths, new)


# What is refused


def test_models_and_codecs_that_cannot_be_served_are_refused_with_the_reason():
    shared = model_of(ModelConfig(**{**BASE, "num_layers": 4}, owners=(0, 0, 2, 3)))
    with pytest.raises(ConfigError, match="takes a channel of the queries .* layer 1 of this model only reads"):
        kvjax.prefill(shared, [[1, 2, 3]], CacheConfig(policy=DMC()))
    # Owners are numbered by their place among owners.
    mixed = CacheConfig(policy=DMC(), overrides=(((0,), CacheConfig()),))
    assert [layout.layers for layout in layouts_of(shared, mixed)] == [(0,), (1, 2)]
    crossed = model_of(ModelConfig(**{**BASE, "num_layers": 4}, windows=(6, 6, None, None), cross_from=2))
    with pytest.raises(ConfigError, match="layers from cross_from=2 on see only a prompt's last token"):
        kvjax.prefill(crossed, [[1, 2, 3]], CacheConfig(policy=DMC()))
    merged = ModelConfig(**{**BASE, "num_kv_heads": 1}, merged_keys=2)
    with pytest.raises(ConfigError, match="DMC.. turns queries or keys to other positions, .* after RoPE"):
        kvjax.prefill(kvjax.init(merged), [[1, 2, 3]], CacheConfig(policy=DMC()))
    with pytest.raises(ConfigError, match="no slot may be overwritten"):
        CacheConfig(policy=DMC(), codec=KIVI())


def test_equal_policies_are_one_static_argument():
    assert DMC() == DMC()
    assert hash(DMC()) == hash(DMC())
