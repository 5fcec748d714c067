"""Copies of one sequence that read their common pages once, against the same sequences that read them each."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvjax
from kvjax import CacheConfig, Sampling
from kvjax.attention import copies as reading
from kvjax.attention.copies import LEAST_COPIES, LEAST_SLOTS, attend_copies, common_pages, worth_sharing
from kvjax.cache.codecs import KIVI, Dense, Int8
from pallas_kernels import paged_attention
from tests.cache.tiny import MODEL, random_tokens
from tests.models.cases import MLA
from tests.models.cases import model_of as variant_of

PROMPT = (random_tokens(41, 75) % 61).tolist()
ROUNDING = 2e-5
"""Log-probabilities of about 4: float32 keeps 3e-7 of such a number, and two layers merge two softmaxes each."""
PAGE = 4


def given_copies(state: kvjax.State, copies: int) -> kvjax.State:
    """The state, said to hold so many copies side by side."""
    return dataclasses.replace(state, copies=copies)


def prompts(count: int) -> list[list[int]]:
    """Prompts of unequal lengths."""
    return [PROMPT[: len(PROMPT) - 9 * i] for i in range(count)]


@pytest.mark.parametrize(
    ("model", "cache", "count"),
    [
        pytest.param("gqa", CacheConfig(codec=Dense()), 2, id="dense"),
        pytest.param("gqa", CacheConfig(codec=KIVI(2, 8, 16)), 1, id="kivi", marks=pytest.mark.slow),
        pytest.param("mla", CacheConfig(codec=Int8()), 1, id="mla-int8", marks=pytest.mark.slow),
    ],
)
def test_forks_that_read_together_go_on_like_forks_that_read_alone(model: str, cache: CacheConfig, count: int) -> None:
    chosen = MODEL if model == "gqa" else variant_of(MLA)
    sampling, outputs = Sampling(temperature=1.0, seeds=tuple(range(LEAST_COPIES * count))), []
    for copies in (LEAST_COPIES, 1):
        state = kvjax.fork(kvjax.prefill(chosen, prompts(count), cache, room=LEAST_SLOTS), 2)
        state = kvjax.fork(state, LEAST_COPIES // 2)
        assert state.copies == LEAST_COPIES
        out, state = kvjax.extend(chosen, given_copies(state, copies), max_new_tokens=20, sampling=sampling)
        outputs.append(out)
        # Texts of their own by now, one cut back into the common part.
        state = kvjax.rollback(state, [40] + [3] * (state.batch - 1)) if model == "gqa" and count == 2 else state
        outputs.append(kvjax.extend(chosen, state, max_new_tokens=4, sampling=sampling)[0])
    for together, alone in zip(outputs[:2], outputs[2:], strict=True):
        assert together.tokens == alone.tokens
        np.testing.assert_allclose(together.logprobs, alone.logprobs, atol=ROUNDING)
    assert len(set(map(tuple, outputs[0].tokens))) > 1


def test_samples_and_beams_of_one_prompt_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = reading.shared_prefix

    def spied(*arguments: Any, **options: Any) -> Any:
        calls.append(options["largest"])
        return real(*arguments, **options)

    monkeypatch.setattr(reading, "shared_prefix", spied)
    for sampling in (Sampling(temperature=1.0, n=LEAST_COPIES), Sampling(beams=LEAST_COPIES)):
        calls.clear()
        options = dict(max_new_tokens=6, sampling=sampling, context=LEAST_SLOTS)
        # What is asked is asked while tracing.
        jax.clear_caches()
        out = kvjax.generate(MODEL, [PROMPT], **options)
        assert set(calls) == {LEAST_COPIES}
        monkeypatch.setattr(reading, "LEAST_COPIES", LEAST_COPIES + 1)
        jax.clear_caches()
        alone = kvjax.generate(MODEL, [PROMPT], **options)
        monkeypatch.setattr(reading, "LEAST_COPIES", LEAST_COPIES)
        assert out.tokens == alone.tokens
        np.testing.assert_allclose(out.logprobs, alone.logprobs, atol=ROUNDING)


def test_sharing_is_decided_by_sizes_alone() -> None:
    assert worth_sharing(LEAST_COPIES, LEAST_SLOTS)
    assert not worth_sharing(LEAST_COPIES - 1, LEAST_SLOTS)
    assert not worth_sharing(LEAST_COPIES, LEAST_SLOTS - 1)


@settings(max_examples=40)
@given(st.data())
def test_common_pages_are_the_first_that_all_have_and_have_filled(data: st.DataObject) -> None:
    batch, copies, rows, entries = data.draw(st.sampled_from(((4, 4, 1, 3), (6, 4, 2, 3), (6, 2, 1, 3))))
    # Few numbers, so that tables often agree.
    table = np.array(data.draw(st.lists(st.integers(-1, 1), min_size=batch * rows * entries, max_size=99)))
    table = table[: batch * rows * entries].reshape(batch, rows, entries)
    whole = np.array(data.draw(st.lists(st.integers(0, entries), min_size=batch * rows, max_size=batch * rows)))
    whole = whole.reshape(batch, rows)
    found = np.asarray(common_pages(jnp.asarray(table, jnp.int32), jnp.asarray(whole, jnp.int32), copies))
    for group, first in enumerate(range(0, batch, copies)):
        members = range(first, min(first + copies, batch))
        count = 0
        while count < entries and all(
            table[member, row, count] == table[first, row, count] >= 0 and count < whole[member, row]
            for member in members
            for row in range(rows)
        ):
            count += 1
        assert found[group] == count


@pytest.mark.parametrize("rows", [1, 2])
def test_common_pages_once_and_own_pages_equal_all_pages_by_each(rows: int) -> None:
    rng = np.random.default_rng(rows)
    batch, copies, heads, width, entries = 6, 4, 4, 8, 5
    k_pool, v_pool = rng.normal(size=(2, 60, 2, 2 // rows, PAGE, width)).astype(np.float32)
    table = rng.permutation(60)[: batch * rows * entries].reshape(batch, rows, entries).astype(np.int32)
    table[1:4, :, :3] = table[0, :, :3]
    table[5, 0, :2] = table[4, 0, :2]
    lengths = np.array([20, 17, 13, 15, 7, 20], np.int32)[:, None].repeat(rows, axis=1)
    q = rng.normal(size=(batch, 1, heads, width)).astype(np.float32)
    positions = lengths[:, :1] - 1
    positions[2] = -1
    for window in (None, 6):
        options = dict(layer=jnp.ones(1, jnp.int32), q_positions=positions, window=window)
        expected = paged_attention(q, k_pool, v_pool, table, lengths, **options)
        actual = attend_copies(q, k_pool, v_pool, jnp.asarray(table), jnp.asarray(lengths), copies=copies, **options)
        for one, other in zip(actual, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=5e-6)


def test_a_saved_fork_reads_together_again(tmp_path: Any) -> None:
    state = kvjax.fork(kvjax.prefill(MODEL, [PROMPT], room=8), LEAST_COPIES)
    kvjax.save_state(state, tmp_path / "state")
    assert kvjax.load_state(tmp_path / "state").copies == LEAST_COPIES
