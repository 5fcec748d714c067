"""Layers that read the keys and values of an earlier one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import kvjax
from kvjax.convert import cla, to_cla
from kvjax.errors import CheckpointError, ConfigError
from tests.convert.converted import CALIBRATION, SUMS, check_decodes, logits, small


def test_one_layer_to_a_set_is_the_model_itself() -> None:
    model = small(num_layers=3)
    same, report = cla.convert(model, 1, CALIBRATION)
    assert same.config == model.config
    np.testing.assert_allclose(logits(same), logits(model), atol=SUMS)
    assert report.loss_after == report.loss_before
    assert report.bytes_after == report.bytes_before


@pytest.mark.parametrize(
    ("share", "owners", "held"), [(2, (0, 0, 2, 2, 4), 3), (3, (0, 0, 0, 3, 3), 2), (9, (0,) * 5, 1)]
)
def test_owners_keep_their_weights_and_readers_have_none(share: int, owners: tuple[int, ...], held: int) -> None:
    model = small(num_layers=5, qk_norm=True)
    after, report = cla.convert(model, share)
    assert after.config.owners == owners
    for layer, owner in enumerate(owners):
        old, new = (each.params[f"layers_{layer}"]["attention"] for each in (model, after))
        gone = set() if owner == layer else {"k", "v", "k_norm"}
        assert set(new) == set(old) - gone
        jax.tree.map(np.testing.assert_array_equal, new, {name: old[name] for name in new})
        assert bool(report.layers[layer].bytes_after) == (owner == layer)
    assert report.bytes_after * 5 == report.bytes_before * held
    assert report.bytes_after == kvjax.plan(after.config).bytes_per_token


@pytest.mark.slow
def test_a_shared_model_decodes_is_kept_by_orbax_and_has_no_other_form(tmp_path: Path) -> None:
    after = to_cla(small(num_layers=4))
    check_decodes(after)
    kvjax.save(after, tmp_path / "out")
    np.testing.assert_array_equal(logits(kvjax.load(tmp_path / "out")), logits(after))
    with pytest.raises(CheckpointError, match=r'owners=\(0, 0, 2, 2\) cannot be written .* format="orbax"'):
        kvjax.save(after, tmp_path / "hf", "safetensors")


@pytest.mark.parametrize(
    ("fields", "share", "message"),
    [
        ({}, 0, "share must be an integer of at least 1 .* got 0"),
        ({}, 1.5, "got 1.5"),
        ({"windows": (6, None)}, 2, "layer 1, which sees None positions, read layer 0, which sees 6"),
    ],
)
def test_bad_arguments_are_refused_by_name(fields: dict[str, Any], share: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_cla(small(**fields), share)
