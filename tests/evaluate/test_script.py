"""scripts/evaluate.py from end to end: results, table, page and pictures, and a second run that has nothing to do."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

import kvjax
from kvjax.errors import ConfigError
from kvjax.evaluate.suite import Suite
from tests.evaluate.tiny import SETTINGS, model

ROOT = Path(__file__).resolve().parents[2]
CACHES = """
[[cache]]
policy = "Full"
[[cache]]
policy = { name = "SlidingWindow", window = [16, 32] }
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module."""
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("evaluate_script", ROOT / "scripts" / "evaluate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(script: ModuleType, tmp_path: Path) -> object:
    """A tiny model on disk, three caches, one task."""
    kvjax.save(dataclasses.replace(model(), files=()), tmp_path / "model", format="safetensors")
    (tmp_path / "caches.toml").write_text(CACHES)
    return script.Arguments(
        model=tmp_path / "model",
        caches=tmp_path / "caches.toml",
        out=tmp_path / "out" / "tiny",
        settings=dataclasses.replace(SETTINGS, tasks=("recall",)),
        compilation_cache=False,  # the tests have one of their own
    )


def test_a_run_writes_its_results_and_a_second_has_nothing_to_do(
    script: ModuleType, arguments: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    script.main(arguments)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"tiny.json", "tiny.md", "tiny_quality.png", "tiny_recall.png"}
    assert "SlidingWindow 16" in capsys.readouterr().out
    written = (tmp_path / "out" / "tiny.json").read_text()
    document = json.loads(written)
    assert [(entry["label"], entry["point"], entry["task"]) for entry in document["results"]] == [
        ("Full", "", "recall"),
        ("SlidingWindow", "16", "recall"),
        ("SlidingWindow", "32", "recall"),
    ]
    # A path of one machine is nobody's business.
    assert str(tmp_path) not in written + (tmp_path / "out" / "tiny.md").read_text()

    def refuse(self: Suite, task: str, cache: kvjax.CacheConfig) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Suite, "measure", refuse)
    script.main(arguments)
    assert (tmp_path / "out" / "tiny.json").read_text() == written


def test_an_unknown_label_and_a_missing_module_are_refused(
    script: ModuleType, arguments: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ConfigError, match="no cache is labelled 'TOVA'.*Full, SlidingWindow"):
        script.main(dataclasses.replace(arguments, only=("TOVA",)))  # type: ignore[type-var]
    with pytest.raises(ConfigError, match="cannot import no_such_module"):
        script.main(dataclasses.replace(arguments, methods=("no_such_module",)))  # type: ignore[type-var]
    with pytest.raises(ConfigError, match="no results of these caches"):
        script.main(dataclasses.replace(arguments, draw=True))  # type: ignore[type-var]
