"""`fork` and `rollback`: copies that go on like separate runs, and tokens taken back without a trace.

Both are compared with runs that never forked or never saw the tokens. These compute every token by the same programs at
the same batch size, so logits must be equal bit for bit, and so must what the cache holds; only page numbers differ.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

import kvjax
from kvjax import CacheConfig
from kvjax.cache.codecs import KIVI, Dense, Int8
from kvjax.cache.policies import H2O, TOVA, Full, KVMerger, PyramidKV, SlidingWindow, SnapKV, StreamingLLM
from kvjax.cache.selects import Quest, SparQ
from kvjax.cache.state import Cache
from kvjax.config import ModelConfig
from kvjax.errors import RequestError
from kvjax.generate.compiles import compiled_programs
from tests.cache.tiny import BATCH, CHUNK, CONFIG, MODEL, PLAIN, VOCAB, feed, model_of, random_tokens
from tests.models.cases import MLA
from tests.models.cases import model_of as variant_of

PROMPTS = [random_tokens(31, length).tolist() for length in (10, 5, 13, 9)]
FORCED, MORE = random_tokens(32, BATCH, 8).tolist(), random_tokens(33, BATCH, 6).tolist()
BACK = [5, 3, 7, 1]
"""Tokens taken back of each sequence, of the 8 that were fed behind its prompt."""


def mixed(first: CacheConfig, second: CacheConfig) -> CacheConfig:
    """One in layer 0, the other in layer 1."""
    return dataclasses.replace(first, overrides=(((1,), second),))


def config(policy: Any = Full(), codec: Any = Dense(), page_size: int = 4, select: Any = None) -> CacheConfig:
    """Small pages."""
    return CacheConfig(page_size=page_size, policy=policy, codec=codec, select=select)


SNAP = SnapKV(6, window=3, kernel=3)
SNAP_AND_WINDOW = mixed(config(SNAP, Int8()), config(SlidingWindow(24)))
KIVI_16, KIVI_24 = CacheConfig(codec=KIVI(2, 8, 16)), CacheConfig(codec=KIVI(4, 8, 24))
WINDOWS = ModelConfig(**{**dataclasses.asdict(CONFIG), "windows": (6, None), "rope_scaling": CONFIG.rope_scaling})
MODELS = {"gqa": lambda: MODEL, "mla": lambda: variant_of(MLA), "windows": lambda: model_of(WINDOWS)}


@functools.cache
def model(name: str) -> kvjax.Model:
    """One of the models above."""
    return MODELS[name]()


def cells(fast: dict[str, tuple[str, CacheConfig]], slow: dict[str, tuple[str, CacheConfig]]) -> list[Any]:
    """Parameters for `pytest.mark.parametrize`."""
    return [
        pytest.param(*cell, id=name, marks=marks)
        for some, marks in ((fast, ()), (slow, pytest.mark.slow))
        for name, cell in some.items()
    ]


RINGS = mixed(config(SlidingWindow(6), Int8()), config(H2O(4, 3), Int8()))
FORKED = cells(
    {
        "window-int8+h2o-int8": ("gqa", RINGS),
        "kivi": ("gqa", KIVI_16),
    },
    {
        "tova+snapkv-int8": ("gqa", mixed(config(TOVA(6)), config(SNAP, Int8()))),
        "quest": ("gqa", config(select=Quest(2, dense_layers=1))),
        "h2o-quest": ("gqa", config(H2O(4, 3), select=Quest(1, dense_layers=0))),
        "sparq": ("gqa", config(codec=Int8(), select=SparQ(4, 6, 2))),
        "pyramidkv-kivi": ("gqa", dataclasses.replace(KIVI_16, policy=PyramidKV(6, window=2, beta=2))),
        "streaming+kvmerger": ("gqa", mixed(config(StreamingLLM(2, 5)), config(KVMerger(3, 3)))),
        "mla-h2o": ("mla", config(H2O(4, 3))),
        "windows-int8": ("windows", config(codec=Int8())),
    },
)


def prompted(name: str, cache: CacheConfig, prompts: Sequence[Sequence[int]] = PROMPTS) -> kvjax.State:
    """A fresh state."""
    return kvjax.prefill(model(name), prompts, cache, prefill_chunk=CHUNK)


def fed(name: str, state: kvjax.State, tokens: Sequence[Sequence[int]]) -> tuple[kvjax.State, list[np.ndarray]]:
    """The state with tokens behind what it holds, those pending first, and the logits after each of all these."""
    pieces = [[*held[len(held) - state.pending :], *piece] for held, piece in zip(state.tokens, tokens, strict=True)]
    cache, logits = feed(model(name), state.cache, pieces)
    held = tuple((*old, *piece) for old, piece in zip(state.tokens, tokens, strict=True))
    state = dataclasses.replace(state, cache=cache, tokens=held, last=None, pending=0)
    return state, [rows[: len(piece)] for rows, piece in zip(logits, pieces, strict=True)]


def used(state: kvjax.State) -> list[int]:
    """Pages in use, per group."""
    return [int(group.used) for group in state.cache.groups]


def contents(cache: Cache) -> list[dict[str, np.ndarray]]:
    """Per group what its rows hold, page by page through the tables; what no token is in counts as zero.

    Not what lies in pages that wait to be coded: it is whatever was there.
    """
    found = []
    for group in jax.device_get(cache.groups):
        page, filled = np.maximum(group.table, 0), group.position >= 0
        here = filled.reshape(*page.shape, 1, 1, -1)
        arrays = {"length": group.length, "position": group.position, "victim": group.victim}
        arrays |= {"pages": group.table >= 0} | group.row_state | group.settled
        for name, leaf in group.page_state.items():
            arrays[name] = np.where(np.any(filled.reshape(*page.shape, -1), axis=3)[..., None, None, None],
                                    leaf[page].reshape(*page.shape, *leaf.shape[1:3], -1), 0)  # fmt: skip
        if not group.tail:
            for number, leaf in enumerate(jax.tree.leaves((group.k, group.v))):
                values = leaf[page]
                arrays[f"pool {number}"] = np.where(here.reshape(*here.shape, *(1,) * (leaf.ndim - 4)), values, 0)
        found.append(arrays)
    return found


def assert_same_contents(ours: Cache, theirs: Cache) -> None:
    """Held alike, bit for bit."""
    assert ours.seen.tolist() == theirs.seen.tolist()
    for mine, other in zip(contents(ours), contents(theirs), strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            np.testing.assert_array_equal(mine[name], other[name], err_msg=name)


def assert_sound(cache: Cache) -> None:
    """Every page is free or counted as often as tables name it."""
    for group in jax.device_get(cache.groups):
        named = np.bincount(group.table[group.table >= 0], minlength=group.num_pages)
        np.testing.assert_array_equal(named, group.refs)
        assert sorted([*group.free[: group.top], *np.flatnonzero(group.refs)]) == list(range(group.num_pages))


# Forks


def two_of(state: kvjax.State) -> kvjax.State:
    """The state's first two sequences, in a cache of as many as before: their forks then fill it."""
    return dataclasses.replace(state, tokens=state.tokens[:2], prompt_lengths=state.prompt_lengths[:2])


@pytest.mark.parametrize("name, cache", FORKED)
def test_forks_diverge_like_separate_runs(name: str, cache: CacheConfig) -> None:
    doubled = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    apart, _ = fed(name, prompted(name, cache, doubled), [FORCED[0][:3]] * 2 + [FORCED[1][:3]] * 2)
    apart, expected = fed(name, apart, MORE)
    state = two_of(prompted(name, cache))
    state = dataclasses.replace(state, tokens=(*state.tokens, (), ()))  # nothing is fed to the other two
    state, _ = fed(name, state, [FORCED[0][:3], FORCED[1][:3], [], []])
    state = two_of(state)
    alone = used(two_alone := kvjax.fork(state, 1))
    assert two_alone is state
    forked = kvjax.fork(state, 2)
    assert forked.tokens == tuple(state.tokens[i] for i in (0, 0, 1, 1))
    assert forked.prompt_lengths == tuple(state.prompt_lengths[i] for i in (0, 0, 1, 1))
    # The two sequences beyond the batch are no part of what is forked, and their pages come free.
    assert all(now <= before for now, before in zip(used(forked), alone, strict=True))
    assert all(int(group.copied) == 0 for group in forked.cache.groups), "a fork moves no page"
    for group, old in zip(forked.cache.groups, state.cache.groups, strict=True):
        assert group.k.values is old.k.values, "a fork does not so much as touch the pool"
    forked, logits = fed(name, forked, MORE)
    for ours, theirs in zip(logits, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert_same_contents(forked.cache, apart.cache)
    assert_sound(forked.cache)


# Rollbacks

TAKEN_BACK = cells(
    {
        "full": ("gqa", PLAIN),
        "snapkv-int8+wide-window": ("gqa", SNAP_AND_WINDOW),
        "kivi": ("gqa", KIVI_24),
        "quest": ("gqa", config(select=Quest(2, dense_layers=1))),
    },
    {
        "int8": ("gqa", config(codec=Int8(), page_size=16)),
        "sparq": ("gqa", config(select=SparQ(4, 6, 2))),
        "snapkv-quest": ("gqa", config(SNAP, select=Quest(1, dense_layers=0))),
        "pyramidkv-kivi": ("gqa", dataclasses.replace(KIVI_24, policy=PyramidKV(6, window=2, beta=2))),
        "kvmerger": ("gqa", config(KVMerger(3, 3))),
        "kivi-quest": ("gqa", dataclasses.replace(KIVI_24, select=Quest(1, dense_layers=0))),
        "mla": ("mla", config()),
        "mla-kivi": ("mla", CacheConfig(codec=KIVI(2, 8, 24))),
    },
)


@pytest.mark.parametrize("name, cache", TAKEN_BACK)
def test_what_is_taken_back_leaves_no_trace(name: str, cache: CacheConfig) -> None:
    state, logits = fed(name, prompted(name, cache), FORCED)
    before = used(state)
    state = kvjax.rollback(state, BACK)
    kept = [forced[: len(forced) - n] for forced, n in zip(FORCED, BACK, strict=True)]
    assert state.tokens == tuple((*prompt, *forced) for prompt, forced in zip(PROMPTS, kept, strict=True))
    assert (state.pending, state.last) == (1, None)
    assert all(now < then for now, then in zip(used(state), before, strict=True)), "empty pages come back"
    never, first = fed(name, prompted(name, cache), [forced[:-1] for forced in kept])
    assert used(state) == used(never)
    assert state.cache.seen.tolist() == never.cache.seen.tolist()
    assert [contents(state.cache)[0]["position"].tolist()] == [contents(never.cache)[0]["position"].tolist()]
    state, ours = fed(name, state, MORE)
    never, theirs = fed(name, never, [[forced[-1], *more] for forced, more in zip(kept, MORE, strict=True)])
    for a, b, early, fresh in zip(ours, theirs, logits, first, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(early[: len(fresh)], fresh)
    assert_same_contents(state.cache, never.cache)
    assert_sound(state.cache)


def test_forks_that_share_a_page_are_unharmed_when_one_of_them_goes_back():
    state, _ = fed("gqa", prompted("gqa", PLAIN), FORCED)
    state = kvjax.rollback(kvjax.fork(two_of(state), 2), [0, 6, 9, 1])
    state, ours = fed("gqa", state, MORE)
    texts = [[*PROMPTS[b // 2], *FORCED[b // 2]] for b in range(BATCH)]
    texts = [text[: len(text) - n] for text, n in zip(texts, (0, 6, 9, 1), strict=True)]
    # As prompts of all but what was fed behind; the third went back into its prompt.
    prompts = [text[:size] for text, size in zip(texts, (10, 10, 3, 5), strict=True)]
    rest = [[*text[len(prompt) :], *more] for text, prompt, more in zip(texts, prompts, MORE, strict=True)]
    _, theirs = fed("gqa", prompted("gqa", PLAIN, prompts), rest)
    for a, b in zip(ours, theirs, strict=True):
        # Not bit for bit: here the third's last tokens came through a prompt's programs, there one by one.
        np.testing.assert_allclose(a, b[-len(a) :], atol=1e-4)
    assert_sound(state.cache)


def test_generated_tokens_taken_back_are_generated_again():
    state = kvjax.prefill(MODEL, PROMPTS, PLAIN, prefill_chunk=CHUNK)
    out, state = kvjax.extend(MODEL, state, max_new_tokens=8)
    state = kvjax.rollback(state, 5)
    again, state = kvjax.extend(MODEL, state, max_new_tokens=5)
    assert again.tokens == [tokens[-5:] for tokens in out.tokens]
    assert again.logprobs == [logprobs[-5:] for logprobs in out.logprobs]
    # All of the turn and of the prompt but one token, and another turn instead.
    state = kvjax.rollback(state, [len(tokens) - 1 for tokens in state.tokens])
    assert [len(tokens) for tokens in state.tokens] == [1] * BATCH
    assert used(state) == [0], "the one that stays is fed again, so the cache is empty"
    other, _ = kvjax.extend(MODEL, state, MORE, max_new_tokens=5, prefill_chunk=CHUNK)
    prompts = [[prompt[0], *more] for prompt, more in zip(PROMPTS, MORE, strict=True)]
    assert other.tokens == kvjax.generate(MODEL, prompts, 5, PLAIN, prefill_chunk=CHUNK).tokens


def test_a_prompt_can_be_taken_back_right_after_prefill():
    state = kvjax.rollback(prompted("gqa", PLAIN), [0, 4, 12, 2])
    out, _ = kvjax.extend(MODEL, state, max_new_tokens=5)
    prompts = [prompt[: len(prompt) - n] for prompt, n in zip(PROMPTS, (0, 4, 12, 2), strict=True)]
    assert out.tokens == kvjax.generate(MODEL, prompts, 5, PLAIN, prefill_chunk=CHUNK).tokens


def test_nothing_taken_back_is_the_same_state():
    state = prompted("gqa", PLAIN)
    assert kvjax.rollback(state, 0) is state
    assert kvjax.rollback(state, np.zeros(BATCH, np.int64)) is state


def test_forks_and_rollbacks_of_shapes_seen_before_compile_nothing():
    def turn() -> None:
        state, _ = fed("gqa", prompted("gqa", PLAIN), FORCED)
        kvjax.rollback(kvjax.fork(two_of(kvjax.rollback(state, BACK)), 2), [1, 2, 3, 1])

    turn()
    before = compiled_programs()
    turn()
    assert compiled_programs() == before


# What cannot be taken back

REFUSED: dict[str, tuple[CacheConfig, Any, str]] = {
    "weighed": (
        mixed(config(TOVA(6)), config(SNAP, Int8())),
        1,
        r"sequence 0 .*TOVA\(budget=6\) \(layers 0\) has counted .*at most 0 can",
    ),
    "a full ring": (
        RINGS,
        [0, 0, 1, 0],
        r"sequence 2 .*SlidingWindow\(window=6\) \(layers 0\) has written over older tokens.*at most 0 can",
    ),
    "a ring that was full for one": (SNAP_AND_WINDOW, [0, 8, 1, 0], r"sequence 2 .*\(window=24\).* written over"),
    "into what a prompt was chosen by": (
        SNAP_AND_WINDOW,
        [1, 1, 0, 15],
        r"sequence 3 cannot lose its last 15 tokens: SnapKV.* has chosen from the prompt .*at most 14 can",
    ),
    "beyond KIVI's ring": (KIVI_16, [0, 1, 2, 0], r"sequence 2 .*KIVI.* has coded .*at most 1 can"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_taken_back_says_why_and_how_much_can(case: str) -> None:
    cache, tokens, message = REFUSED[case]
    state, _ = fed("gqa", prompted("gqa", cache), [[*a, *b] for a, b in zip(FORCED, MORE, strict=True)])
    # As after `extend`: the last token given is not held yet.
    state = dataclasses.replace(state, tokens=tuple((*held, 7) for held in state.tokens), pending=1)
    with pytest.raises(RequestError, match=message):
        kvjax.rollback(state, tokens)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state.cache)), "the state is as it was"


@pytest.mark.parametrize(
    "tokens, message",
    [
        (-1, "at least 0 tokens, got -1"),
        (1.0, "a number of tokens, or one for each"),
        (True, "got True"),
        ("2", "got '2'"),
        ([[1], [1, 2], [3], [4]], "a number of tokens"),
        (None, "got None"),
        ([1, 2], "2 numbers for 4 sequences"),
        ([[1], [1], [1], [1]], "a number of tokens"),
        ([0, 5, 0, 0], "sequence 1 has 5 tokens, of which one must stay, so at most 4"),
        (10**30, "a number of tokens"),
    ],
)
def test_a_bad_number_of_tokens_is_refused(tokens: Any, message: str) -> None:
    state = prompted("gqa", PLAIN)
    with pytest.raises(RequestError, match=message):
        kvjax.rollback(state, tokens)


@pytest.mark.parametrize("n", [0, -2, 1.5, True, "2", None])
def test_a_bad_number_of_copies_is_refused(n: Any) -> None:
    with pytest.raises(RequestError, match="integer n of at least 1"):
        kvjax.fork(prompted("gqa", PLAIN), n)


def test_what_is_no_live_state_is_refused():
    with pytest.raises(RequestError, match=r"a kvjax.State is needed"):
        kvjax.rollback(prompted("gqa", PLAIN).cache, 1)  # type: ignore[arg-type]
    state = prompted("gqa", PLAIN)
    kvjax.extend(MODEL, state, max_new_tokens=1)
    _, grown = kvjax.extend(MODEL, prompted("gqa", PLAIN), max_new_tokens=3)
    fork = kvjax.fork(grown, 2)
    kvjax.extend(MODEL, grown, max_new_tokens=2)
    for dead in (grown, fork):
        with pytest.raises(RequestError, match="consumed by an earlier call"):
            kvjax.rollback(dead, 1)


@pytest.mark.slow
def test_layers_that_remember_a_sum_take_nothing_back():
    retention = ModelConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_layers=4, num_heads=4, num_kv_heads=2,
        cross_from=2, retention_layers=(0, 1),
    )  # fmt: skip
    _, state = kvjax.extend(kvjax.init(retention), kvjax.prefill(kvjax.init(retention), PROMPTS), max_new_tokens=4)
    with pytest.raises(RequestError, match="recurrent layers"):
        kvjax.rollback(state, 1)
