"""`scripts/convert.py` says what it did and writes what can be loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvjax
from kvjax.errors import ConfigError
from scripts.convert import Arguments, calibration, main

DEMO = Path(__file__).resolve().parent.parent.parent / "models" / "demo"


def test_a_converted_model_is_told_about_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(Arguments(DEMO, tmp_path / "out", "cla"))
    said = capsys.readouterr().out
    assert "CLA, 2 layers to a set of keys and values" in said
    assert "3,072" in said  # bytes of a token before, and after:
    assert "1,536" in said
    assert "orbax" in said
    again = kvjax.load(tmp_path / "out", dtype="auto")
    assert again.config.owners == (0, 0, 2, 2, 4, 4)
    assert again.dtype == "bfloat16"


def test_text_is_read_in_windows_spread_over_all_files(tmp_path: Path) -> None:
    for number in (0, 1):
        (tmp_path / f"{number}.txt").write_text(str(number) * 100)
    model = kvjax.load(DEMO)
    files = (tmp_path / "0.txt", tmp_path / "1.txt")
    rows = calibration(model, Arguments(DEMO, tmp_path, "cla", text=files, rows=4, length=20))
    assert rows is not None
    np.testing.assert_array_equal(rows, np.repeat([[48], [48], [49], [49]], 20, axis=1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"to": "mla"}, "--kv-lora-rank and --rope-head-dim"),
        ({"to": "gqa", "text": (Path("nowhere.txt"),)}, "cannot read --text"),
        ({"to": "gqa", "text": (DEMO / "config.json",), "length": 10**6}, "less than one window of 1000000"),
        ({"to": "gqa", "text": (DEMO / "config.json",), "rows": 0}, "--rows must be at least 1"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_written(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        main(Arguments(DEMO, tmp_path / "out", **given))
    assert not (tmp_path / "out").exists()
