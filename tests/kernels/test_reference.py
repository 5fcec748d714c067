"""The operations in plain jnp against a float64 NumPy oracle, and the properties every backend must share with them.

A case runs on the reference and on the block-by-block form, which must agree; here a block is two pages of four slots.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, attention_weights, merge, paged_attention, paged_weights
from pallas_kernels.paged_attention import blocks

# float32 keeps 6e-8 of a number; sums over 8 channels, then over at most 24 slots, of numbers near 1 stay well below.
ROUNDING = 5e-6
PAGE, LAYERS, LAYER = 4, 3, 1


@dataclasses.dataclass(frozen=True)
class Case:
    """A paged batch and the same keys and values laid out flat.

    q [B,T,H,D]; k, v [B,S,K,D] in slot order; pools [P,LAYERS,heads,PAGE,D]; table int32[B, K or 1, N]; lengths alike.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    k_pool: np.ndarray
    v_pool: np.ndarray
    table: np.ndarray
    lengths: np.ndarray

    def run(self, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
        """`paged_attention` on this case, with some arguments replaced: block by block, once it is the reference's."""
        out, lse = self._run("xla_blocks", **changes)
        expected = self._run("xla", **changes)
        close(out, expected[0])
        close(lse, expected[1])
        return out, lse

    def _run(self, backend: str, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
        call = dict(q=self.q, k_pool=self.k_pool, v_pool=self.v_pool, block_table=self.table, lengths=self.lengths)
        options = {"layer": np.array([LAYER]), **call, **changes}
        arrays = {name: value for name, value in options.items() if isinstance(value, np.ndarray)}
        static = {name: value for name, value in options.items() if name not in arrays} | {"backend": backend}
        out, lse = jax.jit(lambda arrays: paged_attention(**arrays, **static))(arrays)
        return np.asarray(out), np.asarray(lse)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several trips for a table of 6 pages."""
    monkeypatch.setitem(blocks.BLOCK_ELEMENTS, jax.default_backend(), 2**10)


def make(
    seed: int = 0,
    lengths: tuple[int, ...] = (9, 4, 0),
    heads: int = 4,
    kv_heads: int = 2,
    tokens: int = 1,
    row_per_head: bool = False,
    width: int = 8,
    pages: int = 6,
) -> Case:
    """Random numbers, pages scattered over the pool in random order, NaN wherever nothing may be read."""
    rng = np.random.default_rng(seed)
    batch, slots, rows = len(lengths), pages * PAGE, kv_heads if row_per_head else 1
    q = rng.normal(size=(batch, tokens, heads, width)).astype(np.float32)
    k, v = rng.normal(size=(2, batch, slots, kv_heads, width)).astype(np.float32)
    count = batch * rows * pages + 5
    pools = np.full((2, count, LAYERS, kv_heads // rows, PAGE, width), np.nan, np.float32)
    table = np.full((batch, rows, pages), -1, np.int32)
    numbers = iter(rng.permutation(count))
    for b, length in enumerate(lengths):
        for row in range(rows):
            for slot in range(length):
                if slot % PAGE == 0:
                    table[b, row, slot // PAGE] = next(numbers)
                page = table[b, row, slot // PAGE]
                which = slice(row, row + 1) if row_per_head else slice(None)
                pools[0, page, LAYER, :, slot % PAGE] = k[b, slot, which]
                pools[1, page, LAYER, :, slot % PAGE] = v[b, slot, which]
    held = np.broadcast_to(np.array(lengths, np.int32)[:, None], (batch, rows)).copy()
    return Case(q, k, v, pools[0], pools[1], table, held)


def oracle(q: Any, k: Any, v: Any, mask: Any, scale: float | None = None, cap: float | None = None) -> tuple:
    """Softmax attention in float64, one head and one query at a time; mask bool[B, T, S].

    Returns out [B,T,H,Dv], lse [B,T,H], weights [B,T,H,S]: 0, -inf and 0 for a query that sees nothing.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, tokens, heads, width = q.shape
    out = np.zeros((batch, tokens, heads, v.shape[-1]))
    lse = np.full((batch, tokens, heads), -np.inf)
    weights = np.zeros((batch, tokens, heads, k.shape[1]))
    for b, t, h in np.ndindex(batch, tokens, heads):
        seen, head = np.flatnonzero(mask[b, t]), h // (heads // k.shape[2])
        if seen.size:
            score = k[b, seen, head] @ q[b, t, h] * (width**-0.5 if scale is None else scale)
            score = score if cap is None else cap * np.tanh(score / cap)
            lse[b, t, h] = score.max() + np.log(np.exp(score - score.max()).sum())
            weights[b, t, h, seen] = np.exp(score - lse[b, t, h])
            out[b, t, h] = weights[b, t, h, seen] @ v[b, seen, head]
    return out, lse, weights


def visible(positions: Any, queries: Any, window: int | None = None) -> np.ndarray:
    """bool[B, T, S] from positions [B, S] and queries [B, T]; -1 is empty or padding."""
    distance = queries[:, :, None] - positions[:, None, :]
    return (positions[:, None, :] >= 0) & (distance >= 0) & (distance < (window or np.inf))


def slot_positions(case: Case) -> np.ndarray:
    """Slot index as position, -1 from the length on: int[B, S]."""
    order = np.arange(case.k.shape[1])
    return np.where(order < case.lengths[:, :1], order, -1)


def close(actual: Any, expected: Any) -> None:
    """Equal within float32 rounding; infinities in the same places."""
    np.testing.assert_allclose(actual, expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("row_per_head", [False, True])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"soft_cap": 2.0}, {"scale": 0.2}])
@pytest.mark.parametrize("tokens", [1, 3])
def test_paged_attention_equals_the_oracle(tokens: int, options: dict, row_per_head: bool) -> None:
    case = make(lengths=(9, 4, 3), tokens=tokens, row_per_head=row_per_head)
    queries = case.lengths[:, :1] - tokens + np.arange(tokens)
    mask = visible(slot_positions(case), queries, options.get("window"))
    out, lse, _ = oracle(case.q, case.k, case.v, mask, options.get("scale"), options.get("soft_cap"))
    actual = case.run(**options)
    close(actual[0], out)
    close(actual[1], lse)


def test_slots_in_any_order_and_with_holes_are_read_by_their_positions() -> None:
    case = make(lengths=(9, 8, 5), tokens=2)
    rng = np.random.default_rng(1)
    positions = np.full(case.k.shape[:2], -1, np.int32)
    for b, length in enumerate(case.lengths[:, 0]):
        positions[b, :length] = rng.permutation(length)
    positions[:, 2] = -1
    queries = np.array([[8, 8], [6, 7], [4, -1]], np.int32)
    out, lse, _ = oracle(case.q, case.k, case.v, visible(positions, queries, 4))
    actual = case.run(positions=positions[:, None], q_positions=queries, window=4)
    close(actual[0], out)
    close(actual[1], lse)


def test_a_length_of_zero_gives_zero_and_minus_infinity() -> None:
    out, lse = make(lengths=(5, 0)).run()
    assert not out[1].any()
    assert np.isneginf(lse[1]).all()
    assert np.isfinite(lse[0]).all()


def test_a_padding_query_gives_zero_and_minus_infinity() -> None:
    out, lse = make(lengths=(5,), tokens=2).run(q_positions=np.array([[4, -1]]))
    assert not out[0, 1].any()
    assert np.isneginf(lse[0, 1]).all()


@pytest.mark.parametrize("row_per_head", [False, True])
def test_renumbering_pages_changes_no_bit(row_per_head: bool) -> None:
    case = make(row_per_head=row_per_head)
    order = np.random.default_rng(2).permutation(len(case.k_pool))
    moved = np.where(case.table >= 0, np.argsort(order)[case.table], -1).astype(np.int32)
    assert not np.array_equal(moved, case.table)
    actual = case.run(k_pool=case.k_pool[order], v_pool=case.v_pool[order], block_table=moved)
    for one, other in zip(actual, case.run(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_nan_in_unused_slots_changes_no_bit() -> None:
    case = make()
    assert np.isnan(case.k_pool).any()
    clean = case.run(k_pool=np.nan_to_num(case.k_pool), v_pool=np.nan_to_num(case.v_pool))
    for one, other in zip(case.run(), clean, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_row_per_head_equals_one_row_for_all() -> None:
    # The same seed draws the same q, k and v; only where they lie differs.
    close(make(row_per_head=True).run()[0], make().run()[0])


def test_gqa_equals_repeated_key_value_heads() -> None:
    case = make(heads=6, kv_heads=2)
    repeated = case.run(k_pool=case.k_pool.repeat(3, axis=2), v_pool=case.v_pool.repeat(3, axis=2))
    for one, other in zip(case.run(), repeated, strict=True):
        close(one, other)


@pytest.mark.parametrize("window", [9, 100])
def test_a_window_no_shorter_than_the_length_equals_none(window: int) -> None:
    case = make()
    np.testing.assert_array_equal(case.run(window=window)[0], case.run()[0])
    assert not np.array_equal(case.run(window=8)[0], case.run()[0])


def test_a_later_token_changes_no_earlier_output() -> None:
    case = make(lengths=(9, 7), tokens=3)
    queries = case.lengths[:, :1] - 3 + np.arange(3)
    k_pool, v_pool = case.k_pool.copy(), case.v_pool.copy()
    for b, length in enumerate(case.lengths[:, 0]):
        page, slot = case.table[b, 0, (length - 1) // PAGE], (length - 1) % PAGE
        k_pool[page, LAYER, :, slot] += 1
        v_pool[page, LAYER, :, slot] += 1
    before, after = case.run(q_positions=queries)[0], case.run(q_positions=queries, k_pool=k_pool, v_pool=v_pool)[0]
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert not np.array_equal(before[:, 2], after[:, 2])


def test_the_value_within_the_key_equals_a_value_pool_of_its_own() -> None:
    case = make(kv_heads=1)
    inside = case.run(v_pool=None, value_dim=5)
    apart = case.run(v_pool=case.k_pool[..., :5])
    for one, other in zip(inside, apart, strict=True):
        np.testing.assert_array_equal(one, other)


def test_codes_with_a_scale_per_vector_equal_the_dequantised_values() -> None:
    case = make()
    rng = np.random.default_rng(3)
    codes = rng.integers(-127, 128, size=(2, *case.k_pool.shape)).astype(np.int8)
    scales = rng.uniform(0.01, 0.02, size=codes.shape[:-1]).astype(np.float32)
    coded = case.run(k_pool=codes[0], v_pool=codes[1], k_scale=scales[0], v_scale=scales[1])
    values = codes * scales[..., None]
    for one, other in zip(coded, case.run(k_pool=values[0], v_pool=values[1]), strict=True):
        close(one, other)


def test_codes_in_groups_with_minima_equal_the_dequantised_values() -> None:
    case = make()
    rng = np.random.default_rng(4)
    codes = rng.integers(0, 16, size=(2, *case.k_pool.shape)).astype(np.uint8)
    scales, minima = rng.uniform(0.1, 0.3, size=(2, *codes.shape[:-1], 2)).astype(np.float16)
    names = dict(k_scale=scales[0], v_scale=scales[1], k_min=-minima[0], v_min=-minima[1])
    values = codes * scales.astype(np.float32).repeat(4, -1) - minima.astype(np.float32).repeat(4, -1)
    plain = case.run(k_pool=values[0], v_pool=values[1])
    for one, other in zip(case.run(k_pool=codes[0], v_pool=codes[1], **names), plain, strict=True):
        close(one, other)


def test_a_new_layer_does_not_trace_again_and_reads_that_layer() -> None:
    case, traces = make(), []

    @jax.jit
    def call(k_pool: jax.Array, v_pool: jax.Array, layer: jax.Array) -> jax.Array:
        traces.append(layer)
        return paged_attention(case.q, k_pool, v_pool, case.table, case.lengths, layer=layer)[0]

    for layer in range(LAYERS):
        pools = (np.roll(pool, layer - LAYER, axis=1) for pool in (case.k_pool, case.v_pool))
        np.testing.assert_array_equal(call(*pools, jnp.array([layer])), case.run()[0])
    assert len(traces) == 1


@pytest.mark.parametrize("splits", [2, 3, 5])
def test_a_merge_of_splits_equals_the_whole(splits: int) -> None:
    case = make(lengths=(9, 3, 0))
    positions = slot_positions(case)
    parts = [
        case.run(
            positions=np.where(np.arange(positions.shape[1]) % splits == i, positions, -1)[:, None],
            q_positions=case.lengths[:, :1] - 1,
        )
        for i in range(splits)
    ]
    # An empty part's output is 0 by contract; merging must not need that.
    outs = np.stack([np.where(np.isneginf(lse)[..., None], np.nan, out) for out, lse in parts])
    out, lse = merge(jnp.asarray(outs), jnp.stack([lse for _, lse in parts]))
    whole = case.run()
    close(out, whole[0])
    close(lse, whole[1])


def test_a_sink_logit_merged_equals_one_more_column() -> None:
    case, sink = make(lengths=(9, 0)), 0.7
    out, lse = case.run()
    outs, lses = np.stack([out, np.zeros_like(out)]), np.stack([lse, np.full_like(lse, sink)])
    merged, total = merge(jnp.asarray(outs), jnp.asarray(lses))
    close(total, np.logaddexp(lse, sink))
    close(merged, out * np.exp(lse - np.logaddexp(lse, sink))[..., None])


@pytest.mark.parametrize("backend", ["xla", "xla_blocks"])
def test_paged_weights_equal_the_oracle_and_sum_to_rows_times_group(backend: str) -> None:
    case = make(lengths=(9, 4, 3), tokens=3)
    rows = np.array([[1, 1, 1], [0, 0, 1], [1, 0, 0.5]], np.float32)
    queries = case.lengths[:, :1] - 3 + np.arange(3)
    _, lse = case.run(q_positions=queries)
    options = dict(layer=np.array([LAYER]), q_positions=queries, backend=backend)
    actual = paged_weights(case.q, case.k_pool, case.table, case.lengths, lse=lse, row_weights=rows, **options)
    _, _, weights = oracle(case.q, case.k, case.v, visible(slot_positions(case), queries))
    grouped = weights.reshape(*weights.shape[:2], 2, 2, -1)
    close(actual, np.einsum("btkgs,bt->bks", grouped, rows))
    close(actual.sum(-1), rows.sum(1, keepdims=True) * np.full((1, 2), 2.0))


def test_attention_weights_of_all_rows_sum_to_tokens_times_group() -> None:
    case = make(lengths=(24, 24), tokens=24, heads=6)
    _, lse = attention(case.q, case.k, case.v)
    actual = attention_weights(case.q, case.k, lse=lse, row_weights=jnp.ones((2, 24)))
    # 24 rows, each of rounded weights.
    np.testing.assert_allclose(actual.sum(-1), np.full((2, 2), 24 * 3), rtol=24 * ROUNDING)
    _, _, weights = oracle(case.q, case.k, case.v, np.tri(24, dtype=bool)[None].repeat(2, 0))
    np.testing.assert_allclose(actual, weights.reshape(2, 24, 2, 3, 24).sum((1, 3)), rtol=0, atol=24 * ROUNDING)


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"causal": False}, {"soft_cap": 1.5}, {"scale": 0.1}])
def test_attention_equals_the_oracle(options: dict) -> None:
    case, order = make(lengths=(24, 24), tokens=24), np.arange(24)[None].repeat(2, 0)
    mask = visible(order, order, options.get("window"))
    if not options.get("causal", True):
        mask = np.ones_like(mask)
    out, lse, _ = oracle(case.q, case.k, case.v, mask, options.get("scale"), options.get("soft_cap"))
    actual = jax.jit(lambda q, k, v: attention(q, k, v, **options))(case.q, case.k, case.v)
    close(actual[0], out)
    close(actual[1], lse)


def test_queries_shorter_than_keys_continue_the_text() -> None:
    case = make(lengths=(24, 24), tokens=24)
    close(attention(case.q[:, -5:], case.k, case.v)[0], attention(case.q, case.k, case.v)[0][:, -5:])


def test_lengths_positions_and_segments_hide_what_they_say() -> None:
    case, order = make(lengths=(24, 24), tokens=24), np.arange(24)[None].repeat(2, 0)
    lengths = np.array([10, 24])
    causal = visible(order, order)
    short = oracle(case.q, case.k, case.v, causal & (order < lengths[:, None])[:, None])
    close(attention(case.q, case.k, case.v, lengths=lengths)[0], short[0])
    segments = np.repeat([[0, 1, 2]], 8, axis=1).repeat(2, 0)
    packed = oracle(case.q, case.k, case.v, causal & (segments[:, :, None] == segments[:, None]))
    close(attention(case.q, case.k, case.v, segment_ids=segments)[0], packed[0])
    positions = np.where(order % 3 == 0, -1, order // 2)
    placed = oracle(case.q, case.k, case.v, visible(positions, positions))
    close(attention(case.q, case.k, case.v, positions=positions, q_positions=positions)[0], placed[0])


def test_queries_that_are_not_causal_see_all_keys_however_few() -> None:
    case = make(lengths=(24, 24), tokens=24)
    k, v = case.k[:, :5], case.v[:, :5]
    out, lse, _ = oracle(case.q, k, v, np.ones((2, 24, 5), bool))
    actual = attention(case.q, k, v, causal=False)
    close(actual[0], out)
    close(actual[1], lse)
    # Causal ones continue the text: the first stand before it.
    assert np.isneginf(attention(case.q, k, v)[1][:, :19]).all()


def test_gradients_know_nothing_of_padded_keys() -> None:
    case, lengths = make(lengths=(24, 24), tokens=24), np.array([10, 24])
    beyond = (np.arange(24) >= lengths[:, None])[..., None, None]

    def gradients(k: np.ndarray, v: np.ndarray) -> Any:
        def loss(*qkv: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(attention(*qkv, lengths=lengths, soft_cap=3.0)[0]))

        return jax.grad(loss, argnums=(0, 1, 2))(case.q, k, v)

    spoilt = gradients(np.where(beyond, np.nan, case.k), np.where(beyond, np.nan, case.v))
    for one, other in zip(spoilt, gradients(case.k, case.v), strict=True):
        np.testing.assert_array_equal(one, other)


def test_padded_keys_may_hold_nan() -> None:
    case, lengths = make(lengths=(24, 24), tokens=24), np.array([10, 24])
    beyond = (np.arange(24) >= lengths[:, None])[..., None, None]
    spoilt = attention(case.q, np.where(beyond, np.nan, case.k), np.where(beyond, np.nan, case.v), lengths=lengths)
    for one, other in zip(spoilt, attention(case.q, case.k, case.v, lengths=lengths), strict=True):
        np.testing.assert_array_equal(one, other)


def test_gradients_are_finite_and_those_of_the_formula() -> None:
    case = make(lengths=(6, 6), tokens=6, pages=2)
    q, k, v = case.q, case.k[:, :6], case.v[:, :6]
    positions = np.array([[-1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, -1]])

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out, _ = attention(q, k, v, positions=positions, q_positions=positions)
        return jnp.sum(jnp.sin(out))

    gradients = jax.grad(loss, argnums=(0, 1, 2))(q, k, v)
    mask = visible(positions, positions)
    for index, gradient in enumerate(gradients):
        assert np.isfinite(gradient).all()
        step = np.random.default_rng(5).normal(size=gradient.shape) * 1e-4
        ends = []
        for sign in (1, -1):
            moved = [x + sign * step if i == index else x for i, x in enumerate((q, k, v))]
            ends.append(np.sin(oracle(*moved, mask)[0]).sum())
        # A central difference in float64: its own error is of the order of the step squared, relative.
        np.testing.assert_allclose((gradient * step).sum(), (ends[0] - ends[1]) / 2, rtol=1e-4, atol=1e-9)


def test_a_backend_asked_for_by_name_never_falls_back() -> None:
    case = make()
    with pytest.raises(ValueError, match="no backend 'nonsense'; it has: .*xla"):
        attention(case.q, case.k, case.v, backend="nonsense")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"q": np.zeros((3, 4, 8), np.float32)}, "paged attention takes"),
        ({"lengths": np.zeros((3,), np.int32)}, "lengths must be"),
        ({"q": np.zeros((3, 1, 5, 8), np.float32)}, "query heads must be a multiple"),
        ({"value_dim": 4}, "takes a v_pool, or"),
    ],
)
def test_misshapen_calls_are_refused_with_their_shapes(change: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make().run(**change)


def test_a_table_cut_to_its_first_pages_reads_each_of_them_once() -> None:
    # As the sinks of a ring are read: lengths count slots beyond the pages given.
    case = make(lengths=(21, 20, 18))
    positions = slot_positions(case)[:, : 3 * PAGE]
    queries = case.lengths[:, :1] - 1
    out, lse, _ = oracle(case.q, case.k[:, : 3 * PAGE], case.v[:, : 3 * PAGE], visible(positions, queries))
    actual = case.run(block_table=case.table[..., :3], positions=positions[:, None], q_positions=queries)
    close(actual[0], out)
    close(actual[1], lse)
