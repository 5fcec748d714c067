"""Attention over shared prefixes against plain paged attention over each sequence's pages put together."""

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

from pallas_kernels.shared_prefix import reference
from pallas_kernels.shared_prefix.api import shared_prefix
from pallas_kernels.shared_prefix.packing import pack, tiles_at_most

# float32 keeps 6e-8 of a number; two softmaxes over at most 20 slots and their merge stay well below.
ROUNDING = 5e-6
PAGE, LAYERS, LAYER = 4, 2, 1


@dataclasses.dataclass(frozen=True)
class Batch:
    """Arguments of `shared_prefix` by name."""

    arrays: dict[str, np.ndarray]

    def both(self, **options: Any) -> tuple[Any, Any]:
        """The two phases' and the reference's results."""
        arrays = {**self.arrays, **{name: x for name, x in options.items() if isinstance(x, np.ndarray)}}
        static = {name: x for name, x in options.items() if name not in arrays}
        plain = {name: x for name, x in static.items() if name != "sharers"}
        actual = jax.jit(lambda arrays: shared_prefix(**arrays, **static, backend="xla"))(arrays)
        return actual, jax.jit(lambda arrays: reference.shared_prefix(**arrays, **plain))(arrays)

    def check(self, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """That both agree; the two phases' result."""
        actual, expected = self.both(**options)
        for one, other in zip(actual, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=ROUNDING, atol=ROUNDING)
        return np.asarray(actual[0]), np.asarray(actual[1])


def make(
    group: Sequence[int] = (0, 1, 0, -1, 0),
    prefixes: Sequence[int] = (7, 8),
    lengths: Sequence[int] = (5, 1, 0, 9, 4),
    tokens: int = 1,
    row_per_head: bool = False,
) -> Batch:
    """Random numbers, pages in random order, NaN wherever nothing may be read."""
    rng = np.random.default_rng(0)
    heads, kv_heads, width, pages = 4, 2, 8, 3
    rows = kv_heads if row_per_head else 1
    count = (len(prefixes) + len(group)) * rows * pages + 2
    k_pool, v_pool = np.full((2, count, LAYERS, kv_heads // rows, PAGE, width), np.nan, np.float32)
    numbers = iter(rng.permutation(count))

    def table(held: Sequence[int]) -> np.ndarray:
        made = np.full((len(held), rows, pages), -1, np.int32)
        for row, length in enumerate(held):
            for which in range(rows):
                for slot in range(length):
                    if slot % PAGE == 0:
                        made[row, which, slot // PAGE] = next(numbers)
                    at = made[row, which, slot // PAGE], LAYER, slice(None), slot % PAGE
                    k_pool[at], v_pool[at] = rng.normal(size=(2, kv_heads // rows, width))
        return made

    def each_row(held: Sequence[int]) -> np.ndarray:
        return np.repeat(np.asarray(held, np.int32)[:, None], rows, axis=1)

    prefix_table, block_table = table(prefixes), table(lengths)
    q = rng.normal(size=(len(group), tokens, heads, width)).astype(np.float32)
    return Batch(
        dict(
            q=q,
            k_pool=k_pool,
            v_pool=v_pool,
            prefix_table=prefix_table,
            prefix_lengths=each_row(prefixes),
            group=np.asarray(group, np.int32),
            block_table=block_table,
            lengths=each_row(lengths),
            layer=np.array([LAYER], np.int32),
        )
    )


@pytest.mark.parametrize("row_per_head", [False, True])
@pytest.mark.parametrize("options", [{}, {"window": 6}, {"soft_cap": 2.0, "scale": 0.3}])
def test_two_phases_equal_plain_attention_over_both_tables(options: dict, row_per_head: bool) -> None:
    make(row_per_head=row_per_head).check(**options)


@pytest.mark.parametrize("sharers", [1, 2, 3, 5, 64])
def test_any_number_of_sharers_packed_together_gives_the_same(sharers: int) -> None:
    make(group=(0, 1, 0, 0, 0)).check(sharers=sharers)


def test_a_chunk_of_tokens_may_follow_the_prefix() -> None:
    make(tokens=3, lengths=(5, 3, 4, 9, 7)).check(window=9)


def test_nobody_in_a_group_reads_only_own_pages() -> None:
    batch = make(group=(-1,) * 5)
    out, lse = batch.check()
    assert not out[2].any()
    assert np.isneginf(lse[2]).all()
    # Whatever the prefixes hold is not looked at.
    again, _ = dataclasses.replace(batch, arrays={**batch.arrays, "prefix_lengths": np.zeros((2, 1), np.int32)}).check()
    np.testing.assert_array_equal(out, again)


def test_an_empty_prefix_adds_nothing() -> None:
    batch = make(group=(0,) * 5, prefixes=(0, 8))
    alone = make(group=(-1,) * 5, prefixes=(0, 8))
    for one, other in zip(batch.check(), alone.check(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_prefix_alone_is_attended_to() -> None:
    out, lse = make(lengths=(0,) * 5).check()
    assert np.isfinite(lse[0]).all()
    assert out[0].any()
    assert np.isneginf(lse[3]).all()


def test_padding_queries_get_zero_and_minus_infinity() -> None:
    positions = np.array([[11], [-1], [6], [8], [10]], np.int32)
    out, lse = make().check(q_positions=positions)
    assert not out[1].any()
    assert np.isneginf(lse[1]).all()


def test_given_positions_are_those_a_window_goes_by() -> None:
    rng = np.random.default_rng(1)
    prefix = np.stack([rng.permutation(3 * PAGE) for _ in range(2)])[:, None].astype(np.int32)
    own = 12 + np.stack([rng.permutation(3 * PAGE) for _ in range(5)])[:, None].astype(np.int32)
    own[:, :, 1] = -1
    queries = np.full((5, 1), 30, np.int32)
    make().check(prefix_positions=prefix, positions=own, q_positions=queries, window=14)


def test_codes_with_a_scale_per_vector_are_read_in_both_phases() -> None:
    batch = make()
    rng = np.random.default_rng(2)
    codes = rng.integers(-127, 128, size=(2, *batch.arrays["k_pool"].shape)).astype(np.int8)
    scales = rng.uniform(0.01, 0.02, size=codes.shape[:-1]).astype(np.float32)
    batch.check(k_pool=codes[0], v_pool=codes[1], k_scale=scales[0], v_scale=scales[1])


def test_the_value_may_lie_within_the_key() -> None:
    batch = make()
    inside = dataclasses.replace(batch, arrays={k: v for k, v in batch.arrays.items() if k != "v_pool"})
    out, _ = inside.check(v_pool=None, value_dim=5)
    assert out.shape[-1] == 5


def test_new_groups_of_the_same_shape_do_not_trace_again() -> None:
    arrays, traces = jax.tree.map(jnp.asarray, make().arrays), []

    @jax.jit
    def call(group: jax.Array) -> jax.Array:
        traces.append(group)
        return shared_prefix(**{**arrays, "group": group}, backend="xla")[0]

    for group in ([0, 0, 0, 0, 0], [1, -1, 0, 1, -1], [-1] * 5):
        call(jnp.array(group))
    assert len(traces) == 1


@settings(max_examples=60)
# Few shapes: each is compiled.
@given(
    st.sampled_from((1, 6, 9)).flatmap(lambda size: st.lists(st.integers(-1, 3), min_size=size, max_size=size)),
    st.sampled_from((1, 2, 5)),
)
def test_every_member_has_one_place_in_a_tile_of_its_group(group: list[int], sharers: int) -> None:
    packing = jax.tree.map(np.asarray, pack(jnp.array(group), 4, sharers))
    held = packing.members[packing.members >= 0]
    assert sorted(held) == [b for b, g in enumerate(group) if g >= 0]
    for b, g in enumerate(group):
        if g >= 0:
            assert packing.members[packing.tile[b], packing.place[b]] == b
            assert packing.group[packing.tile[b]] == g
    # Each group's prefix is read as few times as its size allows.
    used = packing.group[packing.members[:, 0] >= 0]
    for g in range(4):
        assert np.sum(used == g) == -(-group.count(g) // sharers)
    assert len(packing.members) == tiles_at_most(len(group), 4, sharers)


def test_misshapen_calls_are_refused_with_their_shapes() -> None:
    batch = make()
    with pytest.raises(ValueError, match=r"group must be integers of shape \[5\]"):
        batch.both(group=np.zeros((2,), np.int32))
    with pytest.raises(ValueError, match="prefix_lengths must be"):
        batch.both(prefix_lengths=np.zeros((2, 2), np.int32))
