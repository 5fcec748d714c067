"""What is measured: through the cache, the same in every run, with known answers where one is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import CacheConfig, codecs, policies, selects
from kvjax.errors import ConfigError
from kvjax.evaluate import suite as module
from kvjax.evaluate.forced import Cost, Piece, forced_logits
from kvjax.evaluate.memory import Footprint
from kvjax.evaluate.suite import Suite
from kvjax.evaluate.tasks import Question
from kvjax.generate.compiles import compiled_programs
from tests.evaluate.tiny import SETTINGS, material, model, suite

FULL, SMALL = CacheConfig(), CacheConfig(policy=policies.SlidingWindow(16))

LOGITS = 1e-4
"""Absolute, on logits of up to 4: two layers in float32, summed in another order, were seen to differ by 5e-6."""


def logits_of(questions: list[Question], cache: CacheConfig, batch: int = 4) -> tuple[list[np.ndarray], Cost]:
    """Per question float32[len(continuation), V], and what it cost."""
    cost = Cost()
    found = [np.full((len(q.continuation), model().config.vocab_size), np.nan, np.float32) for q in questions]
    for piece in forced_logits(model(), questions, cache, cost, batch=batch, context=SETTINGS.context):
        for row in range(piece.count):
            into = found[piece.first + row][piece.start :]
            values = np.asarray(piece.logits[row])[: len(into)]
            into[: len(values)] = values
    return found, cost


def test_logits_are_those_of_score_for_prompts_and_continuations_of_different_lengths() -> None:
    tokens = np.random.default_rng(0).integers(0, 256, (2, 60)).astype(np.int32)
    questions = [
        Question(tuple(tokens[0, :40].tolist()), tuple(tokens[0, 40:].tolist()), (True,) * 20),
        Question(tuple(tokens[1, :23].tolist()), tuple(tokens[1, 23:26].tolist()), (True,) * 3),
    ]
    for cache in (FULL, SMALL):
        found, _ = logits_of(questions, cache)
        for row, (question, logits) in enumerate(zip(questions, found, strict=True)):
            start = len(question.prompt)
            wanted = kvjax.score(model(), tokens[row : row + 1], cache=cache, path="prefill")[0, start - 1 :]
            np.testing.assert_allclose(logits, wanted[: len(logits)], atol=LOGITS)


def test_the_full_cache_loses_exactly_nothing() -> None:
    metrics = suite().measure("text", FULL)["metrics"]
    assert metrics["divergence"]["value"] == 0
    assert metrics["excess_nats"] == {"value": 0, "error": 0, "count": SETTINGS.text_rows}
    assert metrics["agreement"]["value"] == 1


def test_a_smaller_cache_changes_the_text_and_its_loss_is_that_of_score() -> None:
    metrics = suite().measure("text", SMALL)["metrics"]
    assert metrics["divergence"]["value"] > 1e-3
    questions = suite().questions("text")
    tokens = np.array([[*q.prompt, *q.continuation] for q in questions], np.int32)
    half = len(questions[0].prompt)
    logits = np.asarray(kvjax.score(model(), tokens, cache=SMALL, path="prefill"), np.float64)[:, half - 1 : -1]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(logp, tokens[:, half:, None], -1).mean()
    assert metrics["nats"]["value"] == pytest.approx(nats, abs=LOGITS)
    assert metrics["perplexity"]["value"] == pytest.approx(np.exp(nats), rel=LOGITS)


def test_results_are_the_same_in_another_order_and_another_suite() -> None:
    def measured(one: Suite, order: tuple[str, ...]) -> dict[str, Any]:
        found = {task: one.measure(task, SMALL) for task in order}
        return {task: (found[task]["metrics"], found[task]["bytes"]) for task in sorted(order)}

    again = Suite(model(), material(), SETTINGS)
    assert measured(suite(), ("text", "recall", "copy")) == measured(again, ("copy", "recall", "text"))
    assert again.identity == suite().identity


def test_the_identity_tells_models_texts_and_settings_apart_but_not_tasks() -> None:
    def identity(**changes: Any) -> dict[str, Any]:
        given = {"model": model(), "material": material(), "settings": SETTINGS, **changes}
        return Suite(given["model"], given["material"], given["settings"]).identity

    other = kvjax.init(model().config, seed=9)
    text = dataclasses.replace(material(), tokens=material().tokens[:5000])
    base = identity()
    assert identity(settings=dataclasses.replace(SETTINGS, tasks=("copy",))) == base
    assert identity(settings=dataclasses.replace(SETTINGS, seed=5)) != base
    assert identity(model=dataclasses.replace(model(), params=other.params)) != base
    assert identity(material=text) != base


def test_a_short_last_batch_compiles_nothing_and_changes_nothing() -> None:
    questions = suite().questions("copy") * 3  # six: four and two
    before, _ = logits_of(questions[:4], SMALL)
    programs = compiled_programs()
    after, cost = logits_of(questions, SMALL)
    assert compiled_programs() == programs
    for one, other in zip(before, after[:4], strict=True):
        np.testing.assert_array_equal(one, other)
    assert not any(np.isnan(logits).any() for logits in after)
    assert cost.decode_tokens == 8 * (len(questions[0].continuation) - 1)  # both batches, filled up


# Known answers: logits that someone else makes.


def scripted(monkeypatch: pytest.MonkeyPatch, wrong: dict[int, set[int]]) -> None:
    """Every question is answered rightly but for these tokens: question -> places in its continuation."""

    def fake(
        model: Any, questions: list[Question], cache: Any, cost: Cost, *, batch: int, context: int
    ) -> Iterator[Piece]:
        for first, question in enumerate(questions):
            said = [
                (token + (place in wrong.get(first, ()))) % 256 for place, token in enumerate(question.continuation)
            ]
            yield Piece(first, 1, 0, jnp.eye(260)[jnp.array([said])])
        cost.footprint = Footprint(1, 1, 1, 1)

    monkeypatch.setattr(module, "forced_logits", fake)


def test_an_answer_is_right_if_all_that_is_asked_of_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    # Three questions at depth 0, then three at depth 1.
    scripted(monkeypatch, {0: {0}, 4: {1}, 5: {0}})
    metrics = Suite(model(), material(), SETTINGS).measure("recall", FULL)["metrics"]
    assert (metrics["answered"]["value"], metrics["answered"]["count"]) == (0.5, 6)
    assert {depth: each["value"] for depth, each in metrics["by_depth"].items()} == pytest.approx(
        {"0": 2 / 3, "1": 1 / 3}
    )


def test_what_is_given_of_a_chain_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    chains = suite().questions("tracking")
    given = {number: {question.asked.index(False)} for number, question in enumerate(chains)}
    scripted(monkeypatch, given)
    assert Suite(model(), material(), SETTINGS).measure("tracking", FULL)["metrics"]["answered"]["value"] == 1
    scripted(monkeypatch, {**given, 1: {0}})
    metrics = Suite(model(), material(), SETTINGS).measure("tracking", FULL)["metrics"]
    assert metrics["by_hops"]["2"]["value"] == pytest.approx(2 / 3)


def test_a_copy_counts_tokens_and_how_many_come_before_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    length = len(suite().questions("copy")[0].continuation)
    scripted(monkeypatch, {0: {10, 20}})
    metrics = Suite(model(), material(), SETTINGS).measure("copy", FULL)["metrics"]
    assert metrics["copied"]["value"] == pytest.approx((1 + (length - 2) / length) / 2)
    assert metrics["before_mistake"]["value"] == (10 + length) / 2


# Bytes


def held_bytes(cache: CacheConfig) -> dict[str, int]:
    return suite().measure("copy", cache)["bytes"]


@pytest.mark.slow
def test_bytes_held_are_those_of_the_plan_and_fall_with_the_window() -> None:
    # What is fed of a copy: its last token is not.
    question = suite().questions("copy")[0]
    tokens = len(question.prompt) + len(question.continuation) - 1
    for cache in (FULL, SMALL, CacheConfig(codec=codecs.Int8()), CacheConfig(policy=policies.H2O(8, 8), page_size=4)):
        planned = kvjax.plan(model().config, cache, tokens, 1, dtype=model().dtype.name)
        found = held_bytes(cache)
        assert found["held"] == found["read"] == planned.total_bytes
        assert found["pool"] >= SETTINGS.batch * found["held"]
    assert held_bytes(SMALL)["held"] * 7 < held_bytes(FULL)["held"]


def test_what_a_select_leaves_unread_is_held_but_not_read() -> None:
    question = suite().questions("copy")[0]
    tokens = len(question.prompt) + len(question.continuation) - 1
    for select in (selects.Quest(2, dense_layers=1), selects.SparQ(4, 8, 2)):
        cache = CacheConfig(select=select, page_size=4)
        found = held_bytes(cache)
        planned = kvjax.plan(model().config, cache, tokens, 1, dtype=model().dtype.name)
        assert found["read"] == planned.read_bytes < planned.total_bytes == found["held"]


def test_speed_leaves_out_what_compiled() -> None:
    suite().measure("copy", SMALL)
    seconds = suite().measure("copy", SMALL)["seconds"]
    assert seconds["decode_tokens_per_second"] > 0
    assert seconds["prefill_tokens_per_second"] > 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tasks": ("recall", "reading")}, "tasks must be some of"),
        ({"depths": (1.5,)}, "depths"),
        ({"hops": (0,)}, "hops"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"context": 4096}, "at most the model's 128 positions"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Suite(model(), material(), dataclasses.replace(SETTINGS, **changes))
