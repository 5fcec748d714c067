"""The allocator model keeps its own invariants under random operations, and shares as copy-on-write should."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles.allocator import PageAllocator, canonical, check_references, touched_places

ROWS, BATCH, PAGES = 2, 3, 4


def model(total: int = 12) -> PageAllocator:
    return PageAllocator(total, rows=1, batch=BATCH, pages_per_row=PAGES)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_invariants_survive_any_sequence_of_operations(data):
    pages = PageAllocator(data.draw(st.integers(1, 20)), ROWS, BATCH, PAGES)
    for stamp in range(data.draw(st.integers(1, 25))):
        operation = data.draw(st.sampled_from(["reserve", "reserve", "fork", "release"]))
        if operation == "fork":
            pages.fork(data.draw(st.lists(st.integers(-1, BATCH - 1), min_size=BATCH, max_size=BATCH)))
        elif operation == "release":
            pages.release(data.draw(st.sets(st.integers(0, BATCH - 1))))
        else:
            touched = {}
            for row in range(ROWS):
                for slot in range(BATCH):
                    length = len(pages.tables[row][slot])
                    grown = range(length, min(PAGES, length + data.draw(st.integers(0, 2))))
                    old = data.draw(st.sets(st.integers(0, length - 1))) if length else set()
                    touched[row, slot] = old | set(grown)
            needed, before, free = pages.needed(touched), canonical(pages.tables), len(pages.free)
            fits = pages.reserve(touched)
            assert fits == (needed <= free)
            assert len(pages.free) == free - needed if fits else canonical(pages.tables) == before
            if fits:
                for (row, slot), indices in touched.items():
                    for index in indices:
                        pages.write(row, slot, index, (stamp, row, slot, index))
        pages.check()
    pages.release(range(BATCH))
    assert pages.free == set(range(pages.total))


def test_a_fork_takes_no_page_and_a_write_copies_only_what_it_touches():
    pages = model()
    assert pages.reserve({(0, 0): {0, 1, 2}})
    pages.fork([0, 0, 0])
    assert (pages.used, pages.shared) == (3, 3)
    assert pages.needed({(0, 1): {2}}) == 1
    assert pages.reserve({(0, 1): {2}})
    assert (pages.used, pages.shared, pages.copies) == (4, 3, 1)
    assert canonical(pages.tables) == [[[0, 1, 2], [0, 1, 3], [0, 1, 2]]]


def test_one_holder_keeps_the_original_when_all_write():
    pages = model(total=3)
    assert pages.reserve({(0, 0): {0}})
    pages.write(0, 0, 0, "prompt")
    pages.fork([0, 0, 0])
    assert pages.reserve({(0, slot): {0} for slot in range(3)})
    assert pages.copies == 2
    assert not pages.free
    assert [pages.read(0, slot) for slot in range(3)] == [["prompt"]] * 3


def test_forks_diverge():
    pages = model()
    pages.reserve({(0, 0): {0}})
    pages.write(0, 0, 0, "a")
    pages.fork([0, 0, -1])
    pages.reserve({(0, 1): {0}})
    pages.write(0, 1, 0, "b")
    assert (pages.read(0, 0), pages.read(0, 1), pages.read(0, 2)) == (["a"], ["b"], [])


def test_writing_a_shared_page_is_refused():
    pages = model()
    pages.reserve({(0, 0): {0}})
    pages.fork([0, 0, -1])
    with pytest.raises(ValueError, match="reserve it before writing"):
        pages.write(0, 0, 0, "a")


def test_what_does_not_fit_changes_nothing():
    pages = model(total=3)
    assert pages.reserve({(0, 0): {0, 1}})
    pages.fork([0, 0, -1])
    assert not pages.reserve({(0, 0): {0, 1}})
    assert pages.tables == [[[0, 1], [0, 1], []]]
    assert pages.free == {2}
    assert pages.copies == 0
    pages.check()


def test_a_permutation_of_the_batch_moves_rows_and_frees_nothing():
    pages = model()
    pages.reserve({(0, 0): {0}, (0, 1): {0, 1}})
    first, second, third = pages.tables[0]
    pages.fork([1, 2, 0])
    assert pages.tables == [[second, third, first]]
    assert pages.used == 3


def test_the_batch_grows_and_shrinks_by_fork():
    pages = model()
    pages.reserve({(0, 0): {0}})
    pages.fork([0] * 5)
    assert pages.batch == 5
    assert pages.refs[0] == 5
    pages.fork([-1])
    assert pages.batch == 1
    assert not pages.used
    pages.check()


@pytest.mark.parametrize("touched", [{(0, 0): {1}}, {(0, 0): set(range(PAGES + 1))}])
def test_gaps_and_overlong_rows_are_refused(touched):
    with pytest.raises(ValueError, match="row 0, slot 0"):
        model().reserve(touched)


@pytest.mark.parametrize(
    ("entries", "refs", "free"),
    [([0], [2, 0], [1]), ([0], [1, 0], []), ([0], [1, 0], [0, 1]), ([0], [1, 0], [1, 1]), ([2], [1, 0], [1])],
    ids=["leaked reference", "lost page", "used page free", "free twice", "no such page"],
)
def test_reference_check_finds(entries, refs, free):
    with pytest.raises(AssertionError):
        check_references(entries, refs, free)


def test_masks_become_places():
    assert touched_places([[[True, False], [False, False]]]) == {(0, 0): {0}, (0, 1): set()}
