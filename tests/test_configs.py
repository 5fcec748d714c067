"""The shapes under configs/: each is the published model, down to its number of weights."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from kvjax import KVSpec, ModelConfig
from kvjax.convert.families import FAMILIES
from kvjax.model import parameter_shapes
from kvjax.plan import plan, read_shape

FOLDER = Path(__file__).resolve().parent.parent / "configs"
# The list of caches to compare and the run of fine-tuning hold no model of their own; other tests read them.
FILES = sorted(
    path.name
    for path in FOLDER.glob("*.toml")
    if path.name not in ("evaluate.toml", "evaluate_all.toml", "finetune.toml")
)
# Weights (tied ones once) and bytes per token in the checkpoint's dtype.
PUBLISHED = {
    "llama-2-7b.toml": (6_738_415_616, 524_288),
    "llama-2-13b.toml": (13_015_864_320, 819_200),
    "llama-3.1-8b.toml": (8_030_261_248, 131_072),
    "qwen2.5-7b.toml": (7_615_616_512, 57_344),
    "qwen3-0.6b.toml": (596_049_920, 114_688),
    "mistral-7b.toml": (7_241_732_096, 131_072),
    "deepseek-v2-lite.toml": (15_706_484_224, 31_104),
    "deepseek-v3.toml": (671_026_419_200, 70_272),
}


@pytest.mark.parametrize("name", FILES)
def test_every_file_reads_and_can_be_planned_for(name: str) -> None:
    shape = read_shape(FOLDER / name)
    cost = plan(shape, context=1024)
    assert cost.total_bytes > 0
    assert cost.elements_per_token == (shape if isinstance(shape, KVSpec) else shape.kv_spec).elements_per_token


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_known_shape_has_as_many_weights_and_bytes_per_token_as_published(name: str) -> None:
    config = ModelConfig.from_toml(FOLDER / name)
    weights, bytes_per_token = PUBLISHED[name]
    assert sum(leaf.size for leaf in jax.tree.leaves(parameter_shapes(config))) == weights
    assert plan(config).bytes_per_token == bytes_per_token
    assert config.family in FAMILIES


def test_equal_files_give_equal_hashes() -> None:
    one, other = (ModelConfig.from_toml(FOLDER / "llama-3.1-8b.toml") for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
