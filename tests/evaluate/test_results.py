"""Results outlive the run that made them, and nothing else is taken for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvjax import CacheConfig, policies
from kvjax.errors import ConfigError
from kvjax.evaluate.report import curves, heatmaps, markdown, table
from kvjax.evaluate.results import open_results, read_results
from kvjax.evaluate.rows import Row

IDENTITY = {"settings": {"context": 128, "seed": 0}, "model": "abc"}
ROWS = (
    Row("Full", "", CacheConfig()),
    Row("TOVA", "8", CacheConfig(policy=policies.TOVA(8))),
    Row("TOVA", "16", CacheConfig(policy=policies.TOVA(16))),
)


def measured(value: float, held: int = 1000) -> dict[str, Any]:
    """A result of recall."""
    estimate = {"value": value, "error": 0.1, "count": 4}
    return {
        "metrics": {"answered": estimate, "by_depth": {"0": estimate, "1": {**estimate, "value": 1.0}}},
        "bytes": {"held": held, "pool": 4 * held, "bookkeeping": 10, "read": held},
        "seconds": {"total": 1.0, "prefill_tokens_per_second": None, "decode_tokens_per_second": 2500.0},
    }


def test_a_run_cut_short_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.json"
    first = open_results(path, IDENTITY, {})
    first.add(ROWS[0], "recall", measured(1.0))
    first.add(ROWS[1], "recall", measured(0.25))
    second = open_results(path, IDENTITY, {})
    found = [second.find(row, "recall") for row in ROWS]
    assert [entry and entry["metrics"]["answered"]["value"] for entry in found] == [1.0, 0.25, None]
    assert second.find(ROWS[0], "copy") is None
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


def test_a_result_belongs_to_its_cache_whatever_the_cache_is_called(tmp_path: Path) -> None:
    results = open_results(tmp_path / "a.json", IDENTITY, {})
    results.add(ROWS[1], "recall", measured(0.5))
    renamed = Row("Look", "small", ROWS[1].cache)
    (entry,) = results.of((renamed, ROWS[2]), ("recall",))
    assert (entry["label"], entry["point"]) == ("Look", "small")


def test_results_of_other_settings_are_not_joined(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    open_results(path, IDENTITY, {}).add(ROWS[0], "recall", measured(1.0))
    other = {**IDENTITY, "settings": {"context": 128, "seed": 7}}
    with pytest.raises(ConfigError, match=r"another settings \(\{'seed': 0\}, now \{'seed': 7\}\).*--fresh"):
        open_results(path, other, {})
    with pytest.raises(ConfigError, match="another model"):
        open_results(path, {**IDENTITY, "model": "xyz"}, {})
    assert open_results(path, other, {}, fresh=True).entries == []


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda text: text[: len(text) // 2], "is damaged"),
        (lambda text: "[]", "no results of format 1"),
        (lambda text: text.replace('"format": 1', '"format": 0'), "no results of format 1"),
        (lambda text: text.replace('"metrics"', '"matrics"'), "damaged: result 0 lacks"),
        (lambda text: text.replace('"identity"', '"identify"'), "lacks an identity"),
    ],
)
def test_a_damaged_file_is_refused_and_says_what_to_do(tmp_path: Path, damage: Any, message: str) -> None:
    path = tmp_path / "a.json"
    open_results(path, IDENTITY, {}).add(ROWS[0], "recall", measured(1.0))
    path.write_text(damage(path.read_text()))
    with pytest.raises(ConfigError, match=f"{message}.*--fresh"):
        open_results(path, IDENTITY, {})


def test_a_file_of_other_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="damaged"):
        read_results(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_results(tmp_path / "none.json")


def entries() -> list[dict[str, Any]]:
    """Recall under the three caches, the larger first of those swept."""
    made = [(ROWS[0], 1.0, 4000), (ROWS[2], 0.5, 1000), (ROWS[1], 0.25, 500)]
    return [
        {"label": row.label, "point": row.point, "cache": repr(row.cache), "task": "recall", **measured(value, held)}
        for row, value, held in made
    ]


def test_curves_run_by_bytes_and_heatmaps_hold_what_was_swept() -> None:
    assert curves(entries(), "recall") == {
        "Full": [(4000.0, 1.0, 0.1)],
        "TOVA": [(500.0, 0.25, 0.1), (1000.0, 0.5, 0.1)],
    }
    assert heatmaps(entries()) == {"TOVA": (["16", "8"], ["0", "1"], [[0.5, 1.0], [0.25, 1.0]])}


def test_the_table_has_a_line_per_cache_and_no_columns_of_tasks_that_nobody_ran() -> None:
    titles, lines = table(entries())
    assert titles == ["cache", "of the first", "kB held", "kB read a step", "recall", "tokens/s"]
    assert lines[0] == ["Full", "100%", "4", "4", "100% ±10", "2,500"]
    assert lines[2][:2] == ["TOVA 8", "12%"]


def test_the_page_tells_the_command_the_machine_and_every_cache() -> None:
    settings = {"context": 128, "batch": 4, "seed": 0, "text_rows": 1, "recall_count": 2, "depths": [0, 1]}
    settings |= {"tracking_count": 1, "hops": [2], "copy_count": 1}
    identity = {"settings": settings, "parameters": 1234, "dtype": "float32"}
    about = {"model": "demo", "date": "2026-01-01", "processor": "CPU", "cores": 2, "platform": "Linux"}
    about |= {
        "load_before": 0.5,
        "python": "3.11",
        "versions": {"jax": "0.10"},
        "command": "python scripts/evaluate.py",
    }
    page = markdown(entries(), identity, about, ["a_quality.png"])
    for part in ("`python scripts/evaluate.py`", "CPU, 2 cores", "jax 0.10", "| TOVA 16 |", "(a_quality.png)", "1,234"):
        assert part in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert json.dumps(rows).count("TOVA 8 |") == 2  # in the table, and by depth
