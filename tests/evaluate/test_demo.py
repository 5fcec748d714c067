"""Known answers on trained weights: what a cache has dropped is not recalled, what it holds is."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvjax
from kvjax import CacheConfig, policies
from kvjax.evaluate.suite import Settings, Suite
from kvjax.evaluate.tasks import material_of

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = Settings(context=256, batch=8, depths=(0.0, 1.0), recall_count=8, distractors=1)


@pytest.mark.slow
def test_a_window_too_small_for_the_needle_recalls_only_what_is_near() -> None:
    loaded = kvjax.load(ROOT / "models" / "demo", dtype="float32")
    suite = Suite(loaded, material_of(loaded), SETTINGS)

    def recall(cache: CacheConfig) -> dict[str, float]:
        return {depth: each["value"] for depth, each in suite.measure("recall", cache)["metrics"]["by_depth"].items()}

    # 97% and more were measured over 32 questions; of 8, one may be missed.
    assert min(recall(CacheConfig()).values()) >= 7 / 8
    # A value of at least three letters is never guessed; the line at depth 1 stands within 64 bytes of the question.
    assert recall(CacheConfig(policy=policies.SlidingWindow(64))) == {"0": 0.0, "1": pytest.approx(1.0, abs=1 / 8)}
