"""scripts/recipe.py at a tiny size: pieces are done once, the table is whole, healing keeps to its share."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import kvjax
from kvjax.errors import CheckpointError, ConfigError
from kvjax.train import recipe_work
from kvjax.train.data import is_held_out
from kvjax.train.from_scratch import train_from_scratch
from kvjax.train.pieces import Pieces
from kvjax.train.recipe_file import SISTER, RecipeFile, tokens_of
from kvjax.train.recipe_table import loss_table, rows_of
from kvjax.train.tokenizer import END_ID
from scripts.recipe import Arguments, main

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TOML = """
[model]
vocab_size = 260
hidden_size = 32
intermediate_size = 48
num_layers = 2
num_heads = 4
num_kv_heads = 4
head_dim = 8
max_position_embeddings = 64
dtype = "bfloat16"
[train]
steps = 20
warmup = 2
decay = 10
phases = [[0, 2, 64, 1.0, 0.0]]
[healing]
steps = 2
batch_size = 1
length = 64
learning_rate = 1e-3
seeds = [0, 1]
[calibration]
rows = 4
length = 32
[held_out]
windows = 4
[speed]
batch = 1
prompts = [4]
steps = 2
rounds = 2
"""
ONE = """
[[conversions]]
name = "GQA-2"
to = "gqa"
kv_heads = 2
"""
TWO = """
[[conversions]]
name = "MLA"
to = "mla"
kv_lora_rank = 24
rope_head_dim = 8
[[conversions]]
name = "MLA, folded"
to = "mla"
kv_lora_rank = 24
rope_head_dim = 8
freq_fold = 2
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    names = [f"module_{i}.py" for i in range(60)]
    assert any(map(is_held_out, names))
    for i, name in enumerate(names):
        (folder / name).write_text(f"def function_{i}(x):\n    return x + {i}\n" * 12)
    return folder


def arguments(tmp_path: Path, corpus: Path, text: str) -> Arguments:
    (tmp_path / "recipe.toml").write_text(text)
    return Arguments(tmp_path / "recipe.toml", tmp_path / "run", corpus, tmp_path / "out")


@pytest.mark.slow
def test_a_run_that_was_cut_short_goes_on_and_makes_a_whole_table(tmp_path, corpus, monkeypatch):
    given = arguments(tmp_path, corpus, TOML + TWO)
    done: list[str] = []
    once = Pieces.once

    def counted(self, name, work):
        def noted():
            if name == "speed" and "speed" not in done:
                done.append(name)
                raise KeyboardInterrupt
            done.append(name)
            return work()

        return once(self, name, noted)

    monkeypatch.setattr(Pieces, "once", counted)
    with pytest.raises(KeyboardInterrupt):
        main(given)
    partial = json.loads((tmp_path / "out.json").read_text())
    assert "sister" in partial["pieces"]
    assert "speed" not in partial["pieces"]
    main(given)
    # The piece that was cut short was begun twice, every other one once.
    assert sorted(done) == sorted([*set(done), "speed"])
    main(given)
    assert len(done) == len(set(done)) + 1

    table = json.loads((tmp_path / "out.json").read_text())
    assert set(table["pieces"]) == set(done)
    # MLA, folded or not, is one architecture: it is trained from scratch once.
    assert sum(name.startswith("scratch/") for name in done) == 2
    rows = rows_of(RecipeFile.from_toml(given.config), table["pieces"])
    assert [row.name for row in rows] == [SISTER, "MLA", "MLA, folded"]
    assert rows[1].scratch == rows[2].scratch
    for row in rows[1:]:
        assert [len(one.losses) for one in row.healed.values()] == [2, 2]
        assert all(np.isfinite(row.gap(objective)) for objective in row.healed)
        assert row.speeds["4"]["tokens_per_second"] > 0
    # 4 heads of 8, keys and values, in 2 layers of 2 bytes each; 24 + 8 instead of 64.
    assert [row.bytes for row in rows] == [256, 128, 128]
    assert not any("| - " in line for line in loss_table(rows[1:]))
    assert (tmp_path / "out.png").stat().st_size > 10_000
    healed = [piece for name, piece in table["pieces"].items() if name.startswith("heal/")]
    assert all(piece["tokens"] <= 0.05 * table["pieces"]["sister"]["tokens"] for piece in healed)
    scratch = table["pieces"]["scratch/MLA"]["tokens"]
    assert scratch == table["pieces"]["sister"]["tokens"] + healed[0]["tokens"]


def test_training_that_was_cut_short_ends_as_if_it_was_not(tmp_path):
    (tmp_path / "recipe.toml").write_text(TOML + ONE)
    file = RecipeFile.from_toml(tmp_path / "recipe.toml")
    recipe = dataclasses.replace(file.train, steps=4, decay=2)
    code = np.random.default_rng(0).integers(0, 256, 2000).astype(np.int32)

    def stop(step: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    whole = train_from_scratch(file.model, recipe, code, END_ID, tmp_path / "whole.npz")
    with pytest.raises(KeyboardInterrupt):
        train_from_scratch(file.model, recipe, code, END_ID, tmp_path / "cut.npz", save_every=0, report=stop)
    steps: list[int] = []
    resumed = train_from_scratch(
        file.model, recipe, code, END_ID, tmp_path / "cut.npz", report=lambda step, loss: steps.append(step)
    )
    assert steps == [3, 4]
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)


def test_the_recipe_of_the_repository_heals_on_a_twentieth_and_pairs_models_of_equal_bytes():
    file = RecipeFile.from_toml(CONFIGS / "recipe.toml")
    assert file.healing.tokens <= 0.05 * file.training_tokens
    more = tokens_of(file.from_scratch) - file.training_tokens - file.healing.tokens
    assert 0 <= more < file.train.phases[-1].rows * file.train.phases[-1].length
    held = {}
    # Layers are alike: two say it.
    model = kvjax.init(dataclasses.replace(file.model, num_layers=2), dtype="float32")
    for conversion in file.conversions:
        after, report = conversion.apply(model, None)
        held[conversion.name] = report.bytes_after
        assert after.config != model.config
    assert held["MLA, 64 + 64"] == held["GQA-2, mean"] == held["GQA-2, SVD"] == held["CLA-2"]
    assert held["MLA, 32 + 32"] == held["MQA, mean"] == held["MQA, SVD"]


def test_turns_are_timed_for_every_model_and_compared_within_a_turn(tmp_path):
    (tmp_path / "recipe.toml").write_text(TOML + ONE)
    model = kvjax.init(RecipeFile.from_toml(tmp_path / "recipe.toml").model, dtype="float32")
    found = recipe_work.decode_speeds({"one": model, "other": model}, "one", 1, 4, 2, 3)
    assert found["one"]["ratio"] == 1.0
    assert found["other"]["ratio"] > 0


@pytest.mark.parametrize(
    "change, match",
    [
        (("steps = 2\n", "steps = 3\n"), "reads 192 tokens.*128 are allowed, 5% of the 2560"),
        (('to = "gqa"', 'to = "mqa"'), "'GQA-2'.*gqa, mla or cla"),
        (('name = "GQA-2"', 'name = "MHA"'), "names of their own"),
        (("[healing]", "[heal]"), r"no place for \[heal\]"),
        (("kv_heads = 2", "heads = 2"), "unknown key 'heads'"),
        (("seeds = [0, 1]", "seeds = []"), "needs a seed"),
        (("rounds = 2", "rounds = 0"), "positive numbers"),
    ],
)
def test_a_file_that_says_what_cannot_be_is_refused(tmp_path, change, match):
    text = TOML + ONE
    assert change[0] in text
    (tmp_path / "recipe.toml").write_text(text.replace(*change))
    with pytest.raises(ConfigError, match=match):
        RecipeFile.from_toml(tmp_path / "recipe.toml")


def test_results_of_other_settings_or_damaged_ones_are_refused(tmp_path):
    path = tmp_path / "pieces.json"
    pieces = Pieces(path, {"train": {"steps": 1}}, {})
    assert pieces.once("a", lambda: {"x": 1})["x"] == 1
    again = Pieces(path, {"train": {"steps": 1}}, {})
    assert again.once("a", lambda: pytest.fail("done before"))["x"] == 1
    with pytest.raises(ConfigError, match=r"another \[train\]"):
        Pieces(path, {"train": {"steps": 2}}, {})
    path.write_text("{")
    with pytest.raises(CheckpointError, match="move it away"):
        Pieces(path, {}, {})
