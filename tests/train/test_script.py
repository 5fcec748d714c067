"""scripts/finetune.py from end to end: a run from a file, its folder, and a second start that has nothing to do."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import kvjax
from kvjax.errors import ConfigError
from kvjax.train.tokenizer import byte_tokenizer
from scripts.finetune import Arguments, main, read_log

TOML = """
model = "model"
out = "out"
run = "run"
[finetune]
steps = 4
batch_size = 2
learning_rate = 1e-2
warmup = 0
[data]
files = ["*.txt"]
length = 16
[evaluation]
files = ["held_out.md"]
every = 2
rows = 2
policy = { name = "SlidingWindow", window = 8 }
[checkpoints]
every = 2
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    config = kvjax.ModelConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        eos_token_ids=(256,),
    )  # fmt: skip
    model = dataclasses.replace(kvjax.init(config, dtype="float32"), tokenizer=byte_tokenizer())
    kvjax.save(model, tmp_path / "model")
    for name in ("a.txt", "b.txt", "held_out.md"):
        (tmp_path / name).write_text(f"the text of {name}\n" * 9)
    (tmp_path / "run.toml").write_text(TOML)
    return tmp_path


@pytest.mark.slow
def test_a_run_from_a_file_is_logged_drawn_saved_and_not_done_twice(folder):
    main(Arguments(folder / "run.toml"))
    lines = read_log(folder / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "held_out" in line] == [2, 4]
    assert lines[-1]["held_out"] < lines[1]["held_out"]
    assert (folder / "run" / "loss.png").stat().st_size > 1000
    assert list((folder / "run" / "tensorboard").iterdir())
    out, run = kvjax.load(folder / "out"), kvjax.load(folder / "run")
    assert out.tokenizer is not None
    assert run.tokenizer is not None
    jax.tree.map(np.testing.assert_array_equal, out.params, run.params)

    main(Arguments(folder / "run.toml", plot=False))
    assert len((folder / "run" / "log.jsonl").read_text().splitlines()) == 4
    with (folder / "run" / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')
    assert read_log(folder / "run") == [json.loads(json.dumps(line)) for line in lines]


def test_a_model_without_a_tokenizer_is_refused(folder):
    (folder / "model" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        main(Arguments(folder / "run.toml"))
