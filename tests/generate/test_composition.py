"""Every policy with every codec, select, kind of attention and page size: run against the oracle, or refused.

The whole product is decided without compiling anything, the reasons listed. What is not refused runs in cells that
together have every pair of choices. Shapes, and where tolerances come from, are those of
`tests.generate.test_variant_matrix`. Policies that merge tokens and the codec that is calibrated run in files of their
own, whose models suit them.
"""

from __future__ import annotations

import functools
import itertools
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import kvjax
from kvjax import CacheConfig
from kvjax.cache.codecs import FP8, KIVI, Dense, Int4, Int8, KVQuant
from kvjax.cache.policies import (
    DMC,
    H2O,
    TOVA,
    FastGen,
    Full,
    KVMerger,
    LMInfinite,
    PyramidInfer,
    PyramidKV,
    Scissorhands,
    SlidingWindow,
    SnapKV,
    StreamingLLM,
)
from kvjax.cache.selects import Quest, SparQ
from kvjax.errors import ConfigError
from kvjax.generate.state import layouts_of
from tests.cache import tiny
from tests.cache.tiny import Choice, cache_of, feed, held_everywhere, logits_after
from tests.generate.test_eviction_methods import PUNCTUATION, SPECIAL, oracle_of
from tests.generate.test_variant_matrix import (
    BATCH,
    CHUNK,
    FORCED,
    LENGTH,
    LOGITS,
    MARGIN,
    PROMPTS,
    held_by_owners,
    on_host,
    within_windows,
)
from tests.generate.test_variant_matrix import VARIANTS as KINDS
from tests.models.cases import PLAIN, model_of, random_params, random_tokens
from tests.oracles import codecs as oracle_codecs
from tests.oracles import decoder
from tests.oracles import selects as oracle_selects

POLICIES: dict[str, Any] = {
    "Full": Full(),
    "SlidingWindow": SlidingWindow(11),
    "StreamingLLM": StreamingLLM(2, 4),
    "LMInfinite": LMInfinite(2, 5),
    "TOVA": TOVA(9),
    "H2O": H2O(5, 4),
    "Scissorhands": Scissorhands(9, 2, history=7, drop=4),
    "SnapKV": SnapKV(8, 4, 3),
    "PyramidKV": PyramidKV(8, 2, 3, beta=4),
    "FastGen": FastGen(0.75, 0.2, 0.2, SPECIAL, PUNCTUATION),
    "PyramidInfer": PyramidInfer(1, 0.2, 1.2, keep=0.5, exceed=3),
    "KVMerger": KVMerger(2, 2, 0.1),
    "DMC": DMC(),
}
CODECS: dict[str, Any] = {
    "Dense": Dense(),
    "Int8": Int8(),
    "FP8": FP8(),
    "Int4": Int4(8),
    "KIVI": KIVI(4, 4, 4),
    "KVQuant": KVQuant(2),
}
SELECTS = ("None", "Quest", "SparQ")
VARIANTS = {"gqa": PLAIN, **KINDS}
PAGES = (4, 16)
ELSEWHERE = {"KVMerger", "DMC", "KVQuant"}
"""Run in `test_merging`, `test_dmc`, `test_kvquant` and `test_kvquant_selects`."""

SEVERAL = "turns its query to several positions"
WHOLE_PAGES = "codes the keys of a whole page together, so no slot may be overwritten"
BLENDS = "blends tokens of several positions"
ONLY_READS = "only reads another's keys and values: it decides about nothing"

REFUSED: dict[tuple[str, ...], str] = {
    **{(policy, select): SEVERAL for policy in ("StreamingLLM", "LMInfinite") for select in ("Quest", "SparQ")},
    **{
        (policy, "KIVI"): WHOLE_PAGES
        for policy in (
            "SlidingWindow",
            "StreamingLLM",
            "LMInfinite",
            "TOVA",
            "H2O",
            "Scissorhands",
            "FastGen",
            "PyramidInfer",
            "DMC",
        )
    },
    # Where the model itself windows a layer, Full is that window.
    ("Full", "KIVI", "windows"): WHOLE_PAGES,
    **{("KVQuant", policy): BLENDS for policy in ("KVMerger", "DMC")},
    ("DMC", "cla"): ONLY_READS,
    ("KIVI", "16"): "a page is the group of tokens whose keys share their scales",
}
"""What cannot be combined, and how the reason reads. Everything else works."""


class Cell(NamedTuple):
    """One of each."""

    policy: str
    codec: str
    select: str
    variant: str
    page_size: int

    def __str__(self) -> str:
        return "-".join(map(str, self))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(map(str, self))

    @property
    def cache(self) -> CacheConfig:
        """As a user writes it."""
        # Both leave something unread of rows of ten tokens in pages of 4.
        select = {"None": None, "Quest": Quest(2 if self.page_size == 4 else 1, 0), "SparQ": SparQ(3, 6, 2)}
        return CacheConfig(self.page_size, policy=POLICIES[self.policy], codec=CODECS[self.codec],
                           select=select[self.select])  # fmt: skip


def product() -> Iterator[Cell]:
    """All of them."""
    return itertools.starmap(Cell, itertools.product(POLICIES, CODECS, SELECTS, VARIANTS, PAGES))


def reasons(cell: Cell) -> list[str]:
    """Why it must be refused; any of these may be what is said."""
    return [words for names, words in REFUSED.items() if cell.names.issuperset(names)]


@functools.cache
def model(variant: str) -> kvjax.Model:
    """A variant's model."""
    return model_of(VARIANTS[variant])


# The product, decided at construction


def test_every_cell_is_served_or_refused_with_the_reason_that_is_listed():
    for cell in product():
        wanted = reasons(cell)
        said = None
        try:
            layouts_of(model(cell.variant), cell.cache)
        except ConfigError as error:
            said = str(error)
        if wanted:
            assert said is not None, f"{cell} is served, but should be refused: {wanted[0]}"
            assert any(words in said for words in wanted), f"{cell} is refused for another reason: {said}"
        else:
            assert said is None, f"{cell} should be served: {said}"


def test_few_pairs_of_choices_are_refused():
    every, open_ = (
        {pair for cell in cells for pair in pairs_of(cell)}
        for cells in (product(), (cell for cell in product() if not reasons(cell)))
    )
    assert len(every - open_) == len([names for names in REFUSED if len(names) == 2])
    assert len(every - open_) < 0.1 * len(every)


# The cells that run


def pairs_of(cell: Cell) -> frozenset[tuple[tuple[int, Any], ...]]:
    """Every two of its choices."""
    return frozenset(itertools.combinations(enumerate(cell), 2))


def covering() -> list[Cell]:
    """Cells that together have every pair of choices that some cell may have.

    Always the one with most choices that no cell has as yet, and among these with most new pairs.
    """
    left = {cell: pairs_of(cell) for cell in product() if not reasons(cell) and not cell.names & ELSEWHERE}
    missing, unseen = set().union(*left.values()), frozenset().union(*(cell.names for cell in left))
    chosen = []
    while missing:
        best = max(left, key=lambda cell: (len(cell.names & unseen), len(left[cell] & missing)))
        chosen.append(best)
        missing, unseen = missing - left.pop(best), unseen - best.names
    return chosen


CELLS = covering()
FAST = 12
"""Of the cells chosen first: all policies, codecs, selects and variants are there."""


def test_the_fast_cells_have_every_choice():
    found = frozenset().union(*(cell.names for cell in CELLS[:FAST]))
    choices = {*POLICIES, *CODECS, *SELECTS, *VARIANTS, *map(str, PAGES)}
    assert found == choices - ELSEWHERE
    assert len(CELLS) < 75


def tokens_of(cell: Cell, seed: int) -> list[tuple[list[int], list[int]]]:
    """Ragged prompts, and the tokens forced behind each."""
    rows = zip(random_tokens(seed, BATCH, LENGTH).tolist(), PROMPTS, strict=True)
    return [(row[:length], row[length : length + FORCED]) for row, length in rows]


def oracle_select(cell: Cell) -> Any:
    """The oracle's select, which leaves alone what kvjax leaves alone: layers that the model itself windows."""
    found = oracle_selects.counterpart(cell.cache.select, cell.page_size)
    if found is None:
        return None
    windows = VARIANTS[cell.variant].windows
    dense = lambda layer: windows[layer] is not None or found.reads_all(layer)  # noqa: E731
    # A frozen dataclass cannot be given another method; what stands in for it can.
    return types.SimpleNamespace(reads_all=dense, choose=found.choose)


def clear(cell: Cell) -> tuple[list[tuple[list[int], list[int]]], list[decoder.Result]]:
    """Texts of the first seed that leaves no choice to rounding, and the oracle's runs."""
    config = VARIANTS[cell.variant]
    for seed in range(40):
        texts, results = tokens_of(cell, seed), []
        for prompt, forced in texts:
            run = (oracle_of(POLICIES[cell.policy]), oracle_codecs.counterpart(CODECS[cell.codec]), oracle_select(cell))
            result = decoder.run(random_params(config), config, prompt, forced, *run)
            # What a layer's own window hides from all rows that count weighs 0 in either: a tie, which age decides.
            tied = result.margin == 0 and any(config.windows) and cell.select == "None"
            if result.routing < MARGIN or (result.margin < MARGIN and not tied):
                break
            results.append(result)
        else:
            return texts, results
    raise AssertionError("no seed leaves only clear choices")


ONE_FLIP = 0.5
"""How far logits may be off once a code rounded the other way, float32 and float64 on two sides of a half."""


@pytest.mark.parametrize(
    "cell",
    [pytest.param(c, id=str(c), marks=() if i < FAST else pytest.mark.slow) for i, c in enumerate(CELLS)],
)
def test_a_cell_equals_the_oracle(cell):
    config, policy = VARIANTS[cell.variant], POLICIES[cell.policy]
    texts, results = clear(cell)
    prompts = [prompt for prompt, _ in texts]
    state = kvjax.prefill(model(cell.variant), prompts, cell.cache, room=FORCED, prefill_chunk=CHUNK)
    first, before = logits_after(model(cell.variant), state), on_host(state.cache)
    live, block = feed(model(cell.variant), state.cache, [forced for _, forced in texts])
    ours = np.concatenate([first[:, None], block[:, :FORCED]], axis=1)

    off = [float(np.abs(row - result.step_logits).max()) for row, result in zip(ours, results, strict=True)]
    exact = [error < LOGITS for error in off]
    # A flipped code is rare: one sequence of the four may have seen one.
    assert sum(exact) >= BATCH - (cell.codec != "Dense"), off
    assert max(off) < (LOGITS if cell.codec == "Dense" else ONE_FLIP), off
    after = on_host(live)
    for b, result in enumerate(results):
        for then, kept, newest in (
            (before, result.kept[0], PROMPTS[b] - 1),
            (after, result.kept[-1], PROMPTS[b] + FORCED - 1),
        ):
            wanted = within_windows(kept, config, policy, newest)
            assert held_by_owners(then, config, b) == wanted or not exact[b], f"sequence {b} at {newest}"


def test_layers_may_keep_by_other_policies_in_other_codecs():
    """PyramidKV's budgets in 2 bits below, H2O in a byte above."""
    pair = (Choice(PyramidKV(6, 2, 3, beta=4), KIVI(2, 4, 4), 4), Choice(H2O(4, 3), Int8(), 16))
    texts = tokens_of(CELLS[0], 0)
    results = [tiny.oracle(tuple(prompt), tuple(forced), pair) for prompt, forced in texts]
    assert min(result.margin for result in results) > MARGIN
    state = kvjax.prefill(tiny.MODEL, [p for p, _ in texts], cache_of(pair), room=FORCED, prefill_chunk=CHUNK)
    first = logits_after(tiny.MODEL, state)
    live, block = feed(tiny.MODEL, state.cache, [forced for _, forced in texts])
    ours = np.concatenate([first[:, None], block[:, :FORCED]], axis=1)
    off = [float(np.abs(row - result.step_logits).max()) for row, result in zip(ours, results, strict=True)]
    assert sum(error < LOGITS for error in off) >= BATCH - 1, off
    assert max(off) < ONE_FLIP, off
    for b, result in enumerate(results):
        assert held_everywhere(live, b) == result.kept[-1] or off[b] >= LOGITS


def test_h2o_over_int8_over_pages_is_one_line_of_config():
    (line,) = ['cache = { policy = "h2o:5,4", codec = "int8", page_size = 4 }']
    cache = CacheConfig.from_dict(tomllib.loads(line)["cache"])
    assert cache == Cell("H2O", "Int8", "None", "gqa", 4).cache
    (layout,) = layouts_of(model("gqa"), cache)
    assert (layout.spec.kv_heads, layout.rows, layout.page_size) == (2, 4, 4), "a row per layer and KV head"
    # A byte an element of keys and values, and the float32 scale of each.
    assert layout.page_bytes == 4 * 2 * (8 + 4)


# What the documentation says of it

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"


def tables() -> str:
    """Two tables: what goes with each policy, and what with each codec; numbers are those of the reasons."""
    notes = {words: str(number) for number, words in enumerate(dict.fromkeys(REFUSED.values()), 1)}

    def entry(*names: str) -> str:
        found = [words for key, words in REFUSED.items() if set(names).issuperset(key)]
        return notes[found[0]] if found else "yes"

    def table(what: str, rows: Any, columns: Any) -> str:
        head = f"| {what} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}"
        return "\n".join([head, *(f"| {row} | {' | '.join(entry(row, c) for c in columns)} |" for row in rows)])

    beside = [*SELECTS[1:], *VARIANTS]
    return "\n\n".join([table("policy", POLICIES, [*CODECS, *beside]), table("codec", CODECS, beside)])


def test_the_documentation_has_the_tables_of_what_goes_with_what():
    assert tables() in DOCS.read_text(), f"docs/methods.md should have:\n\n{tables()}"
