"""Attention on eight virtual CPU devices: what one device computes, and no keys, values or pools handed round."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.devices import observed

FIRST = ("training both", "generation both")
PROGRAM = "tests.distributed.eight_devices_attending"


@pytest.fixture(scope="module")
def first() -> dict[str, Any]:
    return observed(PROGRAM, *FIRST)


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    return observed(PROGRAM)


def check_training(found: dict[str, Any]) -> None:
    """1e-5 of the loss and of the largest gradient: the same float32 sums in another order."""
    assert found["apart"]
    assert found["loss"] < 1e-5
    assert found["gradients"] < 1e-5


def check_generation(found: dict[str, Any], apart: bool = True) -> None:
    """1e-5 of logits of order one: the same float32 sums in another order. `apart`: each device attends by itself."""
    assert found["apart"] == apart
    assert 0.1 < found["size"] < 10
    assert found["logits"] < 1e-5
    assert not found["pools moved"]


def test_training_on_a_mesh_is_training_on_one_device(first: dict[str, Any]) -> None:
    check_training(first["training both"])
    assert not first["training both"]["moved"]


def test_decoding_on_a_mesh_is_decoding_on_one_device(first: dict[str, Any]) -> None:
    check_generation(first["generation both"])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["data", "tensor", "all", "scanned", "few KV heads", "one KV head", "odd rows"])
def test_training_on_any_mesh_is_training_on_one_device(seen: dict[str, Any], case: str) -> None:
    check_training(seen[f"training {case}"])
    # Where KV heads do not divide, query heads are made whole; they have the keys' shape.
    assert case == "few KV heads" or not seen[f"training {case}"]["moved"]


@pytest.mark.slow
@pytest.mark.parametrize("case", [
    "data", "tensor", "all", "few KV heads", "one KV head", "streaming int8", "a row per head", "kivi", "quest", "dmc",
])  # fmt: skip
def test_decoding_on_any_mesh_over_any_cache_is_that_on_one_device(seen: dict[str, Any], case: str) -> None:
    check_generation(seen[f"generation {case}"])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data", "both"])
def test_codes_that_no_kernel_reads_are_on_a_mesh_what_they_are_on_one_device(seen: dict[str, Any], mesh: str) -> None:
    # Read in plain products, which the compiler parts.
    check_generation(seen[f"generation kvquant {mesh}"], apart=False)


@pytest.mark.slow
def test_a_live_state_stays_where_it_lies(seen: dict[str, Any]) -> None:
    assert seen["lives"]["tokens"] == [True, True]
    assert seen["lives"]["pool"] == [83, 1, 1, 4, 12]
    assert seen["lives"]["compiled again"] == 0
