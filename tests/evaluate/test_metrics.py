"""Every metric on inputs whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvjax.evaluate.metrics import (
    compared,
    first_mistake,
    likeliest,
    log_probabilities,
    mean_of,
    perplexity_of,
)

FLOAT32 = 1e-5
"""Sums of a few logarithms of up to 10 in float32, against float64: rounding is below 1e-6."""


def test_a_distribution_diverges_from_itself_by_exactly_nothing_and_agrees_with_itself() -> None:
    found = log_probabilities(np.random.default_rng(0).normal(size=(3, 5, 11)).astype(np.float32) * 4)
    nats, reference, divergence, same = compared(found, found, np.ones((3, 5), np.int32))
    assert np.all(np.asarray(divergence) == 0)
    assert np.all(np.asarray(same))
    np.testing.assert_array_equal(nats, reference)


def test_divergence_loss_and_agreement_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(1)
    logits, full = rng.normal(size=(2, 2, 3, 7)) * 3
    targets = rng.integers(0, 7, (2, 3)).astype(np.int32)
    q, p = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (logits, full))
    found = [log_probabilities(x.astype(np.float32)) for x in (logits, full)]
    nats, reference, divergence, same = map(np.asarray, compared(*found, targets))
    np.testing.assert_allclose(divergence, (p * np.log(p / q)).sum(-1), atol=FLOAT32)
    picked = np.take_along_axis(q, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(nats, -np.log(picked), atol=FLOAT32)
    np.testing.assert_allclose(reference, -np.log(np.take_along_axis(p, targets[..., None], -1)[..., 0]), atol=FLOAT32)
    np.testing.assert_array_equal(same, q.argmax(-1) == p.argmax(-1))
    np.testing.assert_array_equal(likeliest(logits.astype(np.float32)), logits.argmax(-1))


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    found = log_probabilities(np.zeros((1, 4, 260), np.float32))
    nats = np.asarray(compared(found, found, np.zeros((1, 4), np.int32))[0])
    perplexity = perplexity_of(mean_of(nats[0]))
    assert perplexity.value == pytest.approx(260, rel=FLOAT32)
    assert perplexity.error == pytest.approx(0, abs=1e-3)


def test_an_estimate_carries_the_standard_error_of_its_mean() -> None:
    half = mean_of([True, False] * 8)
    assert (half.value, half.count) == (0.5, 16)
    assert half.error == pytest.approx(math.sqrt(0.25 / 15))
    assert mean_of([3.0]).error is None
    assert mean_of([2.0, 2.0]).error == 0


@pytest.mark.parametrize("right, count", [([1, 1, 0, 1], 2), ([0], 0), ([1, 1], 2)])
def test_a_greedy_copy_lasts_until_its_first_mistake(right: list[int], count: int) -> None:
    assert first_mistake(np.array(right, bool)) == count
