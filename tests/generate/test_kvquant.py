"""KVQuant against the NumPy oracle with the same calibration, and the calibration itself.

Weights, caches and shapes are those of `tests.cache.tiny`; levels and ranges are drawn at random: what is compared is
the rule and not how well it was calibrated.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import CacheConfig
from kvjax.cache.codecs import Calibration, KVQuant
from kvjax.cache.policies import H2O, TOVA, Full, PyramidInfer, SlidingWindow, SnapKV, StreamingLLM
from kvjax.cache.state import empty_cache
from kvjax.config import ModelConfig
from kvjax.errors import CheckpointError, ConfigError, RequestError
from kvjax.generate import calibrate as calibration
from kvjax.generate.decode import take_sequences
from kvjax.generate.levels import levels_of
from kvjax.generate.state import layouts_of
from tests.cache.tiny import BATCH, CHUNK, CONFIG, LOGITS, MODEL, feed, held_everywhere, logits_after, random_tokens
from tests.generate import test_memory_contract as contract
from tests.generate.test_quantised_methods import FORCED, RAGGED, ROWS, equal_but_for_one
from tests.generate.test_variant_matrix import VARIANTS
from tests.models.cases import BASE, model_of, random_params
from tests.oracles import codecs as oracle_codecs
from tests.oracles import decoder, page_codecs
from tests.oracles import policies as oracle_policies
from tests.oracles.weights import random_params as tiny_params

SLOW = pytest.mark.slow
DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"


@functools.cache
def drawn(layers: int, kv_heads: int, width: int, seed: int = 0) -> Calibration:
    """Ranges about those of the tests' models, levels anywhere."""
    rng = np.random.default_rng(seed)
    shape = (layers, kv_heads, width)

    def levels() -> dict[int, np.ndarray]:
        return {bits: np.sort(rng.uniform(-1, 1, (layers, 2**bits)), axis=-1).astype(np.float32) for bits in (2, 3, 4)}

    least, greatest = -rng.uniform(1, 3, shape), rng.uniform(1, 3, shape)
    return Calibration(least.astype(np.float32), greatest.astype(np.float32), levels(), levels())


def codec_of(config: ModelConfig, bits: int = 3, outliers: float = 0.1, first: int = 1) -> KVQuant:
    """A codec for a model; 0.1 of 8 channels is one."""
    spec = config.kv_spec
    return KVQuant(bits, outliers, first, drawn(spec.layers, spec.kv_heads, spec.key_dim))


def counterpart(codec: KVQuant) -> page_codecs.KVQuant:
    """The oracle that codes alike."""
    told = codec.calibration
    assert isinstance(told, Calibration)
    tables = told.key_levels[codec.bits], told.value_levels[codec.bits]
    return page_codecs.KVQuant(told.key_least, told.key_greatest, *tables, codec.outliers, codec.first)


def oracle_of(policy: Any) -> Any:
    """The oracle of a policy; of PyramidInfer, `keep` is a method and the share has another name."""
    return oracle_policies.counterpart(policy, **({"keep": policy.share} if isinstance(policy, PyramidInfer) else {}))


def prefilled(cache: CacheConfig, model: kvjax.Model = MODEL, prompts: Any = None) -> kvjax.State:
    """The ragged prompts in a cache."""
    texts = prompts or [list(p) for p, _ in RAGGED]
    return kvjax.prefill(model, texts, cache, room=FORCED, prefill_chunk=CHUNK)


TINY = codec_of(CONFIG)


# Vectors


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("outliers", [0.0, 0.1, 0.3])
def test_vectors_are_coded_as_the_oracle_codes_them_in_the_bytes_told(bits, outliers):
    codec = codec_of(CONFIG, bits, outliers)
    theirs = counterpart(codec)
    x = np.random.default_rng(bits).standard_normal((30, 2, 8)).astype(np.float32) * 1.5
    for layer in range(2):
        tables = jax.tree.map(lambda table, layer=layer: table[layer], codec.tables((0, 1)))
        for part, encode, decode, size in (
            ("key", codec.encode_keys, codec.decode_keys, codec.bytes_per_key(8, "float32")),
            ("value", codec.encode_values, codec.decode_values, codec.bytes_per_vector(8, "float32")),
        ):
            stored = encode(jnp.asarray(x), tables)
            read = np.asarray(decode(stored, tables, jnp.float32))
            expected = np.stack(
                [theirs.write(layer, head, part, x[:, head].astype(float), range(1, 31)) for head in range(2)], axis=1
            )
            # float32 arithmetic on numbers of up to 6; a code off by one moves an element by 1e-2 and more.
            np.testing.assert_allclose(read, expected, rtol=0, atol=2e-6)
            assert sum(leaf.nbytes for leaf in jax.tree.leaves(stored)) == 60 * size


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_an_element_errs_by_half_a_gap_but_outliers_are_fp16(bits):
    codec = KVQuant(bits, 0.2, 0, drawn(1, 1, 16))
    tables = jax.tree.map(lambda table: table[0], codec.tables((0,)))
    x = np.random.default_rng(3).standard_normal((50, 1, 16)).astype(np.float32)
    for encode, decode, levels in (
        (codec.encode_keys, codec.decode_keys, tables["key_levels"]),
        (codec.encode_values, codec.decode_values, tables["value_levels"]),
    ):
        stored = encode(jnp.asarray(x), tables)
        read = np.asarray(decode(stored, tables, jnp.float32))
        index = np.asarray(stored.apart.channel, int)
        assert index.shape[-1] == 4
        np.testing.assert_array_equal(
            np.take_along_axis(read, index, -1), np.take_along_axis(x, index, -1).astype(np.float16)
        )
        apart = np.zeros(x.shape, bool)
        np.put_along_axis(apart, index, True, -1)
        half = np.asarray(tables["half"] if stored.scale is None else stored.scale[..., None]) + np.zeros_like(x)
        center = np.asarray(
            tables["center"] if stored.scale is None else (stored.minimum + stored.scale)[..., None]
        ) + np.zeros_like(x)
        normed = (x - center) / half
        points = np.asarray(levels)
        inside = (normed >= points[0]) & (normed <= points[-1]) & ~apart
        error = np.abs(read - x)[inside] / half[inside]
        assert inside.sum() > 200
        # Rounding of float32 numbers of up to 5, beside half the widest gap.
        assert error.max() <= np.diff(points).max() / 2 + 1e-5


# Whole models


CELLS = [
    (Full(), 4, {}),
    (H2O(4, 3), 16, {}),
    *(
        pytest.param(policy, size, arguments, marks=SLOW)
        for policy, size, arguments in (
            (Full(), 16, {"bits": 2, "first": 0}),
            (SlidingWindow(6), 4, {"bits": 2, "first": 2}),
            (StreamingLLM(2, 5), 4, {"bits": 4}),
            (TOVA(6), 4, {"outliers": 0.0}),
            (SnapKV(6, 2, 3), 16, {"first": 3}),
            (PyramidInfer(sinks=1, recent=0.2, keep=0.6, exceed=3), 4, {}),
        )
    ),
]


@pytest.mark.parametrize(("policy", "size", "arguments"), CELLS, ids=str)
def test_logits_and_kept_sets_are_the_oracles(policy, size, arguments):
    codec = codec_of(CONFIG, **arguments)
    params, theirs = tiny_params(CONFIG, 1), oracle_of(policy)
    results = [decoder.run(params, CONFIG, [*p], [*f], theirs, counterpart(codec)) for p, f in RAGGED]
    state = prefilled(CacheConfig(page_size=size, policy=policy, codec=codec))
    first = logits_after(MODEL, state)
    cache, block = feed(MODEL, state.cache, [forced for _, forced in RAGGED])
    ours = np.concatenate([first[:, None], block[:, :FORCED]], axis=1)
    equal_but_for_one(ours, [result.step_logits for result in results])
    for b, result in enumerate(results):
        if np.abs(ours[b] - result.step_logits).max() < LOGITS:
            assert held_everywhere(cache, b) == result.kept[-1]


@pytest.mark.parametrize(
    ("variant", "policy"),
    [
        ("mla", Full()),
        *(
            pytest.param(variant, policy, marks=SLOW)
            for variant, policy in (("mla", H2O(3, 3)), ("cla", Full()), ("windows", Full()), ("sinks", TOVA(5)))
        ),
    ],
    ids=str,
)
def test_other_kinds_of_attention_equal_the_oracle(variant, policy):
    config = VARIANTS[variant]
    model, params, codec = model_of(config), random_params(config), codec_of(config)
    texts = [[token % config.vocab_size for token in (*prompt, *forced)] for prompt, forced in RAGGED]
    prompts = [text[: len(prompt)] for text, (prompt, _) in zip(texts, RAGGED, strict=True)]
    theirs = oracle_policies.counterpart(policy)
    results = [
        decoder.run(params, config, prompt, text[len(prompt) :], theirs, counterpart(codec))
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    state = prefilled(CacheConfig(page_size=4, policy=policy, codec=codec), model, prompts)
    first = logits_after(model, state)
    _, block = feed(model, state.cache, [text[len(p) :] for text, p in zip(texts, prompts, strict=True)])
    ours = np.concatenate([first[:, None], block[:, :FORCED]], axis=1)
    equal_but_for_one(ours, [result.step_logits for result in results])


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [pytest.param({"outliers": 1.0, "first": 0}, marks=SLOW), {"first": 64}], ids=str)
def test_what_is_kept_apart_whole_is_exact_to_fp16(arguments):
    tokens = np.asarray(ROWS)[:, :12]
    exact = np.asarray(kvjax.score(MODEL, tokens))
    cache = CacheConfig(page_size=4, codec=codec_of(CONFIG, 2, **arguments))
    ours = np.asarray(kvjax.score(MODEL, tokens, cache, "decode", prompt_length=5, prefill_chunk=CHUNK))
    # fp16 rounds keys and values by 2^-11 of them, which two layers raise to some hundredths at most.
    np.testing.assert_allclose(ours, exact, rtol=0, atol=0.02)
    coded = CacheConfig(page_size=4, codec=codec_of(CONFIG, 2))
    far = kvjax.score(MODEL, tokens, coded, "decode", prompt_length=5, prefill_chunk=CHUNK)
    assert np.abs(np.asarray(far) - exact).max() > 0.2


@SLOW
@pytest.mark.parametrize("policy", [Full(), SlidingWindow(6)], ids=str)
def test_how_a_prompt_is_split_is_irrelevant(policy):
    tokens = np.asarray(ROWS)[:, :20]
    cache = CacheConfig(page_size=4, policy=policy, codec=TINY)
    expected = kvjax.score(MODEL, tokens, cache, "prefill", prefill_chunk=CHUNK)
    for other in (
        kvjax.score(MODEL, tokens, cache, "prefill", prefill_chunk=16),
        kvjax.score(MODEL, tokens, cache, "decode", prompt_length=1, prefill_chunk=CHUNK),
    ):
        equal_but_for_one(other, expected)


@pytest.mark.parametrize("policy", [Full(), pytest.param(H2O(4, 3), marks=SLOW)], ids=str)
def test_forks_that_diverge_equal_runs_that_never_shared_a_page(policy):
    cache = CacheConfig(page_size=4, policy=policy, codec=TINY)
    state = prefilled(cache)
    live, _ = feed(MODEL, state.cache, [forced[:3] for _, forced in RAGGED])
    sources = [2, 0, 2, 0]
    live = take_sequences(live, np.array(sources, np.int32))
    more = random_tokens(3, BATCH, 6).tolist()
    live, shared = feed(MODEL, live, more)
    assert int(live.groups[0].copied) > 0
    texts = [[*RAGGED[source][1][:3], *row] for source, row in zip(sources, more, strict=True)]
    alone = prefilled(cache, prompts=[list(RAGGED[source][0]) for source in sources])
    _, apart = feed(MODEL, alone.cache, texts)
    equal_but_for_one(shared[:, :6], apart[:, 3:9])


# Memory


def test_three_bits_take_less_than_a_quarter_of_bfloat16_at_4k_tokens():
    model = ModelConfig(**{**BASE, "head_dim": 128, "num_heads": 2, "dtype": "bfloat16"})
    plain = kvjax.plan(model, CacheConfig(), context=4096).total_bytes
    shares = [
        kvjax.plan(model, CacheConfig(codec=KVQuant(bits)), context=4096).total_bytes / plain for bits in (2, 3, 4)
    ]
    # 2 * 16 b + 6 + 14 bytes of 512 a pair, and one token in float16 of 4096.
    for bits, share in zip((2, 3, 4), shares, strict=True):
        assert share == pytest.approx((32 * bits + 20) / 512 + 1 / 4096, abs=1e-6)
    assert shares[1] < 0.227


@pytest.mark.parametrize("policy", [Full(), pytest.param(H2O(4, 3), marks=SLOW)], ids=str)
def test_what_is_planned_is_allocated(policy):
    cache = CacheConfig(page_size=4, policy=policy, codec=TINY)
    layouts = layouts_of(MODEL, cache)
    plan = kvjax.plan(MODEL.config, cache, context=128, batch=BATCH)
    pages = [(layout.pages_per_row(128), BATCH * layout.pages_per_sequence(128)) for layout in layouts]
    made = jax.eval_shape(functools.partial(empty_cache, layouts, BATCH, pages))
    assert made.pool_bytes == plan.pool_bytes
    (group,) = made.groups
    assert (group.k.values.dtype, group.k.values.shape[-1]) == (jnp.uint8, 3)
    tail = sum(leaf.size * leaf.dtype.itemsize for leaf in group.tail.values())
    assert plan.total_bytes == sum(plan.pages) * group.layout.page_bytes + BATCH * group.layout.tail_bytes
    assert tail == BATCH * group.layout.tail_bytes == BATCH * 2 * 2 * 2 * 8 * 2


@pytest.mark.parametrize(
    ("program", "policy"),
    [
        ("decode_block", Full()),
        *(
            pytest.param(program, policy, marks=SLOW)
            for program, policy in (
                ("prefill_chunk", Full()),
                ("decode_block", H2O(4, 3)),
                ("prefill_segment", H2O(4, 3)),
                ("reserve_pages", H2O(4, 3)),
            )
        ),
    ],
    ids=str,
)
def test_pools_stay_where_they_are_and_are_never_decoded_whole(program, policy, monkeypatch):
    # Packed pools are small beside one block decoded: more pages tell copies from that.
    monkeypatch.setattr(contract, "PAGES", 4 * contract.PAGES)
    cache = contract.abstract_cache(contract.Choice(policy, codec_of(contract.CONFIG, outliers=0.02), 16))
    lowered = contract.lower(program, cache)
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache.pool_bytes
    pools = jax.tree.leaves((cache.groups[0].k, cache.groups[0].v))
    # A copy of even the smallest pool would be seen; decoded, the codes alone would be ten times as large.
    assert memory.temp_size_in_bytes < min(leaf.size * leaf.dtype.itemsize for leaf in pools)


@SLOW
def test_nothing_compiles_after_warm_up_and_equal_files_are_the_same_codec(tmp_path):
    # One layer more than elsewhere: these programs are new to this process.
    model = model_of(ModelConfig(**{**BASE, "num_layers": 3, "hidden_size": 16, "intermediate_size": 16}))
    told = codec_of(model.config).calibration
    told.save(tmp_path / "calibration.npz")
    cache = CacheConfig(codec=KVQuant(3, 0.1, 1, told))
    assert kvjax.warmup(model, cache, batch=2, context=128, prefill_chunk=CHUNK) > 0
    again = CacheConfig(codec=KVQuant(3, 0.1, 1, tmp_path / "calibration.npz"))
    tokens = (random_tokens(1, 128) % 61).tolist()
    for lengths, new in (((3,), 1), ((70,), 40), ((100, 2), 20)):
        out = kvjax.generate(model, [tokens[:n] for n in lengths], new, again, prefill_chunk=CHUNK)
        assert out.stats.compiles == 0, (lengths, new)


# Calibration


@functools.cache
def tiny_calibration() -> Calibration:
    """Of the tests' model, nothing left out of the ranges."""
    return kvjax.calibrate(MODEL, np.asarray(ROWS), outliers=0.0)


def test_ranges_are_those_of_the_oracles_unrotated_keys():
    found = tiny_calibration()
    keys = []
    for row in ROWS:
        exact = decoder.Decoder(tiny_params(CONFIG, 1), CONFIG, oracle_policies.Full(), oracle_codecs.Dense())
        exact.feed_prompt(row)
        turned_back = range(0, -len(row), -1)
        keys.append(
            [
                [decoder.rotate(np.stack([e.key for e in head]), turned_back, 100.0)[1:] for head in layer]
                for layer in exact.cache
            ]
        )
    every = np.concatenate(keys, axis=2)  # [L, K, tokens, D]
    # Keys of up to 5 in float32, against float64.
    np.testing.assert_allclose(found.key_least, every.min(2), rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.key_greatest, every.max(2), rtol=0, atol=1e-4)
    for tables, parts in ((found.key_levels, 2), (found.value_levels, 2)):
        assert {bits: table.shape for bits, table in tables.items()} == {b: (parts, 2**b) for b in (2, 3, 4)}


@SLOW
def test_the_weights_are_squared_slopes_of_the_loss():
    row = np.asarray(ROWS[0])[:8].astype(np.int32)
    nudge = calibration._no_nudge(CONFIG, row)
    arguments = (MODEL.params, row, CONFIG, None)
    slope, _ = jax.grad(calibration._loss, has_aux=True)(nudge, *arguments)
    loss = jax.jit(lambda nudge: calibration._loss(nudge, *arguments)[0])
    for part, layer in (("k", 0), ("v", 0), ("v", 1)):
        steepest = np.asarray(getattr(slope, part))[layer]
        where = (layer, *map(int, np.unravel_index(np.abs(steepest).argmax(), steepest.shape)))
        step = 0.02
        pushed = [float(loss(nudge._replace(**{part: getattr(nudge, part).at[where].set(by)}))) for by in (step, -step)]
        numeric = (pushed[0] - pushed[1]) / (2 * step)
        # Central differences err by the third derivative times 1e-4, and float32 losses of 30 by 1e-6 / step.
        assert abs(numeric) > 0.1
        assert float(getattr(slope, part)[where]) == pytest.approx(numeric, rel=0.02)


@pytest.mark.parametrize("count", [4, 8, 16])
def test_levels_are_those_of_the_oracles_k_means(count):
    rng = np.random.default_rng(count)
    bins = 4096
    centers = (np.arange(bins) + 0.5) / bins * 2 - 1
    place = np.clip((rng.standard_normal(20000) / 3 + 1) / 2 * bins, 0, bins - 1).astype(int)
    weight = np.exp(-2 * centers[place])
    mass, counts = np.bincount(place, weight, bins), np.bincount(place, minlength=bins)
    ours = levels_of(mass, counts, centers, count)
    theirs = page_codecs.levels_of(centers[place], weight, count, rounds=200)

    def error(levels: np.ndarray) -> float:
        return float((weight * np.abs(centers[place][:, None] - levels).min(1) ** 2).sum())

    # Both begin within a bin of the same quantiles and stop after as many rounds: two bins at most.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=4 / bins)
    assert error(ours) < 0.7 * error(np.linspace(-1, 1, count))


def test_a_share_of_a_channels_tokens_may_be_left_out_of_its_range():
    counts = np.zeros((1, 1, 1, calibration.RANGE_BINS), np.int64)
    counts[..., [0, 100, 200, 511]] = 1, 98, 100, 1
    low, high = np.full((1, 1, 1), -1.0), np.full((1, 1, 1), 1.0)
    step = 2 / calibration.RANGE_BINS
    cut = calibration.cut_ranges(counts, low, high, 0.02)
    assert (float(cut[0][0, 0, 0]), float(cut[1][0, 0, 0])) == pytest.approx((-1 + 100 * step, -1 + 201 * step))
    whole = calibration.cut_ranges(counts, low, high, 0.0)
    assert (float(whole[0][0, 0, 0]), float(whole[1][0, 0, 0])) == (-1, 1)


def test_a_calibration_is_equal_after_its_file_and_differs_by_content(tmp_path):
    told = drawn(2, 2, 8)
    told.save(tmp_path / "a.npz")
    read = Calibration.load(tmp_path / "a.npz")
    assert read == told
    assert hash(read) == hash(told)
    assert KVQuant(calibration=str(tmp_path / "a.npz")) == KVQuant(calibration=told)
    assert read != drawn(2, 2, 8, seed=1)
    path = str(tmp_path / "a.npz")
    table = {"codec": {"name": "kvquant", "bits": 4, "calibration": path}}
    assert CacheConfig.from_dict(table).codec == KVQuant(4, calibration=told)
    assert CacheConfig.from_dict({"codec": f"kvquant:2,calibration={path}"}).codec == KVQuant(2, calibration=told)


@SLOW
def test_a_latents_calibration_codes_its_own_model():
    model = model_of(VARIANTS["mla"])
    told = kvjax.calibrate(model, np.asarray(ROWS) % 61)
    assert (told.key_least.shape, told.value_levels) == ((2, 1, 24), {})
    tokens = np.asarray(ROWS)[:, :16] % 61
    exact = np.asarray(kvjax.score(model, tokens))
    errors = [
        np.abs(
            np.asarray(kvjax.score(model, tokens, CacheConfig(codec=KVQuant(bits, calibration=told)), "prefill"))
            - exact
        )
        for bits in (2, 4)
    ]
    assert errors[1].mean() < errors[0].mean() / 2


@SLOW
def test_calibrated_levels_beat_even_ones_on_the_demo_model():
    from kvjax.train.data import library_files, random_window, read_bytes, split_files

    model = kvjax.load(DEMO)
    texts = [read_bytes(files, 256) for files in split_files(library_files())]
    rng = np.random.default_rng(0)
    tokens, asked = (
        np.stack([random_window(text, 192, rng) for _ in range(count)])
        for text, count in zip(texts, (12, 8), strict=True)
    )
    told = kvjax.calibrate(model, tokens)
    again = kvjax.calibrate(model, tokens)
    assert told == again
    even = {bits: np.tile(np.linspace(-1, 1, 2**bits, dtype=np.float32), (6, 1)) for bits in (2, 3, 4)}
    plain = dataclasses.replace(told, key_levels=even, value_levels=even)
    exact = np.asarray(jax.nn.log_softmax(kvjax.score(model, asked)))

    def divergence(told: Calibration) -> float:
        logits = kvjax.score(model, asked, CacheConfig(codec=KVQuant(2, calibration=told)), "prefill")
        return float((np.exp(exact) * (exact - np.asarray(jax.nn.log_softmax(logits)))).sum(-1).mean())

    # 0.085 against 0.127 nats were measured with 16 windows of 256.
    assert divergence(told) < 0.85 * divergence(plain)


# Refusals


def test_what_cannot_be_is_refused_with_the_reason(tmp_path):
    told = drawn(2, 2, 8)
    for arguments, rule in (
        ({"bits": 5}, r"bits\) must be one of \(2, 3, 4\), got 5"),
        ({"outliers": 1.5}, r"outliers\) must be a share from 0 to 1, got 1.5"),
        ({"first": -1}, r"first\) must be an integer of at least 0, got -1"),
        ({"calibration": 7}, r"calibration\) must be a Calibration or the path of its file, got 7"),
        ({"calibration": str(tmp_path / "none.npz")}, r"cannot read the calibration .*none.npz.*kvjax.calibrate"),
    ):
        with pytest.raises(ConfigError, match=rule):
            KVQuant(**arguments)
    with pytest.raises(ConfigError, match=r"packs 8 codes at a time, and this model's vectors have 4"):
        kvjax.plan(ModelConfig(**{**BASE, "head_dim": 4}), CacheConfig(codec=KVQuant()))
    with pytest.raises(ConfigError, match=r"Calibration\(2x2x8, .* is of another model; this one has 3 layers of 1"):
        kvjax.plan(
            ModelConfig(**{**BASE, "num_layers": 3, "num_kv_heads": 1}), CacheConfig(codec=KVQuant(calibration=told))
        )
    with pytest.raises(ConfigError, match=r"needs a calibration of this model.*kvjax.calibrate\(model, tokens\)"):
        kvjax.generate(MODEL, [[1, 2, 3]], 2, CacheConfig(codec=KVQuant()))
    with pytest.raises(RequestError, match=r"tokens\[N, T\] with T of at least first \+ 2 = 3"):
        kvjax.calibrate(MODEL, [[1, 2]])


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "calibration.npz"
    drawn(2, 2, 8).save(path)
    whole = path.read_bytes()
    for broken in (b"", whole[: len(whole) // 2], b"no zip" * 50):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"calibration.npz is damaged, or no calibration"):
            Calibration.load(path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(CheckpointError, match="lacks key_greatest"):
        Calibration.load(path)
    with path.open("wb") as file:
        np.savez(file, key_least=np.zeros((2, 2, 8)), key_greatest=np.full((2, 2, 8), np.nan))
    with pytest.raises(CheckpointError, match="key_greatest holds numbers that are not finite"):
        Calibration.load(path)
