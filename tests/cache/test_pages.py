"""The device's page allocator against a plain Python one: random reserve, write, fork, reorder, release, truncate.

Two caches of several layer groups, so that a shortage in one group must leave the others alone too. Every token is
written with a value of its own, and a copy of all values as if nothing were shared is kept beside: what is read through
the tables must equal it, whoever wrote in between.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax import CacheConfig
from kvjax.cache import pages
from kvjax.cache.codecs import Encoded
from kvjax.cache.layout import KVSpec, group_layers
from kvjax.cache.policies import H2O, TOVA, Full, SlidingWindow, StreamingLLM
from kvjax.cache.state import Cache, Group, empty_cache, with_victims
from kvjax.cache.write import layer_rows, place, write
from tests.oracles.allocator import PageAllocator, canonical, check_references, touched_places

BATCH, PAGE, CONTEXT, MOST = 3, 4, 20, 3
SPEC = KVSpec(layers=4, kv_heads=2, key_dim=2, value_dim=2)
POOLS = {Full(): 9, SlidingWindow(6): 5, StreamingLLM(2, 5): 5, TOVA(6): 8, H2O(4, 3): 17}
"""Pages per pool: too few for three sequences that share nothing."""

CACHES = [(Full(), H2O(4, 3)), (SlidingWindow(6), TOVA(6)), (StreamingLLM(2, 5), StreamingLLM(2, 5))]


def empty(first: Any, second: Any, pools: dict[Any, int] = POOLS) -> Cache:
    """Layers 0 and 1 under one policy, 2 and 3 under another; all four in one group if they are the same."""
    deep = CacheConfig(page_size=PAGE, policy=second)
    config = CacheConfig(page_size=PAGE, policy=first, overrides=(((2, 3), deep),))
    layouts = group_layers(SPEC, (), config, "float32")
    return empty_cache(layouts, BATCH, [(layout.pages_per_row(CONTEXT), pools[layout.policy]) for layout in layouts])


@jax.jit
def touched(cache: Cache, n: jax.Array) -> list[jax.Array]:
    """Per group bool[R, B, N]."""
    return [
        group.layout.policy.touches(group.length, cache.seen, n, jnp.arange(group.table.shape[2]) * PAGE, PAGE)
        for group in cache.groups
    ]


@jax.jit
def advance(cache: Cache, n: jax.Array, stamp: jax.Array) -> tuple[Cache, list[jax.Array]]:
    """Lands n int32[B] tokens, at most `MOST`, one a step; returns per group their slots [MOST, R, B], -1 for none."""

    def step(cache: Cache, t: jax.Array) -> tuple[Cache, list[jax.Array]]:
        positions = jnp.where(t < n, cache.seen, -1)[:, None]
        groups, landed = [], []
        for group in cache.groups:
            slots = group.layout.policy.slots(group.length, group.victim, cache.seen, positions)
            group = place(group, slots, positions)
            for index, layer in enumerate(group.layout.layers):
                values = jnp.asarray(value_of(stamp, t, layer), jnp.float32)
                k = jnp.broadcast_to(values[:, None, :, None], (BATCH, 1, SPEC.kv_heads, SPEC.key_dim))
                group = write(group, index, layer_rows(group, slots, index), Encoded(k), Encoded(-k))
            groups.append(score(group))
            landed.append(slots[..., 0])
        return with_victims(Cache(tuple(groups), cache.seen + (t < n))), landed

    return jax.lax.scan(step, cache, jnp.arange(MOST))


def value_of(stamp: Any, t: Any, layer: int) -> Any:
    """What token t of the call `stamp` writes: [B, K], a number of its own."""
    order = np.arange(BATCH * SPEC.kv_heads).reshape(BATCH, SPEC.kv_heads)
    return ((stamp * MOST + t) * SPEC.layers + layer) * order.size + order + 1


def score(group: Group) -> Group:
    """Scores that differ from row to row, so that rows give up different tokens."""
    return dataclasses.replace(group, row_state=dict.fromkeys(group.row_state, scores(group.position)))


def scores(position: Any) -> Any:
    """float32[R, B, S]."""
    rows = np.arange(position.shape[0])[:, None, None]
    return ((position * 7 + rows * 5) % 11 * (position >= 0)).astype(np.float32)


reserve = jax.jit(pages.reserve)
take = jax.jit(pages.take)
release = jax.jit(pages.release)
truncate = jax.jit(pages.truncate)


@pytest.fixture(autouse=True, scope="module")
def several_trips_per_copy():
    """Pages are moved in trips of a fixed number; few enough here that one reserve takes several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "COPIES_PER_TRIP", 3)
        yield


class Machine:
    """A cache, the Python model of its pages, and all its values as if nothing were shared."""

    def __init__(self, cache: Cache):
        self.cache = cache
        self.models = [
            PageAllocator(group.num_pages, group.table.shape[0], cache.batch, group.table.shape[2])
            for group in cache.groups
        ]
        slots = [group.position.shape[2] for group in cache.groups]
        self.values = [np.full((SPEC.layers, SPEC.kv_heads, cache.batch, count), np.nan) for count in slots]
        self.positions = [np.array(group.position) for group in cache.groups]
        self.stamp = 0

    def reserve(self, wanted: Sequence[int]) -> bool:
        """Reserves on both sides; True if there was room."""
        n = np.minimum(wanted, CONTEXT - np.asarray(self.cache.seen)).astype(np.int32)
        places = [touched_places(np.asarray(mask).tolist()) for mask in touched(self.cache, n)]
        needed = [model.needed(mine) for model, mine in zip(self.models, places, strict=True)]
        available = [len(model.free) for model in self.models]
        after, shortage = reserve(self.cache, n)
        assert np.asarray(shortage.needed).tolist() == needed
        assert np.asarray(shortage.available).tolist() == available
        fits = all(need <= have for need, have in zip(needed, available, strict=True))
        assert bool(shortage.any) == (not fits)
        if fits:
            assert all(model.reserve(mine) for model, mine in zip(self.models, places, strict=True))
        else:
            jax.tree.map(np.testing.assert_array_equal, after, self.cache)
        self.cache = after
        return fits

    def write(self, n: Sequence[int]) -> None:
        """Lands tokens whose pages are reserved."""
        n = np.minimum(n, CONTEXT - np.asarray(self.cache.seen)).astype(np.int32)
        seen = np.asarray(self.cache.seen)
        self.cache, landed = advance(self.cache, n, self.stamp)
        for group, values, positions, slots in zip(self.cache.groups, self.values, self.positions, landed, strict=True):
            for t, row, b in zip(*np.nonzero(np.asarray(slots) >= 0), strict=True):
                positions[row, b, int(slots[t, row, b])] = seen[b] + t
            for layer in group.layout.layers:
                for t in range(MOST):
                    stamped = np.asarray(value_of(self.stamp, t, layer))
                    for head in range(SPEC.kv_heads):
                        for b in range(self.cache.batch):
                            slot = int(slots[t, row_of(group, layer, head), b])
                            if slot >= 0:
                                values[layer, head, b, slot] = stamped[b, head]
        self.stamp += 1

    def take(self, parents: Sequence[int]) -> None:
        """Forks, reorders and releases."""
        self.cache = take(self.cache, np.asarray(parents, np.int32))
        for model in self.models:
            model.fork(parents)
        self._move(parents)

    def release(self, which: Sequence[bool]) -> None:
        """Empties the marked sequences."""
        self.cache = release(self.cache, np.asarray(which))
        for model in self.models:
            model.release(np.flatnonzero(which).tolist())
        self._move([-1 if gone else b for b, gone in enumerate(which)])

    def truncate(self, seen: Sequence[int]) -> None:
        """Takes back tokens, under policies that only append: a row's slots are its positions."""
        seen = np.minimum(seen, self.cache.seen).astype(np.int32)
        self.cache = truncate(self.cache, seen)
        for model, values, positions in zip(self.models, self.values, self.positions, strict=True):
            for b, count in enumerate(seen):
                for row in range(model.rows):
                    model.truncate(row, b, -(-int(count) // PAGE))
                values[:, :, b, count:] = np.nan
                positions[:, b, count:] = -1

    def _move(self, parents: Sequence[int]) -> None:
        chosen = np.asarray(parents)
        self.positions = [np.where((chosen >= 0)[:, None], held[:, chosen], -1) for held in self.positions]
        self.values = [np.where((chosen >= 0)[:, None], values[:, :, chosen], np.nan) for values in self.values]

    def check(self) -> None:
        """Tables share alike, references and free pages are exact, and nobody reads what another wrote."""
        cache = jax.device_get(self.cache)
        sides = zip(cache.groups, self.models, self.values, self.positions, strict=True)
        for group, model, values, positions in sides:
            model.check()
            np.testing.assert_array_equal(group.position[..., : positions.shape[2]], positions)
            for state in group.row_state.values():
                np.testing.assert_array_equal(state, scores(group.position))
            tables = [[[int(p) for p in row if p >= 0] for row in rows] for rows in group.table]
            assert canonical(tables) == canonical(model.tables)
            entries = [page for rows in tables for row in rows for page in row]
            free = group.free[: int(group.top)].tolist()
            check_references(entries, group.refs.tolist(), free)
            assert len(free) == len(model.free)
            assert int(group.copied) == model.copies
            for layer in group.layout.layers:
                for head in range(SPEC.kv_heads):
                    row = row_of(group, layer, head)
                    for b in range(cache.batch):
                        length = int(group.length[row, b])
                        expected = values[layer, head, b, :length]
                        np.testing.assert_array_equal(read(group, group.k, layer, head, b, length), expected)
                        np.testing.assert_array_equal(read(group, group.v, layer, head, b, length), -expected)


def row_of(group: Group, layer: int, head: int) -> int:
    """The block-table row of a layer and head."""
    index = group.layout.layers.index(layer)
    return {"shared": 0, "layer": index, "head": index * SPEC.kv_heads + head}[group.layout.policy.rows]


def read(group: Group, pool: Any, layer: int, head: int, b: int, length: int) -> np.ndarray:
    """What slots 0 .. length - 1 hold, through the table."""
    inside = group.layout.layers.index(layer) if group.layout.layers_per_page > 1 else 0
    head_inside = head if group.layout.heads_per_page > 1 else 0
    table = group.table[row_of(group, layer, head), b]
    slots = np.arange(length)
    found = pool.values[table[slots // PAGE], inside, head_inside, slots % PAGE]
    assert np.all(table[slots // PAGE] >= 0)
    np.testing.assert_array_equal(found[:, 0], found[:, -1])
    return found[:, 0]


counts = st.lists(st.integers(0, MOST), min_size=BATCH, max_size=BATCH)
operations = st.one_of(
    # Often, and often all that was reserved: otherwise sequences stay short and the pools never fill up.
    st.tuples(st.just("grow"), counts, st.just([MOST] * BATCH)),
    st.tuples(st.just("grow"), st.just([MOST] * BATCH), counts),
    st.tuples(st.just("take"), st.lists(st.integers(-1, BATCH - 1), min_size=BATCH, max_size=BATCH), st.none()),
    st.tuples(st.just("release"), st.lists(st.booleans(), min_size=BATCH, max_size=BATCH), st.none()),
)


@pytest.mark.parametrize(("first", "second"), CACHES, ids=str)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(steps=st.lists(operations, min_size=4, max_size=14))
def test_pages_behave_as_the_plain_model_under_any_sequence_of_operations(first, second, steps):
    machine = Machine(empty(first, second))
    for operation, argument, written in steps:
        if operation == "grow":
            if machine.reserve(argument):
                machine.write(np.minimum(argument, written))
        elif operation == "take":
            machine.take(argument)
        else:
            machine.release(argument)
        machine.check()
    machine.release([True] * BATCH)
    machine.check()
    assert all(int(group.top) == group.num_pages for group in machine.cache.groups), "nothing leaks"


taken_back = st.tuples(
    st.just("truncate"), st.lists(st.integers(0, CONTEXT), min_size=BATCH, max_size=BATCH), st.none()
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(steps=st.lists(st.one_of(operations, taken_back), min_size=4, max_size=14))
def test_taking_tokens_back_returns_pages_and_harms_no_other_holder(steps):
    machine = Machine(empty(Full(), Full()))
    for operation, argument, written in steps:
        if operation == "grow":
            if machine.reserve(argument):
                machine.write(np.minimum(argument, written))
        else:
            getattr(machine, operation)(argument)
        machine.check()
        assert machine.cache.seen.tolist() == machine.cache.groups[0].length[0].tolist()
    machine.truncate([0] * BATCH)
    machine.check()
    assert int(machine.cache.groups[0].top) == machine.cache.groups[0].num_pages, "nothing leaks"


def grown(first: Any, second: Any, tokens: int) -> Machine:
    """Sequence 0 has `tokens` tokens, the others none."""
    machine = Machine(empty(first, second))
    for start in range(0, tokens, MOST):
        n = [min(MOST, tokens - start), 0, 0]
        assert machine.reserve(n)
        machine.write(n)
    return machine


@pytest.mark.parametrize(
    ("tokens", "parents", "n", "copied"),
    [
        (6, [0, 0, -1], [1, 1, 0], [1, 4]),  # a half-filled page: one keeps the original, one takes a copy
        (6, [0, 0, 0], [1, 1, 1], [2, 8]),
        (6, [0, 0, 0], [0, 1, 0], [1, 4]),  # the other two go on sharing
        (8, [0, 0, -1], [1, 1, 0], [0, 8]),  # Full appends a page of its own; H2O may overwrite any of both
        (8, [-1, 0, -1], [0, 1, 0], [0, 0]),  # a page that only changed hands is not shared
    ],
)
def test_shared_pages_are_copied_for_all_that_write_but_the_last_holder(tokens, parents, n, copied):
    machine = grown(Full(), H2O(4, 3), tokens)
    used = [int(group.used) for group in machine.cache.groups]
    machine.take(parents)
    assert [int(group.used) for group in machine.cache.groups] == used, "a fork takes no page"
    before = [np.asarray(group.table) for group in machine.cache.groups]
    assert machine.reserve(n)
    assert [int(group.copied) for group in machine.cache.groups] == copied
    for group, table in zip(machine.cache.groups, before, strict=True):
        stays = [b for b, count in enumerate(n) if not count] if sum(n) == 1 else [0]
        np.testing.assert_array_equal(np.asarray(group.table)[:, stays, :2], table[:, stays, :2])
    machine.write(n)
    machine.check()


def test_a_shortage_in_one_group_takes_nothing_anywhere():
    machine = grown(Full(), H2O(4, 3), 8)
    machine.take([0, 0, 0])
    # Full needs 3 pages of its 7 free ones, H2O 16 of 9: `Machine.reserve` asserts that not a bit has changed.
    assert not machine.reserve([1, 1, 1])
    machine.check()
    assert machine.reserve([0, 1, 0])


def test_the_batch_may_grow_and_shrink():
    machine = grown(Full(), H2O(4, 3), 6)
    machine.take([0, 0, 0, -1, 0, 0])
    machine.check()
    assert machine.cache.batch == 6
    assert [int(group.shared) for group in machine.cache.groups] == [2, 8]
    machine.take([5])
    machine.check()
    assert [int(jnp.max(group.refs)) for group in machine.cache.groups] == [1, 1]


def test_fork_places_copies_side_by_side():
    machine = grown(Full(), H2O(4, 3), 6)
    forked = jax.jit(pages.fork, static_argnums=1)(machine.cache, 2)
    assert forked.seen.tolist() == [6, 6, 0, 0, 0, 0]
    for group, old in zip(forked.groups, machine.cache.groups, strict=True):
        np.testing.assert_array_equal(group.table, np.repeat(old.table, 2, axis=1))


def test_widening_keeps_every_page_and_frees_new_ones():
    machine = grown(Full(), H2O(4, 3), 6)
    machine.take([0, -1, 0])
    machine.cache = pages.resize(
        machine.cache, tuple((g.table.shape[2] + 2, g.num_pages + 5) for g in machine.cache.groups)
    )
    for model in machine.models:
        model.free |= set(range(model.total, model.total + 5))
        model.refs += [0] * 5
        model.total += 5
        model.pages_per_row += 2
    machine.check()
    assert all(group.position.shape[2] == group.table.shape[2] * PAGE for group in machine.cache.groups)
