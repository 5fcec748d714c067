"""Which benchmark `scripts/benchmark.py` becomes."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import benchmark


@pytest.mark.parametrize("here", benchmark.KINDS)
def test_the_default_device_decides_unless_a_kind_is_named(here: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "kind_here", lambda: here)
    for arguments, kind in ((["--out", "x"], here), ([], here), (["gpu", "--tiny"], "gpu"), (["cpu", "--help"], "cpu")):
        _, script, *rest = benchmark.command(arguments)
        assert Path(script).name == f"benchmark_{kind}.py"
        assert Path(script).is_file()
        assert rest == [x for x in arguments if x not in benchmark.KINDS]
