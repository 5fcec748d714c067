"""The examples of docs/adding_a_method.md: they run as they stand, and are short."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.evaluate.rows import rows_of
from kvjax.evaluate.suite import Suite
from tests.evaluate.tiny import SETTINGS, material, model

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "adding_a_method.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def names_of(block: str) -> dict[str, Any]:
    """What a block defines, once it has run."""
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(block, "docs/adding_a_method.md", "exec"), names)
    return names


def test_the_policy_shown_is_the_one_that_the_evaluation_uses_and_takes_less_than_a_hundred_lines() -> None:
    assert BLOCKS[0] == (ROOT / "kvjax" / "evaluate" / "random_eviction.py").read_text()
    assert all(len(block.splitlines()) < 100 for block in BLOCKS)


def test_the_policy_generates_and_saves_memory() -> None:
    names_of(BLOCKS[1])


def test_the_codec_generates_and_loses_what_it_says() -> None:
    codec = names_of(BLOCKS[2])["E5M2"]()
    assert isinstance(codec, kvjax.Codec)
    x = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32) * 100
    back = np.asarray(codec.decode(codec.encode(jnp.asarray(x)), jnp.float32))
    # Two bits of mantissa: half a step is an eighth of the lower end of its binade.
    assert np.all(np.abs(back - x) <= np.abs(x) / 8)


@pytest.mark.slow
def test_a_class_of_ones_own_is_evaluated_by_name(tmp_path: Path) -> None:
    path = tmp_path / "caches.toml"
    path.write_text('[[cache]]\npolicy = { name = "RandomEviction", budget = [16] }\ncodec = "e5m2"')
    (row,) = rows_of(path, [names_of(BLOCKS[2])["E5M2"]])
    measured = Suite(model(), material(), SETTINGS).measure("recall", row.cache)
    assert measured["metrics"]["answered"]["count"] == 6
    # 17 slots in pages of 16, of 2 layers, 2 heads, key and value, 8 elements of one byte.
    assert measured["bytes"]["held"] == 32 * 2 * 2 * 2 * 8
