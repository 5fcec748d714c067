"""Which layers share pages, how many there are and what they weigh, and what is refused before anything is built."""

from __future__ import annotations

import re

import jax
import pytest

from kvjax import CacheConfig
from kvjax.cache.codecs import Dense, Int8
from kvjax.cache.layout import GroupLayout, KVSpec, group_layers
from kvjax.cache.policies import H2O, TOVA, Full, SlidingWindow, StreamingLLM
from kvjax.cache.size import SMALLEST_CONTEXT, context_bucket, power_of_two, size_groups
from kvjax.cache.state import empty_cache
from kvjax.errors import ConfigError

SPEC = KVSpec(layers=6, kv_heads=2, key_dim=8, value_dim=8)


def layouts(cache: CacheConfig, windows: tuple[int | None, ...] = (), spec: KVSpec = SPEC) -> tuple[GroupLayout, ...]:
    return group_layers(spec, windows, cache, "float32")


@pytest.mark.parametrize(
    ("policy", "rows", "layers_per_page", "heads_per_page"),
    [
        (Full(), 1, 6, 2),
        (SlidingWindow(8), 1, 6, 2),
        (StreamingLLM(2, 6), 1, 6, 2),
        (TOVA(8), 6, 1, 2),
        (H2O(4, 4), 12, 1, 1),
    ],
    ids=str,
)
def test_rows_and_pages_follow_who_keeps_the_same_tokens(policy, rows, layers_per_page, heads_per_page):
    (layout,) = layouts(CacheConfig(policy=policy))
    assert (layout.rows, layout.layers_per_page, layout.heads_per_page) == (rows, layers_per_page, heads_per_page)
    # However it is cut, one token of all layers and heads takes the same.
    assert layout.rows * layout.page_bytes == layout.page_size * layout.bytes_per_token
    assert layout.bytes_per_token == SPEC.elements_per_token * 4


@pytest.mark.parametrize("value_in_key", [False, True])
@pytest.mark.parametrize("codec", [Dense(), Dense("bfloat16"), Int8()], ids=str)
@pytest.mark.parametrize("policy", [Full(), TOVA(8), H2O(4, 4)], ids=str)
def test_page_bytes_are_those_of_the_real_pools(policy, codec, value_in_key):
    spec = KVSpec(layers=2, kv_heads=2, key_dim=12, value_dim=8, value_in_key=value_in_key)
    made = layouts(CacheConfig(policy=policy, codec=codec, page_size=4), spec=spec)
    cache = jax.eval_shape(lambda: empty_cache(made, 3, [(5, 7)]))
    assert cache.pool_bytes == 7 * made[0].page_bytes
    width = 12 if value_in_key else 20
    assert made[0].bytes_per_vector_pair == codec.bytes_per_vector(width, "float32") + (
        4 if codec == Int8() and not value_in_key else 0
    )


def test_equal_layers_share_a_group_in_order_of_their_first():
    deep = CacheConfig(policy=TOVA(8), codec=Int8(), page_size=4)
    made = layouts(CacheConfig(overrides=(((1, 4), deep), ((5,), deep))))
    assert [layout.layers for layout in made] == [(0, 2, 3), (1, 4, 5)]
    assert [layout.policy for layout in made] == [Full(), TOVA(8)]
    assert [layout.page_size for layout in made] == [16, 4]
    assert made[1].codec == Int8()


def test_a_range_of_layers_may_be_overridden():
    made = layouts(CacheConfig(overrides=((range(3, 6), CacheConfig(policy=SlidingWindow(8))),)))
    assert [layout.layers for layout in made] == [(0, 1, 2), (3, 4, 5)]


def test_windowed_layers_hold_no_more_than_they_can_see():
    windows = (4, None, 4, None, 8, None)
    full = layouts(CacheConfig(), windows)
    assert [(g.layers, g.policy, g.window) for g in full] == [
        ((0, 2), SlidingWindow(4), None),
        ((1, 3, 5), Full(), None),
        ((4,), SlidingWindow(8), None),
    ]
    narrow = layouts(CacheConfig(policy=SlidingWindow(6)), windows)
    assert [(g.layers, g.policy) for g in narrow] == [((0, 2), SlidingWindow(4)), ((1, 3, 4, 5), SlidingWindow(6))]
    # What scores tokens keeps its own budget, and reads within the window.
    scored = layouts(CacheConfig(policy=TOVA(6)), windows)
    assert [(g.layers, g.policy, g.window) for g in scored] == [
        ((0, 2), TOVA(6), 4),
        ((1, 3, 5), TOVA(6), None),
        ((4,), TOVA(6), 8),
    ]


def test_in_cache_positions_fit_a_layers_window_or_are_refused():
    assert layouts(CacheConfig(policy=StreamingLLM(2, 6)), (8,) * 6)[0].policy == StreamingLLM(2, 6)
    with pytest.raises(ConfigError, match="choose sinks \\+ window <= 7"):
        layouts(CacheConfig(policy=StreamingLLM(2, 6)), (None, 7, None, None, None, None))


@pytest.mark.parametrize(
    ("policy", "slots"), [(Full(), 100), (SlidingWindow(8), 8), (StreamingLLM(2, 7), 9), (TOVA(8), 9), (H2O(4, 3), 8)]
)
def test_a_row_takes_pages_for_what_it_can_hold(policy, slots):
    (layout,) = layouts(CacheConfig(policy=policy, page_size=4))
    assert layout.pages_per_row(100) == -(-slots // 4)
    assert layout.pages_per_row(3) == 1
    assert layout.pages_per_sequence(100) == layout.rows * -(-slots // 4)


def test_sizes_round_up_to_few_different_ones():
    assert [power_of_two(n) for n in (1, 2, 3, 4, 5)] == [1, 2, 4, 4, 8]
    assert {context_bucket(tokens) for tokens in range(1, 1000)} == {SMALLEST_CONTEXT, 256, 512, 1024}
    made = layouts(CacheConfig(page_size=4))
    assert len({size_groups(made, 4, tokens, None) for tokens in range(1, SMALLEST_CONTEXT + 1)}) == 1
    assert size_groups(made, 4, 1, None) == ((SMALLEST_CONTEXT // 4, 4 * SMALLEST_CONTEXT // 4),)


def test_a_fixed_pool_is_what_was_asked_for():
    assert size_groups(layouts(CacheConfig(page_size=4, num_pages=7)), 4, 100, None) == ((32, 7),)


@pytest.mark.parametrize("memory", [3 << 20, 300_000, 40_000])
def test_memory_is_shared_out_in_proportion_and_never_exceeded(memory):
    made = layouts(CacheConfig(overrides=(((1, 2, 3), CacheConfig(policy=H2O(20, 20), codec=Int8(), page_size=4)),)))
    pages = [count for _, count in size_groups(made, 2, 1000, memory)]
    wanted = [count for _, count in size_groups(made, 2, 1000, None)]
    taken = sum(layout.page_bytes * count for layout, count in zip(made, pages, strict=True))
    assert memory - sum(layout.page_bytes for layout in made) < taken <= memory
    # Each rounds down by less than a page.
    share = memory / sum(layout.page_bytes * count for layout, count in zip(made, wanted, strict=True))
    assert all(0 <= share * want - count < 1 for want, count in zip(wanted, pages, strict=True))


def test_too_little_memory_says_how_much_is_enough():
    made = layouts(CacheConfig(overrides=(((1, 2, 3), CacheConfig(policy=H2O(20, 20), codec=Int8(), page_size=4)),)))
    with pytest.raises(ConfigError, match="holds no page per row of one sequence") as raised:
        size_groups(made, 2, 1000, 100)
    enough = int(re.search(r"at least (\d+) bytes", str(raised.value)).group(1))
    pages = size_groups(made, 2, 1000, enough)
    assert all(count >= layout.rows for layout, (_, count) in zip(made, pages, strict=True))
    with pytest.raises(ConfigError, match="holds no page"):
        size_groups(made, 2, 1000, int(0.9 * enough))


class Mutable(Full):
    """A policy that cannot be a static argument."""

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CacheConfig(page_size=3), "page_size must be a power of two, got 3"),
        (lambda: CacheConfig(page_size=0), "page_size must be None or a positive integer, got 0"),
        (lambda: CacheConfig(page_size=16.0), "page_size must be None or a positive integer, got 16.0"),
        (lambda: CacheConfig(num_pages=True), "num_pages must be None or a positive integer, got True"),
        (lambda: CacheConfig(memory_bytes=-1), "memory_bytes must be None or a positive integer, got -1"),
        (lambda: CacheConfig(num_pages=8, memory_bytes=10**6), "num_pages or memory_bytes, not both"),
        (lambda: CacheConfig(policy="full"), "one of kvjax.policies, got 'full'"),
        (lambda: CacheConfig(policy=Int8()), "one of kvjax.policies, got Int8"),
        (lambda: CacheConfig(policy=TOVA), "an instance of one of kvjax.policies, got <class"),
        (lambda: CacheConfig(codec=Int8), "an instance of one of kvjax.codecs, got <class"),
        (lambda: CacheConfig(policy=Mutable()), "make Mutable a frozen dataclass"),
        (
            lambda: CacheConfig(overrides=(CacheConfig(),)),
            "\\(layers, CacheConfig\\), got CacheConfig",
        ),
        (lambda: CacheConfig(overrides=((1, CacheConfig()),)), "\\(layers, CacheConfig\\), got \\(1,"),
        (lambda: CacheConfig(codec=Full()), "one of kvjax.codecs, got Full"),
        (lambda: CacheConfig(select="quest"), "one of kvjax.selects, got 'quest'"),
        (lambda: CacheConfig(overrides=(((), CacheConfig()),)), "non-empty"),
        (lambda: CacheConfig(overrides=(((-1,), CacheConfig()),)), "not negative"),
        (lambda: CacheConfig(overrides=(((0,), CacheConfig()), ((1, 0), CacheConfig()))), "distinct"),
        (lambda: CacheConfig(overrides=(((0,), Full()),)), "each override is \\(layers, CacheConfig\\)"),
        (
            lambda: CacheConfig(overrides=(((0,), CacheConfig(overrides=(((0,), CacheConfig()),))),)),
            "no overrides of its own",
        ),
        (lambda: layouts(CacheConfig(overrides=(((6,), CacheConfig()),))), "names layer 6, but .* layers 0..5"),
    ],
)
def test_what_means_nothing_is_refused_with_the_reason(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
