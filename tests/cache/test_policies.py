"""The slot arithmetic of policies against plain Python: every small case at once, one per sequence of a batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvjax.cache.policies import H2O, TOVA, Full, Policy, Read, SlidingWindow, StreamingLLM
from kvjax.cache.policies.protocol import highest_newest, oldest_lowest
from kvjax.errors import ConfigError

LONGEST, MOST = 22, 12
CASES = np.array(list(itertools.product(range(LONGEST), range(MOST + 1))))
SEEN, N = CASES.T.astype(np.int32)
ORDER = np.arange(MOST, dtype=np.int32)
POSITIONS = np.where(N[:, None] > ORDER, SEEN[:, None] + ORDER, -1)
RINGS = [
    SlidingWindow(1),
    SlidingWindow(5),
    SlidingWindow(30),
    StreamingLLM(0, 4),
    StreamingLLM(2, 3),
    StreamingLLM(4, 1),
    StreamingLLM(3, 8),
]


def slots_of(policy: Policy, length: np.ndarray) -> np.ndarray:
    """int[cases, T]."""
    victim = np.full((1, len(CASES)), -1, np.int32)
    return np.asarray(policy.slots(length[None], victim, SEEN, POSITIONS))[0]


def touched_by(policy: Policy, length: np.ndarray, page_size: int) -> np.ndarray:
    """bool[cases, N]."""
    starts = np.arange(0, 48, page_size, dtype=np.int32)
    return np.asarray(policy.touches(length[None], SEEN, N, starts, page_size))[0]


def ring(policy: Any, tokens: int) -> dict[int, int]:
    """slot -> position after `tokens` tokens came one at a time: the oldest that is no sink gives up its slot."""
    held: dict[int, int] = {}
    for position in range(tokens):
        if len(held) < policy.sinks + policy.window:
            held[len(held)] = position
        else:
            held[min((p, slot) for slot, p in held.items() if p >= policy.sinks)[1]] = position
    return held


@pytest.mark.parametrize("policy", RINGS, ids=str)
def test_a_call_leaves_a_ring_as_its_tokens_one_by_one_would(policy):
    length = np.array([policy.capacity(int(seen)) for seen in SEEN], np.int32)
    for seen, n, slots in zip(SEEN, N, slots_of(policy, length), strict=True):
        landed = {int(slot): int(seen) + t for t, slot in enumerate(slots) if slot >= 0}
        assert len(landed) == np.sum(slots >= 0), "two tokens of one call share a slot"
        assert np.all(slots[n:] == -1)
        assert ring(policy, int(seen)) | landed == ring(policy, int(seen + n))


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("policy", RINGS, ids=str)
def test_a_ring_touches_exactly_the_pages_it_writes(policy, page_size):
    length = np.array([policy.capacity(int(seen)) for seen in SEEN], np.int32)
    touched = touched_by(policy, length, page_size)
    for slots, pages in zip(slots_of(policy, length), touched, strict=True):
        assert {int(slot) // page_size for slot in slots if slot >= 0} == set(np.flatnonzero(pages).tolist())


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_full_appends_at_the_position_and_touches_what_it_writes(page_size):
    slots = slots_of(Full(), SEEN)
    np.testing.assert_array_equal(slots, POSITIONS)
    for row, pages in zip(slots, touched_by(Full(), SEEN, page_size), strict=True):
        assert {int(slot) // page_size for slot in row if slot >= 0} == set(np.flatnonzero(pages).tolist())


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("policy", [TOVA(6), H2O(3, 2), H2O(0, 7)], ids=str)
def test_choosing_policies_touch_new_pages_until_full_and_then_all(policy, page_size):
    full = policy.held + 1
    length = np.minimum(SEEN, full).astype(np.int32)
    for held, n, pages in zip(length.tolist(), N.tolist(), touched_by(policy, length, page_size), strict=True):
        first = held if held + n <= full else 0
        slots = range(first, min(held + n, full)) if n else ()
        assert {slot // page_size for slot in slots} == set(np.flatnonzero(pages).tolist())


@pytest.mark.parametrize("policy", [TOVA(6), H2O(3, 2)], ids=str)
def test_choosing_policies_overwrite_the_victim_and_append_without_one(policy):
    length, victim = np.array([[5, 7, 7]], np.int32), np.array([[-1, 2, 2]], np.int32)
    seen, positions = np.array([5, 9, 9], np.int32), np.array([[5], [9], [-1]], np.int32)
    assert np.asarray(policy.slots(length, victim, seen, positions)).tolist() == [[[5], [2], [-1]]]


@pytest.mark.parametrize("policy", [Full(), *RINGS, TOVA(6), H2O(3, 2)], ids=str)
def test_capacity_is_never_more_than_the_tokens_and_grows_with_them(policy):
    capacities = [policy.capacity(tokens) for tokens in range(40)]
    assert capacities == sorted(capacities)
    assert all(capacity <= tokens for tokens, capacity in enumerate(capacities))
    assert capacities[:2] == [0, 1]


# Choosing by score. Scores are small integers, so that many tie; slots are in no order.

ROWS, SLOTS = 400, 9
RNG = np.random.default_rng(0)
SCORE = RNG.integers(0, 4, (ROWS, 1, SLOTS)).astype(np.float32)
HELD = RNG.integers(1, SLOTS + 1, ROWS)
POSITION = np.stack([np.where(np.arange(SLOTS) < held, RNG.permutation(30)[:SLOTS], -1) for held in HELD]).astype(
    np.int32
)[:, None]


def rows(position: np.ndarray = POSITION) -> list[tuple[list[float], list[int]]]:
    """Scores and positions of each row, unused slots included."""
    return list(zip(SCORE[:, 0].tolist(), position[:, 0].tolist(), strict=True))


@pytest.mark.parametrize("count", [0, 1, 4, 20])
def test_the_highest_are_kept_and_of_equals_the_newest(count):
    usable = np.where(POSITION >= 0, SCORE, -np.inf)
    marked = np.asarray(highest_newest(usable, POSITION, count))[:, 0]
    for (score, position), row in zip(rows(), marked, strict=True):
        ranked = sorted(((s, p) for s, p in zip(score, position, strict=True) if p >= 0), reverse=True)
        assert {position[slot] for slot in np.flatnonzero(row)} == {p for _, p in ranked[:count]}


def test_the_lowest_is_given_up_and_of_equals_the_oldest():
    chosen = np.asarray(oldest_lowest(np.where(POSITION >= 0, SCORE, np.inf), POSITION))[:, 0]
    for (score, position), slot in zip(rows(), chosen.tolist(), strict=True):
        assert position[slot] == min((s, p) for s, p in zip(score, position, strict=True) if p >= 0)[1]


def check_choice(policy: Any, positions: np.ndarray, competing: Callable[[list[int]], list[int]], count: int) -> None:
    """`keep` and `victims` keep the `count` highest of those held positions that are `competing`, and all others."""
    kept = np.asarray(policy.keep({"score": SCORE}, positions))[:, 0]
    victims = np.asarray(policy.victims({"score": SCORE}, positions, HELD.astype(np.int32)[:, None]))[:, 0]
    cases = zip(rows(positions), kept, victims.tolist(), HELD.tolist(), strict=True)
    for (score, position), row, victim, held in cases:
        here = [p for p in position if p >= 0]
        ranked = sorted((score[position.index(p)], p) for p in competing(here))
        dropped = [p for _, p in ranked[: max(len(ranked) - count, 0)]]
        assert {position[slot] for slot in np.flatnonzero(row)} == set(here) - set(dropped)
        assert victim == (position.index(dropped[0]) if held > policy.held else -1)


@pytest.mark.parametrize("budget", [1, 4, 8])
def test_tova_keeps_the_highest_and_gives_up_the_lowest_once_over_budget(budget):
    check_choice(TOVA(budget), POSITION, lambda here: here, budget)


@pytest.mark.parametrize(("heavy", "recent"), [(0, 5), (5, 0), (3, 2), (1, 1)])
def test_h2o_spares_the_newest_and_keeps_the_highest_of_the_others(heavy, recent):
    # The newest are always held, so a row's positions end in a run of them.
    positions = POSITION.copy()
    for row in positions[:, 0]:
        newest_first = [slot for slot in np.argsort(-row) if row[slot] >= 0]
        for back, slot in enumerate(newest_first[: recent + 1]):
            row[slot] = 40 - back
    check_choice(H2O(heavy, recent), positions, lambda here: sorted(here)[: max(len(here) - recent, 0)], heavy)


def test_scores_replace_under_tova_add_up_under_h2o_and_stand_still_without_a_token():
    weights = np.arange(24, dtype=np.float32).reshape(2, 3, 4)  # [K, B, S]
    active = np.array([True, False, True])
    tova = TOVA(3).observe({"score": np.full((1, 3, 4), 7, np.float32)}, weights, active)["score"]
    np.testing.assert_array_equal(tova[0], np.where(active[:, None], weights.sum(0), 7))
    h2o = H2O(2, 1).observe({"score": np.full((2, 3, 4), 7, np.float32)}, weights, active)["score"]
    np.testing.assert_array_equal(h2o, np.where(active[:, None], weights + 7, 7))


def test_the_models_own_window_narrows_a_read_or_is_refused():
    assert Full().reads(8) == (Read(window=8),)
    assert SlidingWindow(6).reads(4) == (Read(window=4),)
    assert SlidingWindow(6).reads(None) == (Read(window=6),)
    with pytest.raises(ConfigError, match="sinks \\+ window <= 6"):
        StreamingLLM(2, 5).reads(6)
    sinks, recent = StreamingLLM(2, 5).reads(7)
    assert (sinks.last, sinks.turn, recent.first, recent.window) == (2, 6, 2, 5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SlidingWindow(0),
        lambda: StreamingLLM(-1, 4),
        lambda: StreamingLLM(4, 0),
        lambda: StreamingLLM(4, 2.5),
        lambda: TOVA(0),
        lambda: TOVA("6"),
        lambda: H2O(-1, 4),
        lambda: H2O(0, 0),
    ],
)
def test_sizes_that_keep_nothing_are_refused(make):
    with pytest.raises(ConfigError, match="must"):
        make()


def test_equal_policies_are_one_static_argument():
    for first, second in ((TOVA(6), TOVA(6)), (SlidingWindow(6), SlidingWindow(window=6)), (Full(), Full())):
        assert first == second
        assert hash(first) == hash(second)
        assert isinstance(first, Policy)
    assert SlidingWindow(6) != StreamingLLM(0, 6), "their reads and names differ"
