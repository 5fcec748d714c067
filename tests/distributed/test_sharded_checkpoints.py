"""Checkpoints on eight virtual CPU devices: weights lie where the rules say and compute what one device computes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.convert.directories import HIDDEN, MLP, write_directory
from tests.distributed.devices import observed


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = write_directory(tmp_path_factory.mktemp("checkpoints") / "hf", num_hidden_layers=1)
    values = observed("tests.distributed.eight_devices", str(path))
    assert values["devices"] == 8
    return values


@pytest.mark.parametrize("mesh", ["2x4", "1x2"])
def test_loaded_weights_lie_where_the_rules_say_and_are_the_same(seen: dict[str, Any], mesh: str) -> None:
    assert seen[f"{mesh} placed"]
    assert seen[f"{mesh} equal"]
    assert seen[f"{mesh} mlp shard"] == [MLP // int(mesh[-1]), HIDDEN]


@pytest.mark.parametrize("mesh", ["2x4", "1x2"])
def test_a_device_holds_its_share_only(seen: dict[str, Any], mesh: str) -> None:
    # All but the norms is split; over four devices the two key-value heads are replicated too.
    assert seen[f"{mesh} bytes"] < seen["plain bytes"] * (0.56 if mesh == "1x2" else 0.4)


@pytest.mark.parametrize("mesh", ["2x4", "1x2", "own mesh"])
def test_sharded_logits_equal_those_of_one_device(seen: dict[str, Any], mesh: str) -> None:
    """1e-5 on logits of order one: float32 sums over 24 to 40 products, split in a different order."""
    assert 0.1 < seen["spread"] < 10
    assert seen[f"{mesh} logits"] < 1e-5


def test_orbax_restores_onto_another_mesh_than_it_was_saved_from(seen: dict[str, Any]) -> None:
    assert seen["moved placed"]
    assert seen["moved equal"]


def test_orbax_saved_from_a_mesh_restores_onto_one_device(seen: dict[str, Any]) -> None:
    assert seen["gathered equal"]
    assert seen["gathered devices"] == 1


def test_safetensors_written_from_a_mesh_hold_whole_tensors(seen: dict[str, Any]) -> None:
    assert seen["safetensors equal"]


def test_a_mesh_without_the_rules_axes_replicates(seen: dict[str, Any]) -> None:
    assert seen["own mesh bytes"] == seen["plain bytes"]


def test_a_mesh_that_would_cut_heads_is_refused(seen: dict[str, Any]) -> None:
    assert "heads (4) cannot be split 8 ways" in seen["refused"]
