"""Which parameter dimension is split over which mesh axis: pure functions of a config and axis sizes."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from kvjax.config import MeshConfig, ModelConfig
from kvjax.distributed import AxisRules, as_mesh, make_mesh, parameter_shardings, partition_specs
from kvjax.errors import ConfigError
from kvjax.model import parameter_shapes

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    qk_norm=True,
)


def test_the_default_splits_heads_mlp_and_vocabulary_over_tensor() -> None:
    specs = partition_specs(CONFIG, {"data": 4, "tensor": 2})
    layer = specs["layers_1"]
    outputs, inputs, replicated = (
        PartitionSpec("tensor", None),
        PartitionSpec(None, "tensor"),
        PartitionSpec(None),
    )
    assert specs["embed"]["embedding"] == outputs
    assert specs["head"]["weight"] == outputs
    for projection in ("q", "k", "v"):
        assert layer["attention"][projection] == {"weight": outputs, "bias": PartitionSpec("tensor")}
    assert layer["attention"]["o"] == {"weight": inputs, "bias": replicated}
    for projection in ("gate", "up"):
        assert layer["mlp"][projection] == {"weight": outputs, "bias": PartitionSpec("tensor")}
    assert layer["mlp"]["down"] == {"weight": inputs, "bias": replicated}
    for norm in (layer["attention_norm"], layer["mlp_norm"], layer["attention"]["q_norm"], specs["norm"]):
        assert norm == {"scale": replicated}


def test_few_kv_heads_and_odd_vocabularies_are_replicated() -> None:
    specs = partition_specs(CONFIG, {"tensor": 4})
    assert specs["layers_0"]["attention"]["q"]["weight"] == PartitionSpec("tensor", None)
    assert specs["layers_0"]["attention"]["k"]["weight"] == PartitionSpec(None, None)
    assert specs["layers_0"]["attention"]["v"]["bias"] == PartitionSpec(None)
    assert specs["embed"]["embedding"] == PartitionSpec(None, None)  # 50 rows over 4 devices


@pytest.mark.parametrize(
    ("rules", "sizes", "message"),
    [
        # 4 heads of 8 channels: 8 divides the 32 channels, but would cut heads in two.
        (AxisRules(), {"tensor": 8}, r"heads \(4\) cannot be split 8 ways over mesh axis 'tensor'"),
        (AxisRules(heads=None), {"tensor": 5}, r"mlp \(48\) cannot be split 5 ways"),
        (AxisRules(embed="data"), {"data": 3, "tensor": 2}, r"embed \(32\) cannot be split 3 ways"),
        (AxisRules(embed="tensor"), {"tensor": 2}, "splits two dimensions of .* over mesh axis 'tensor'"),
    ],
)
def test_other_axes_that_do_not_divide_are_refused(rules: AxisRules, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        partition_specs(CONFIG, sizes, rules)


def test_axes_the_mesh_lacks_are_replicated() -> None:
    specs = partition_specs(CONFIG, {"data": 8})
    assert all(not any(spec) for spec in jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)))


def test_stacked_parameters_have_a_layer_axis_in_front() -> None:
    rules = AxisRules(embed="data", layers="stage")
    specs = partition_specs(CONFIG, {"data": 2, "tensor": 2, "stage": 2}, rules, scan=True)
    assert specs["layers"]["attention"]["q"]["weight"] == PartitionSpec("stage", "tensor", "data")
    assert specs["layers"]["mlp"]["down"]["bias"] == PartitionSpec("stage", "data")
    assert specs["embed"]["embedding"] == PartitionSpec("tensor", "data")


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"qk_norm": False, "qkv_bias": False}])
def test_every_parameter_has_a_spec_of_its_rank(changes: dict[str, bool], scan: bool) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    shapes = parameter_shapes(config, scan)
    shardings = parameter_shardings(config, make_mesh(), scan=scan)
    ranks = jax.tree.map(lambda shape, sharding: len(shape.shape) == len(sharding.spec), shapes, shardings)
    assert all(jax.tree.leaves(ranks))


def test_axes_are_automatic_whatever_the_mesh_was_made_with() -> None:
    assert set(make_mesh().axis_types) == {AxisType.Auto}
    explicit = jax.make_mesh((1,), ("tensor",), axis_types=(AxisType.Explicit,))
    assert set(as_mesh(explicit).axis_types) == {AxisType.Auto}
    assert as_mesh(explicit).axis_names == ("tensor",)
    assert isinstance(as_mesh(MeshConfig(("tensor",), (-1,))), Mesh)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(("data", "tensor"), (1024, 1)), "needs 1024 devices, there are"),
        (MeshConfig(("data", "tensor"), (1024, -1)), "leave no whole axis of"),
        ("tensor", "mesh must be None, a kvjax MeshConfig or a jax.sharding.Mesh, got 'tensor'"),
    ],
)
def test_meshes_that_cannot_be_are_refused(mesh: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        as_mesh(mesh)
