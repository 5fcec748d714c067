"""A plain Python model of a page allocator with references, fork and copy-on-write (Kwon et al. 2023, 2309.06180).

A batch slot holds R rows; a row is a list of at most N pages. Pages carry a value, standing for their tokens, and
beside the shared pages the model keeps every row's values as if nothing were shared at all: reading through the pages
must give the same. Which page a caller gets is free, so `canonical` compares tables up to a renaming of pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# (row, batch slot, index in the row): one entry of the block table.
Place = tuple[int, int, int]


class PageAllocator:
    """Tables, references and free pages of `rows` x `batch` rows over `total` pages.

    Attributes:
      tables: tables[row][batch] = page ids in order.
      refs: per page, how many table entries name it.
      free: pages with no references.
      copies: pages copied so far, because they were shared and about to be written.
    """

    def __init__(self, total: int, rows: int, batch: int, pages_per_row: int) -> None:
        self.total = total
        self.rows = rows
        self.pages_per_row = pages_per_row
        self.tables: list[list[list[int]]] = [[[] for _ in range(batch)] for _ in range(rows)]
        self.refs = [0] * total
        self.free = set(range(total))
        self.copies = 0
        self._content: dict[int, Any] = {}
        self._unshared: list[list[list[Any]]] = [[[] for _ in range(batch)] for _ in range(rows)]

    @property
    def batch(self) -> int:
        """Number of batch slots, empty ones included."""
        return len(self.tables[0])

    @property
    def used(self) -> int:
        """Pages with at least one reference."""
        return sum(count > 0 for count in self.refs)

    @property
    def shared(self) -> int:
        """Pages with more than one reference."""
        return sum(count > 1 for count in self.refs)

    def holders(self, page: int) -> list[Place]:
        """Every table entry that names `page`."""
        return [
            (row, slot, index)
            for row, slots in enumerate(self.tables)
            for slot, pages in enumerate(slots)
            for index, held in enumerate(pages)
            if held == page
        ]

    def needed(self, touched: Mapping[tuple[int, int], Iterable[int]]) -> int:
        """Pages that `reserve(touched)` takes from the free ones."""
        new, copies = self._demand(touched)
        return len(new) + len(copies)

    def reserve(self, touched: Mapping[tuple[int, int], Iterable[int]]) -> bool:
        """Makes every touched place writable: takes new pages, and copies shared ones that are about to be written.

        Where every holder of a shared page writes to it, one keeps the original. When the free pages do not suffice
        nothing changes.

        Args:
          touched: touched[row, batch slot] = indices in the row that may be written next. Those past the row's end must
            follow it without a gap, and stay below `pages_per_row`.

        Returns:
          Whether it fits.
        """
        new, copies = self._demand(touched)
        if len(new) + len(copies) > len(self.free):
            return False
        for row, slot, index in copies:
            original = self.tables[row][slot][index]
            copy = self._take()
            self._content[copy] = self._content[original]
            self.tables[row][slot][index] = copy
            self._drop(original)
            self.copies += 1
        for row, slot, _ in new:
            self.tables[row][slot].append(self._take())
            self._unshared[row][slot].append(None)
        return True

    def write(self, row: int, slot: int, index: int, value: Any) -> None:
        """Overwrites one page; it must have been reserved, so that nobody else reads it."""
        page = self.tables[row][slot][index]
        if self.refs[page] != 1:
            raise ValueError(f"page {page} is shared by {self.holders(page)}: reserve it before writing")
        self._content[page] = value
        self._unshared[row][slot][index] = value

    def read(self, row: int, slot: int) -> list[Any]:
        """Values of one row, page by page; None where nothing was written yet."""
        return [self._content[page] for page in self.tables[row][slot]]

    def fork(self, parents: Sequence[int]) -> None:
        """Batch slot b becomes a copy of slot `parents[b]`, or empty where that is -1; shares pages, takes none.

        The batch may grow or shrink to `len(parents)`. A slot that nobody names loses its references.
        """
        if any(not -1 <= parent < self.batch for parent in parents):
            raise ValueError(f"parents must be -1 or a batch slot below {self.batch}, got {list(parents)}")
        before = [page for slots in self.tables for pages in slots for page in pages]
        self.tables = [[[*slots[parent]] if parent >= 0 else [] for parent in parents] for slots in self.tables]
        self._unshared = [[[*slots[parent]] if parent >= 0 else [] for parent in parents] for slots in self._unshared]
        # First take, then drop: a page that changes hands is never free in between.
        for slots in self.tables:
            for pages in slots:
                for page in pages:
                    self.refs[page] += 1
        for page in before:
            self._drop(page)

    def release(self, slots: Iterable[int]) -> None:
        """Empties batch slots; an empty one stays as it is."""
        for slot in set(slots):
            for row in range(self.rows):
                for page in self.tables[row][slot]:
                    self._drop(page)
                self.tables[row][slot] = []
                self._unshared[row][slot] = []

    def truncate(self, row: int, slot: int, count: int) -> None:
        """Keeps the first `count` pages of a row."""
        for page in self.tables[row][slot][count:]:
            self._drop(page)
        del self.tables[row][slot][count:], self._unshared[row][slot][count:]

    def check(self) -> None:
        """Raises AssertionError unless every invariant holds."""
        entries = [page for slots in self.tables for pages in slots for page in pages]
        check_references(entries, self.refs, self.free)
        for row in range(self.rows):
            for slot in range(self.batch):
                pages = self.tables[row][slot]
                assert len(pages) <= self.pages_per_row, f"row {row}, slot {slot} outgrew {self.pages_per_row} pages"
                assert len(set(pages)) == len(pages), f"row {row}, slot {slot} holds a page twice: {pages}"
                assert self.read(row, slot) == self._unshared[row][slot], (
                    f"row {row}, slot {slot} reads another's writes"
                )

    def _demand(self, touched: Mapping[tuple[int, int], Iterable[int]]) -> tuple[list[Place], list[Place]]:
        """Places to fill with a new page, and places whose shared page must be copied."""
        new: list[Place] = []
        writers: dict[int, list[Place]] = {}
        for (row, slot), indices in touched.items():
            pages = self.tables[row][slot]
            beyond = sorted(index for index in set(indices) if index >= len(pages))
            if beyond != list(range(len(pages), len(pages) + len(beyond))):
                raise ValueError(f"row {row}, slot {slot} ends at {len(pages)} and can't grow by pages {beyond}: a gap")
            if beyond and beyond[-1] >= self.pages_per_row:
                raise ValueError(f"row {row}, slot {slot} has room for {self.pages_per_row} pages, not for {beyond}")
            new += [(row, slot, index) for index in beyond]
            for index in sorted(set(indices) - set(beyond)):
                if self.refs[pages[index]] > 1:
                    writers.setdefault(pages[index], []).append((row, slot, index))
        copies = []
        for page, places in writers.items():
            everyone = len(places) == self.refs[page]
            copies += places[1:] if everyone else places
        return new, copies

    def _take(self) -> int:
        page = min(self.free)
        self.free.remove(page)
        self.refs[page] = 1
        self._content[page] = None
        return page

    def _drop(self, page: int) -> None:
        self.refs[page] -= 1
        if not self.refs[page]:
            self.free.add(page)


def check_references(entries: Sequence[int], refs: Sequence[int], free: Iterable[int]) -> None:
    """Holds for the model and for any other allocator: references are table entries, and no page is lost or doubled.

    Args:
      entries: page ids of all table entries in use.
      refs: references of each of the pool's pages.
      free: page ids that may be taken, each once.
    """
    free, total = list(free), len(refs)
    counts = [0] * total
    for page in entries:
        assert 0 <= page < total, f"a table names page {page} of {total}"
        counts[page] += 1
    wrong = [page for page in range(total) if counts[page] != refs[page]]
    assert not wrong, (
        f"pages {wrong} have {[refs[p] for p in wrong]} references and {[counts[p] for p in wrong]} entries"
    )
    assert len(set(free)) == len(free), f"a page is free twice: {sorted(free)}"
    assert set(free) == {page for page in range(total) if not refs[page]}, "free pages are not those without references"
    assert len(free) + sum(count > 0 for count in refs) == total


def touched_places(mask: Sequence[Sequence[Sequence[bool]]]) -> dict[tuple[int, int], set[int]]:
    """mask bool[R, B, N], nested lists or an array, -> the argument of `reserve`."""
    return {
        (row, slot): {index for index, touched in enumerate(pages) if touched}
        for row, slots in enumerate(mask)
        for slot, pages in enumerate(slots)
    }


def canonical(tables: Sequence[Sequence[Sequence[int]]]) -> list[list[list[int]]]:
    """The same tables with pages numbered by first appearance: equal for two allocators that share alike."""
    names: dict[int, int] = {}
    return [[[names.setdefault(int(page), len(names)) for page in pages] for pages in slots] for slots in tables]
