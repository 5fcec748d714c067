"""Sparse reads: steps equal the NumPy oracle, which chooses by the paper's rule, and read no more than that.

Shapes, tolerances and where they come from are those of `tests.generate.test_variant_matrix`. What must be noticed, a
page or a slot read in place of another, was seen to move logits by 0.5 and more.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import CacheConfig, Select
from kvjax.attention.selected import selected
from kvjax.cache.codecs import KIVI, Dense, Int8
from kvjax.cache.codecs.waiting import waits
from kvjax.cache.layout import KVSpec, group_layers
from kvjax.cache.page_state import store
from kvjax.cache.pages import reserve
from kvjax.cache.policies import (
    H2O,
    TOVA,
    FastGen,
    Full,
    LMInfinite,
    PyramidInfer,
    Scissorhands,
    SlidingWindow,
    SnapKV,
    StreamingLLM,
)
from kvjax.cache.selects import Chosen, Cost, Quest, SparQ, View
from kvjax.cache.selects.quest import bounds
from kvjax.cache.state import Cache, Group, empty_cache
from kvjax.cache.tail import coded
from kvjax.cache.write import layer_rows, place
from kvjax.errors import ConfigError
from tests.cache.tiny import feed, logits_after
from tests.generate import test_memory_contract as contract
from tests.generate.test_eviction_methods import oracle_of
from tests.generate.test_variant_matrix import CHUNK, FORCED, LENGTH, LOGITS, MARGIN, ONE_FLIP, PROMPTS, VARIANTS
from tests.models.cases import BASE, PLAIN, model_of, random_params, random_tokens
from tests.oracles import codecs as oracle_codecs
from tests.oracles import decoder
from tests.oracles import selects as oracle_selects

BATCH = 4
SLOW = pytest.mark.slow
MODELS = {
    **VARIANTS,
    "gqa": PLAIN,
    "mqa": dataclasses.replace(PLAIN, num_kv_heads=1),
    "three": kvjax.ModelConfig(**{**BASE, "num_layers": 3}),
}


@dataclasses.dataclass(frozen=True)
class LastPages:
    """A select of one's own: the pages of the newest tokens. Nothing need be remembered of any."""

    pages: int
    unit: Literal["page"] = "page"

    def check(self, key_dim: int) -> None:
        """Any width."""

    def reads_all(self, layer: int) -> bool:
        """No layer."""
        return False

    def covers(self, pages: int, page_size: int) -> bool:
        """No more than these."""
        return pages <= self.pages

    def summary(self, keys: jax.Array, values: jax.Array, filled: jax.Array) -> dict[str, jax.Array]:
        """Nothing."""
        return {}

    def choose(self, q: jax.Array, view: View) -> Chosen:
        """By position."""
        newest, index = jax.lax.top_k(jnp.max(view.position, axis=-1), self.pages)
        return Chosen(jnp.where(newest >= 0, index, -1))

    def cost(self, pages: int, page_size: int, key_dim: int, value_dim: int, itemsize: int) -> Cost:
        """The pages."""
        return Cost(min(pages, self.pages) * page_size, 0)


class OracleLastPages(oracle_selects.OracleSelect):
    """The same over the oracle's entries."""

    def __init__(self, pages: int, page_size: int):
        self.pages, self.page_size = pages, page_size

    def choose(self, entries, queries, scale, beside=()):
        """Entries of the last pages."""
        last = max((e.slot // self.page_size for i, e in enumerate(entries) if i not in beside), default=0)
        chosen = [i for i, e in enumerate(entries) if i in beside or e.slot // self.page_size > last - self.pages]
        return oracle_selects.Selection(chosen, None, np.inf)


def oracle_select(select: Any, page_size: int, config: kvjax.ModelConfig) -> oracle_selects.OracleSelect:
    """The oracle's select, which leaves alone what kvjax leaves alone: layers that the model itself windows."""
    if isinstance(select, LastPages):
        return OracleLastPages(select.pages, page_size)
    found = oracle_selects.counterpart(select, page_size)
    assert found is not None
    dense = lambda layer: config.windows[layer] is not None or found.reads_all(layer)  # noqa: E731
    # A frozen dataclass cannot be given another method; what stands in for it can.
    return types.SimpleNamespace(reads_all=dense, choose=found.choose)  # type: ignore[return-value]


QUEST, SPARQ = Quest(2, dense_layers=0), SparQ(rank=3, slots=6, local=2)
KIVI_2, KIVI_4 = KIVI(bits=2, group=4, residual=4), KIVI(bits=4, group=8, residual=8)
DROPPING = Scissorhands(10, 2, history=7, drop=4)
PYRAMID = PyramidInfer(1, 0.2, 1.2, keep=0.5, exceed=3)
SOME = FastGen(0.75, 0.2, 0.2, special=(3, 11, 40, 52), punctuation=(5, 7, 19, 23, 30, 44, 58))
CELLS = {
    ("gqa", DROPPING, Dense(), QUEST, 4): (),
    ("gqa", Full(), KIVI_2, Quest(1, dense_layers=0), 4): (),
    ("gqa", Full(), KIVI_2, SparQ(rank=3, slots=4, local=3), 4): SLOW,
    ("gqa", TOVA(11), Dense(), QUEST, 4): (),
    ("gqa", H2O(6, 5), Dense(), SPARQ, 4): SLOW,
    ("mla", H2O(6, 5), Int8(), SPARQ, 4): SLOW,
    ("cla", TOVA(11), Int8(), QUEST, 4): SLOW,
    ("gqa", SOME, Dense(), SPARQ, 4): SLOW,
    ("gqa", PYRAMID, Int8(), QUEST, 4): SLOW,
    ("mla", DROPPING, Int8(), SPARQ, 4): SLOW,
    ("mla", Full(), KIVI_4, SparQ(rank=3, slots=4, local=3), 8): SLOW,
    ("mla", Full(), KIVI_4, Quest(1, dense_layers=0), 8): SLOW,
    ("gqa", SnapKV(8, 4, 3), KIVI_2, SPARQ, 4): SLOW,
    ("cla", SnapKV(8, 4, 3), KIVI_2, Quest(1, dense_layers=0), 4): SLOW,
    ("gqa", Full(), KIVI(4, 4, 8), LastPages(1), 4): SLOW,
    ("gqa", Full(), Dense(), QUEST, 4): (),
    ("gqa", Full(), Dense(), SPARQ, 16): (),
    ("mla", Full(), Int8(), SPARQ, 4): SLOW,
    ("cla", H2O(5, 5), Dense(), QUEST, 4): SLOW,
    ("windows", SnapKV(8, 4, 3), Dense(), QUEST, 4): SLOW,
    ("gqa", Full(), Int8(), Quest(1, dense_layers=0), 16): SLOW,
    ("gqa", Full(), Dense(), LastPages(2), 4): SLOW,
    ("gqa", SlidingWindow(12), Dense(), SPARQ, 4): SLOW,
    ("gqa", SlidingWindow(12), Dense(), QUEST, 4): SLOW,
    ("gqa", SnapKV(8, 4, 3), Int8(), SPARQ, 4): SLOW,
    ("cla", H2O(5, 5), Dense(), SPARQ, 16): SLOW,
    ("mqa", Full(), Dense(), QUEST, 4): SLOW,
    ("mqa", Full(), Dense(), SPARQ, 4): SLOW,
    ("mla", Full(), Dense(), QUEST, 4): SLOW,
    ("cla", Full(), Dense(), QUEST, 4): SLOW,
    ("windows", Full(), Dense(), SPARQ, 4): SLOW,
    ("sinks", Full(), Dense(), QUEST, 4): SLOW,
    ("sinks", Full(), Dense(), SPARQ, 4): SLOW,
    ("three", Full(), Dense(), Quest(2), 4): SLOW,
}


@functools.cache
def model(name: str) -> kvjax.Model:
    """A variant's model."""
    return model_of(MODELS[name])


def texts(seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Ragged prompts, and the tokens forced behind each."""
    rows = zip(random_tokens(seed, BATCH, LENGTH).tolist(), PROMPTS, strict=True)
    return [(row[:length], row[length : length + FORCED]) for row, length in rows]


@pytest.mark.parametrize(
    ("variant", "policy", "codec", "select", "page_size"),
    [
        pytest.param(*cell, id=f"{cell[0]}-{cell[1]}-{type(cell[2]).__name__}-{cell[3]}-{cell[4]}", marks=marks)
        for cell, marks in CELLS.items()
    ],
)
def test_steps_read_what_the_oracle_reads(variant, policy, codec, select, page_size):
    pairs, results, matters = clear(variant, policy, codec, select, page_size)
    cache = CacheConfig(page_size=page_size, policy=policy, codec=codec, select=select)
    state = kvjax.prefill(model(variant), [prompt for prompt, _ in pairs], cache, room=FORCED, prefill_chunk=CHUNK)
    first = logits_after(model(variant), state)
    live, block = feed(model(variant), state.cache, [forced for _, forced in pairs])
    ours = np.concatenate([first[:, None], block[:, :FORCED]], axis=1)
    off = [float(np.abs(row - result.step_logits).max()) for row, result in zip(ours, results, strict=True)]
    assert max(matters) > 100 * LOGITS, "nothing was left unread that matters"
    # A flipped code is rare: one sequence of the four may have seen one.
    assert sum(error < LOGITS for error in off) >= BATCH - (codec != Dense()), off
    flip = {Dense: LOGITS, Int8: ONE_FLIP, KIVI: KIVI_FLIP}[type(codec)]
    assert max(off) < flip, off
    check_page_state(live)


KIVI_FLIP = 0.5
"""As `ONE_FLIP`: a code of 2 bits is a third of what its group spans."""


def clear(variant: str, policy: Any, codec: Any, select: Any, page_size: int) -> tuple[Any, list[Any], list[float]]:
    """Texts of the first seed that leaves no choice to rounding, the oracle's runs, and what reading all would change.

    Two tokens whose few channels have the same codes of 2 bits are one choice left to rounding.
    """
    config = MODELS[variant]
    for seed in range(20):
        pairs, results, matters = texts(seed), [], []
        for prompt, forced in pairs:
            run = functools.partial(
                decoder.run, random_params(config), config, prompt, forced, oracle_of(policy),
                oracle_codecs.counterpart(codec),
            )  # fmt: skip
            result = run(oracle_select(select, page_size, config))
            if min(result.margin, result.routing) < MARGIN:
                break
            results.append(result)
            matters.append(float(np.abs(run().step_logits - result.step_logits).max()))
        else:
            return pairs, results, matters
    raise AssertionError("no seed leaves only clear choices")


def check_page_state(cache: Cache) -> None:
    """What is remembered of every page in use is what its own entries give, whoever shares or copied it.

    Under a codec that waits, that is of every page whose keys are coded, with values as they are coded at last.
    """
    for group in cache.groups:
        layout, select = group.layout, group.layout.select
        if select is None:
            continue
        waiting = waits(layout.codec)
        read = (layout.codec.read_keys, layout.codec.read_values) if waiting else (layout.codec.decode,) * 2
        keys = np.asarray(read[0](group.k, layout.dtype))
        value = None if group.v is None else np.asarray(read[1](group.v, layout.dtype))
        values = keys[..., : layout.spec.value_dim] if value is None else value
        table, position = np.asarray(group.table), np.asarray(group.position)
        rows, batch, width = table.shape
        for row, sequence, entry in np.ndindex(rows, batch, width):
            slots = slice(entry * layout.page_size, (entry + 1) * layout.page_size)
            filled, page = position[row, sequence, slots] >= 0, table[row, sequence, entry]
            if page < 0 or not filled.any():
                continue
            if waiting:
                coded_keys, coded_values = coded(group, group.length[row, sequence])
                if slots.stop > coded_keys:
                    continue
            filled = np.broadcast_to(filled, keys.shape[1:4])
            wanted = select.summary(jnp.asarray(keys[page]), jnp.asarray(values[page]), jnp.asarray(filled))
            for name, leaf in wanted.items():
                if waiting and name == "total" and slots.stop > coded_values:
                    continue
                # float32 sums of up to 16 values in two orders.
                np.testing.assert_allclose(group.page_state[name][page], leaf, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("select", [Quest(6, dense_layers=0), SparQ(rank=2, slots=24, local=1)], ids=str)
def test_enough_pages_or_slots_equal_the_full_cache(select):
    tokens = random_tokens(3, BATCH, LENGTH)
    # Tables are wider than what 22 tokens fill, so that these really choose.
    assert not select.covers(32, 4)
    ours, full = (
        kvjax.score(model("gqa"), tokens, CacheConfig(page_size=4, select=choice), "decode", 5, prefill_chunk=CHUNK)
        for choice in (select, None)
    )
    # float32 sums in another order, as in the full cache's own paths.
    np.testing.assert_allclose(ours, full, atol=2e-5)


@pytest.mark.parametrize(
    ("policy", "codec", "select"),
    [
        (Full(), Dense(), QUEST),
        pytest.param(Full(), Dense(), SPARQ, marks=SLOW),
        pytest.param(DROPPING, Dense(), SPARQ, marks=SLOW),
        pytest.param(SOME, Dense(), QUEST, marks=SLOW),
        pytest.param(Full(), KIVI_2, SPARQ, marks=SLOW),
        pytest.param(Full(), KIVI_2, QUEST, marks=SLOW),
    ],
    ids=str,
)
def test_forks_that_diverge_and_further_prompts_equal_separate_runs(policy, codec, select):
    # Once slots are used again, a step may write all pages: every copy needs its own.
    pages = None if policy.append_only else 256
    cache = CacheConfig(page_size=4, num_pages=pages, policy=policy, codec=codec, select=select)
    first, second = random_tokens(4, 2, 6).tolist()
    prompts = [prompt for prompt, _ in texts()[:2]]
    state = kvjax.prefill(model("gqa"), prompts, cache, room=12, prefill_chunk=CHUNK)
    forked, block = feed(model("gqa"), kvjax.fork(state, 2).cache, [first, second, first, second])
    check_page_state(forked)
    alone = kvjax.prefill(model("gqa"), [p for p in prompts for _ in range(2)], cache, room=12, prefill_chunk=CHUNK)
    apart, separate = feed(model("gqa"), alone.cache, [first, second, first, second])
    np.testing.assert_array_equal(block[:, :6], separate[:, :6])
    assert int(forked.groups[0].copied) > 0
    check_page_state(apart)
    state = kvjax.prefill(model("gqa"), prompts, cache, prefill_chunk=CHUNK)
    _, state = kvjax.extend(model("gqa"), state, max_new_tokens=5, prefill_chunk=CHUNK)
    _, state = kvjax.extend(model("gqa"), state, [first, second], max_new_tokens=5, prefill_chunk=CHUNK)
    check_page_state(state.cache)


@pytest.mark.slow
@pytest.mark.parametrize("select", [QUEST, SPARQ], ids=str)
def test_a_prompt_reads_everything_even_token_by_token(select):
    prompts = [prompt for prompt, _ in texts()]
    cache = CacheConfig(page_size=4, select=select)
    whole, single = (
        logits_after(model("gqa"), kvjax.prefill(model("gqa"), prompts, cache, prefill_chunk=chunk))
        for chunk in (CHUNK, 1)
    )
    # float32 sums in another order.
    np.testing.assert_allclose(whole, single, atol=2e-5)


@pytest.mark.slow
def test_beams_that_read_enough_pages_find_what_the_full_cache_finds():
    prompts, sampling = [prompt for prompt, _ in texts()[:2]], kvjax.Sampling(beams=2)
    ours, full = (
        kvjax.generate(model("gqa"), prompts, 9, CacheConfig(page_size=4, select=select), sampling).tokens
        for select in (Quest(6, dense_layers=0), None)
    )
    assert ours == full


# One layer's reads, without a model

SPEC = KVSpec(layers=2, kv_heads=2, key_dim=8, value_dim=8)


def filled(select: Any, lengths: tuple[int, ...], page_size: int = 4, policy: Any = Full()) -> tuple[Group, Any, Any]:
    """A group that holds random keys and values [B, T, K, D] of the second layer, and these."""
    config = CacheConfig(page_size=page_size, policy=policy, select=select)
    (layout,) = group_layers(SPEC, (), config, "float32")
    width = layout.pages_per_row(64)
    cache = empty_cache((layout,), len(lengths), ((width, len(lengths) * width * layout.rows),))
    (group,) = reserve(cache, jnp.asarray(lengths))[0].groups
    # Whatever was never written may be anything.
    group = dataclasses.replace(group, k=jax.tree.map(lambda x: x * jnp.nan, group.k))
    draw = np.random.default_rng(0).standard_normal((2, len(lengths), max(lengths), 2, 8)).astype(np.float32)
    order = jnp.arange(max(lengths))
    positions = jnp.where(order < jnp.asarray(lengths)[:, None], order, -1)
    slots = policy.slots(group.length, group.victim, jnp.zeros(len(lengths), jnp.int32), positions)
    group = place(group, slots, positions)
    k, v = (layout.codec.encode(jnp.asarray(x)) for x in draw)
    return store(group, 1, layer_rows(group, slots, 1), k, v), *draw


def queries(heads: int, batch: int = 2) -> np.ndarray:
    """float32[B, 1, H, D]."""
    return np.random.default_rng(1).standard_normal((batch, 1, heads, 8)).astype(np.float32)


def view_of(group: Group) -> View:
    """What a step of the second layer may read."""
    seen: list[View] = []

    class Spy(Quest):
        def choose(self, q, view):
            seen.append(view)
            return super().choose(q, view)

    layout = dataclasses.replace(group.layout, select=Spy(1))
    selected(dataclasses.replace(group, layout=layout), 1, jnp.asarray(queries(4)), jnp.full((2, 1), 99), None)
    return seen[0]


@pytest.mark.parametrize("policy", [Full(), pytest.param(H2O(30, 10), marks=SLOW)], ids=str)
def test_a_page_is_bounded_by_more_than_any_of_its_scores(policy):
    group, k, _ = filled(Quest(1, 0), (37, 9), policy=policy)
    q = queries(4).reshape(2, 2, 2, 8)
    found = np.asarray(bounds(jnp.asarray(q), view_of(group)))
    for b, length in enumerate((37, 9)):
        # [K, G, T]; the sum over a group of each head's own highest score in the page is not above the bound either.
        scores = np.einsum("kgd,tkd->kgt", q[b], k[b, :length])
        for page in range(-(-length // 4)):
            highest = scores[:, :, page * 4 : page * 4 + 4].max(axis=2).sum(axis=1)
            assert np.all(found[b, :, page] >= highest - 1e-5)


def test_pages_of_one_slot_are_the_exact_top():
    group, k, _ = filled(Quest(5, 0), (37, 9), page_size=1)
    q = queries(4)
    few = selected(group, 1, jnp.asarray(q), jnp.asarray([[36], [8]]), None)
    for b, length in enumerate((37, 9)):
        scores = np.einsum("kgd,tkd->kt", q[b].reshape(2, 2, 8), k[b, :length])
        for head in range(2):
            best = {length - 1, *np.argsort(-scores[head, : length - 1])[:4].tolist()}
            assert set(np.asarray(few.positions)[b, head].tolist()) == best


def test_all_channels_and_one_query_head_give_the_exact_top_and_its_exact_share():
    group, k, v = filled(SparQ(rank=8, slots=5, local=1), (37, 9))
    q = queries(2)
    few = selected(group, 1, jnp.asarray(q), jnp.asarray([[36], [8]]), None)
    out = few.completed(few.attend(jnp.asarray(q), jnp.asarray([[36], [8]]), None, None)[0])
    for b, length in enumerate((37, 9)):
        for head in range(2):
            scores = k[b, :length, head] @ q[b, 0, head] * 8**-0.5
            best = [length - 1, *np.argsort(-scores[: length - 1])[:4].tolist()]
            assert sorted(np.asarray(few.positions)[b, head].tolist()) == sorted(best)
            weights = np.exp(scores) / np.exp(scores).sum()
            mean = v[b, :length, head].mean(axis=0)
            wanted = weights[best] @ v[b, best, head] + (1 - weights[best].sum()) * mean
            # Sums of 37 float32 products of about 1.
            np.testing.assert_allclose(out[b, 0, head], wanted, atol=1e-5)


@pytest.mark.parametrize(("select", "entries", "beside"), [(Quest(3, 0), 12, 10 * 2 * 8), (SparQ(3, 7, 2), 7, None)])
def test_a_step_reads_the_bytes_that_are_counted(select, entries, beside):
    group, *_ = filled(select, (37, 37))
    layout = group.layout
    few = selected(group, 1, jnp.asarray(queries(4)), jnp.full((2, 1), 36), None)
    assert few.table.shape[-1] * few.k.values.shape[3] == entries
    assert np.all(np.asarray(few.lengths) == entries)
    # 10 pages of 4; SparQ looks at 3 channels of 40 slots and at the sum of each page's 8-element values.
    beside = 40 * 3 + 10 * 8 if beside is None else beside
    pairs = entries * layout.bytes_per_vector_pair
    assert layout.bytes_read(37) == SPEC.layers * SPEC.kv_heads * (pairs + 4 * beside)
    full = dataclasses.replace(layout, select=None)
    assert full.bytes_read(37) == SPEC.layers * SPEC.kv_heads * 40 * layout.bytes_per_vector_pair


def test_long_contexts_read_a_fraction_of_the_bytes():
    config = dataclasses.replace(PLAIN, head_dim=64)
    full, quest, sparq = (
        kvjax.plan(config, CacheConfig(page_size=16, select=select), 4096)
        for select in (None, Quest(16, dense_layers=0), SparQ(rank=8, slots=128, local=32))
    )
    # Bounds of every page, a sixteenth of it, and 16 of 256 pages.
    assert quest.read_bytes / full.read_bytes == pytest.approx(1 / 16 + 1 / 16)
    # 8 of 64 channels of keys, a thirty-second of the values, and 128 of 4096 tokens.
    assert sparq.read_bytes / full.read_bytes == pytest.approx(1 / 16 + 1 / 32 + 1 / 32)
    assert quest.total_bytes / full.total_bytes == pytest.approx(1 + 1 / 16)
    assert sparq.total_bytes / full.total_bytes == pytest.approx(1 + 1 / 2 + 1 / 32)


# The memory contract


@pytest.mark.parametrize(
    ("program", "policy", "select"),
    [
        ("decode_block", Full(), QUEST),
        ("prefill_chunk", Full(), SPARQ),
        pytest.param("reserve_pages", Full(), SPARQ, marks=SLOW),
        pytest.param("prefill_chunk", SlidingWindow(64), QUEST, marks=SLOW),
        pytest.param("decode_block", H2O(40, 40), SPARQ, marks=SLOW),
        pytest.param("prefill_segment", H2O(40, 40), QUEST, marks=SLOW),
        pytest.param("feed_tokens", H2O(40, 40), QUEST, marks=SLOW),
        ("decode_block", Scissorhands(80, 40, drop=20), SPARQ),
        pytest.param("decode_block", SOME, QUEST, marks=SLOW),
        pytest.param("decode_block", PYRAMID, QUEST, marks=SLOW),
        pytest.param("feed_tokens", Scissorhands(80, 40, drop=20), QUEST, marks=SLOW),
    ],
    ids=str,
)
def test_neither_pools_nor_what_is_remembered_of_pages_is_copied(program, policy, select, monkeypatch):
    monkeypatch.setattr(
        contract, "cache_of", lambda pair: CacheConfig(page_size=16, policy=pair[0].policy, select=select)
    )
    cache = contract.abstract_cache(contract.Choice(policy, Dense(), 16))
    contract.check_memory(contract.lower(program, cache), cache)


@pytest.mark.parametrize(
    ("program", "select"),
    [
        ("decode_block", SPARQ),
        pytest.param("decode_block", QUEST, marks=SLOW),
        pytest.param("prefill_segment", SPARQ, marks=SLOW),
        pytest.param("feed_tokens", QUEST, marks=SLOW),
    ],
    ids=str,
)
def test_a_select_beside_exact_tokens_leaves_the_pools_where_they_are(program, select, monkeypatch):
    codec = KIVI(2, 32, 64)
    monkeypatch.setattr(contract, "cache_of", lambda pair: CacheConfig(codec=codec, select=select))
    cache = contract.abstract_cache(contract.Choice(Full(), codec, 32))
    memory = contract.lower(program, cache).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache.pool_bytes
    (group,) = cache.groups
    # Less than a copy of any of them would take, those of two codes a byte included.
    pools = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((group.k, group.v, group.page_state))]
    large = [size for size in pools if size > 0.05 * sum(pools)]
    assert memory.temp_size_in_bytes < min(large) / 2, (memory.temp_size_in_bytes, pools)


@pytest.mark.parametrize("select", [QUEST, pytest.param(SPARQ, marks=SLOW)], ids=str)
def test_nothing_compiles_once_a_size_has_run(select):
    cache, tokens = CacheConfig(page_size=4, select=select), random_tokens(5, 2, 60).tolist()
    small = model_of(dataclasses.replace(PLAIN, num_layers=1))
    kvjax.warmup(small, cache, batch=2, context=128, prefill_chunk=CHUNK)
    for lengths, new in (((3, 60), 17), ((30, 1), 40)):
        prompts = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
        assert kvjax.generate(small, prompts, new, cache, prefill_chunk=CHUNK).stats.compiles == 0


# What is refused


def test_equal_selects_are_equal_and_methods_of_ones_own_are_selects():
    assert hash(Quest(4)) == hash(Quest(4, dense_layers=2))
    assert isinstance(LastPages(1), Select)
    assert CacheConfig.from_dict({"select": "sparq:4,8,local=2"}).select == SparQ(4, 8, 2)


def test_dense_layers_remember_nothing():
    windows = (None, None, None, 8)
    groups = group_layers(dataclasses.replace(SPEC, layers=4), windows, CacheConfig(select=Quest(3)), "float32")
    assert [(group.layers, group.select) for group in groups] == [((0, 1), None), ((2,), Quest(3)), ((3,), None)]
    assert groups[0].page_state_bytes == 0 < groups[1].page_state_bytes


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Quest(0), r"Quest\.pages must be an integer of at least 1, got 0"),
        (lambda: Quest(True), r"Quest\.pages must be an integer"),
        (lambda: Quest(4, dense_layers=-1), r"Quest\.dense_layers must be an integer of at least 0, got -1"),
        (lambda: SparQ(0, 4, 1), r"SparQ\.rank must be an integer of at least 1, got 0"),
        (lambda: SparQ(4, 4, 0), r"SparQ\.local must be an integer of at least 1, got 0"),
        (lambda: SparQ(4, 4, 5), r"SparQ\.local=5 must be at most slots=4"),
        (lambda: CacheConfig(select=Quest), r"CacheConfig\.select must be an instance of one of kvjax\.selects"),
        (lambda: CacheConfig(select=4), r"CacheConfig\.select must be an instance of one of kvjax\.selects"),
        *(
            (lambda policy=policy: CacheConfig(policy=policy, select=Quest(4)), r"turns its query to several positions")
            for policy in (StreamingLLM(2, 4), LMInfinite(2, 4))
        ),
        (
            lambda: kvjax.plan(PLAIN, CacheConfig(select=SparQ(9, 16, 4))),
            r"SparQ\.rank=9 must be at most 8, the width of this model's keys",
        ),
        (
            lambda: group_layers(dataclasses.replace(SPEC, rebuilt=True), (), CacheConfig(select=SPARQ), "float32"),
            r"rebuilds its keys every step",
        ),
    ],
)
def test_impossible_settings_are_refused_with_the_reason(make, says):
    with pytest.raises(ConfigError, match=says):
        make()
