"""The progress bar is drawn for large checkpoints on a terminal, and never otherwise."""

from __future__ import annotations

import sys

import pytest

from kvjax.convert.progress import SHOWN_FROM_BYTES, progress


@pytest.mark.parametrize(
    ("terminal", "total", "drawn"),
    [(True, SHOWN_FROM_BYTES, True), (True, SHOWN_FROM_BYTES - 1, False), (False, SHOWN_FROM_BYTES, False)],
)
def test_only_large_checkpoints_on_a_terminal_show_progress(
    terminal: bool, total: int, drawn: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with progress("loading something", total) as advance:
        advance(total // 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("loading something" in captured.err) == drawn
