"""The training path computes what transformers computes, from the same files, in both directions.

Tolerance 2e-4 on logits of order one: both sides round float32 sums of 32 to 48 products in different orders over two
layers, which was measured below 1e-5; a bias, window or rope setting that is lost moves logits by more than 0.1.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvjax.checkpoint import load, save
from kvjax.config import RopeScaling
from kvjax.model import Model
from tests.parity.cases import CASES, Case
from tests.parity.helpers import forward_logits, random_tokens, transformers_logits

TOLERANCE = 2e-4

LoadCase = Callable[[Case], tuple[Any, Model]]
BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_logits_equal_transformers(case: Case, load_case: LoadCase) -> None:
    theirs, ours = load_case(case)
    tokens = random_tokens()
    expected = transformers_logits(theirs, tokens)
    assert 0.1 < np.std(expected) < 10
    np.testing.assert_allclose(forward_logits(ours, tokens), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama-rope-linear", {"rope_scaling": RopeScaling()}),
        ("llama-rope-llama3", {"rope_scaling": RopeScaling()}),
        ("llama-rope-yarn", {"rope_scaling": RopeScaling()}),
        ("llama-gqa", {"rope_theta": 110.0}),
        ("qwen2-windows", {"windows": ()}),
        ("qwen3-layer-types", {"windows": (None, 5)}),
        ("mistral-window", {"windows": (10, 10)}),
        ("mixtral-window", {"windows": (10, 10)}),
        ("qwen3-moe-windows", {"windows": ()}),
        ("gemma2", {"windows": ()}),
        ("gemma2", {"query_scale": None}),
        ("gemma2", {"attention_soft_cap": None}),
        ("gemma2", {"logit_soft_cap": None}),
        ("gemma3", {"local_rope_theta": None}),
        ("gemma3-scaled", {"rope_scaling": RopeScaling()}),
        ("phi3-partial", {"rotary_fraction": 1.0}),
        ("phi3-longrope", {"rope_scaling": RopeScaling()}),
        ("deepseek-v2-yarn", {"query_scale": None}),
        ("gpt-oss", {"attention_sinks": False}),
    ],
)
def test_the_comparison_notices_a_setting_that_is_lost(name: str, changes: dict[str, Any], load_case: LoadCase) -> None:
    theirs, ours = load_case(BY_NAME[name])
    tokens = random_tokens()
    wrong = dataclasses.replace(ours, config=dataclasses.replace(ours.config, **changes))
    assert np.abs(forward_logits(wrong, tokens) - transformers_logits(theirs, tokens)).max() > 0.1


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3-moe", {"normalize": False}),
        ("mixtral", {"per_token": 1}),
        ("deepseek-v2", {"scaling_factor": 1.0}),
        ("deepseek-v2", {"groups": 1, "groups_per_token": 1}),
        ("deepseek-v3", {"selection_bias": False}),
        ("deepseek-v3", {"group_score": "max"}),
        ("deepseek-v3", {"scoring": "softmax"}),
        ("gpt-oss", {"limit": 7.0}),
    ],
)
def test_the_comparison_notices_another_choice_of_experts(
    name: str, changes: dict[str, Any], load_case: LoadCase
) -> None:
    theirs, ours = load_case(BY_NAME[name])
    tokens = random_tokens()
    assert ours.config.experts is not None
    experts = dataclasses.replace(ours.config.experts, **changes)
    wrong = dataclasses.replace(ours, config=dataclasses.replace(ours.config, experts=experts))
    assert np.abs(forward_logits(wrong, tokens) - transformers_logits(theirs, tokens)).max() > 0.1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_transformers_reads_what_save_writes_with_equal_logits(case: Case, load_case: LoadCase, tmp_path: Path) -> None:
    import torch
    import transformers

    theirs, ours = load_case(case)
    save(ours, tmp_path / "written", format="safetensors")
    kind = getattr(transformers, case.model_class)
    again, report = kind.from_pretrained(
        tmp_path / "written", attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    tokens = random_tokens()
    np.testing.assert_array_equal(transformers_logits(again.eval(), tokens), transformers_logits(theirs, tokens))


@pytest.mark.parametrize("name", [name for name in BY_NAME if "rope" in name])
def test_both_forms_of_rope_scaling_are_read_alike_and_written_for_transformers(
    name: str, load_case: LoadCase, tmp_path: Path
) -> None:
    import transformers

    theirs, ours = load_case(BY_NAME[name])
    theirs.save_pretrained(tmp_path / "old")
    file = tmp_path / "old" / "config.json"
    document = json.loads(file.read_text())
    table = document.pop("rope_parameters")
    document["rope_theta"] = table.pop("rope_theta")
    document["rope_scaling"] = {"type": table.pop("rope_type"), **table}
    file.write_text(json.dumps(document))
    old = load(tmp_path / "old", dtype="float32")
    assert dataclasses.replace(old.config, extra="{}") == dataclasses.replace(ours.config, extra="{}")
    save(old, tmp_path / "written", format="safetensors")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "written", attn_implementation="eager")
    tokens = random_tokens()
    np.testing.assert_array_equal(transformers_logits(again.eval(), tokens), transformers_logits(theirs, tokens))


def test_windows_shorter_than_the_sequence_are_among_the_cases(load_case: LoadCase) -> None:
    assert load_case(BY_NAME["mistral-window"])[1].config.windows == (9, 9)
    assert load_case(BY_NAME["qwen2-windows"])[1].config.windows == (None, 7)
    assert load_case(BY_NAME["qwen3-layer-types"])[1].config.windows == (5, None)
    assert load_case(BY_NAME["gemma2"])[1].config.windows == (7, None)
    assert load_case(BY_NAME["gemma3"])[1].config.windows == (6, 6, None)
    assert load_case(BY_NAME["gpt-oss"])[1].config.windows == (7, None)
