"""Logical axis rules: which mesh axis each kind of parameter dimension is split over.

A parameter's path gives the logical axes of its dimensions, `AxisRules` gives each logical axis a mesh axis, and both
together a `PartitionSpec`. The default splits heads, the MLP and the vocabulary over "tensor" (Shoeybi et al. 2019,
1909.08053) and replicates over every other mesh axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvjax.config import ModelConfig
from kvjax.errors import ConfigError
from kvjax.model import parameter_shapes
from kvjax.typing import Params

MAY_REPLICATE = ("kv_heads", "vocab")
"""Logical axes that are replicated, not refused, where the mesh axis does not divide them."""

LOGICAL_AXES: dict[tuple[str, ...], tuple[str | None, ...]] = {
    ("embed", "embedding"): ("vocab", "embed"),
    ("norm", "scale"): ("embed",),
    ("head", "weight"): ("vocab", "embed"),
    ("attention_norm", "scale"): ("embed",),
    ("mlp_norm", "scale"): ("embed",),
    ("attention", "q", "weight"): ("heads", "embed"),
    ("attention", "q", "bias"): ("heads",),
    ("attention", "k", "weight"): ("kv_heads", "embed"),
    ("attention", "k", "bias"): ("kv_heads",),
    ("attention", "v", "weight"): ("kv_heads", "embed"),
    ("attention", "v", "bias"): ("kv_heads",),
    ("attention", "o", "weight"): ("embed", "heads"),
    ("attention", "o", "bias"): ("embed",),
    ("attention", "key_merge", "weight"): ("kv_heads", None, None, None),
    ("attention", "q_norm", "scale"): (None,),
    ("attention", "k_norm", "scale"): (None,),
    ("attention_post_norm", "scale"): ("embed",),
    ("mlp_post_norm", "scale"): ("embed",),
    ("attention", "decay", "weight"): ("heads", "embed"),
    ("attention", "gate", "weight"): ("heads", "embed"),
    ("bridge", "norm", "scale"): ("embed",),
    ("bridge", "k", "weight"): ("kv_heads", "embed"),
    ("bridge", "k", "bias"): ("kv_heads",),
    ("bridge", "v", "weight"): ("kv_heads", "embed"),
    ("bridge", "v", "bias"): ("kv_heads",),
    ("attention", "sinks"): ("heads",),
    ("cross_norm", "scale"): ("embed",),
    ("cross_attention", "q", "weight"): ("heads", "embed"),
    ("cross_attention", "k", "weight"): ("kv_heads", None),
    ("cross_attention", "v", "weight"): ("kv_heads", None),
    ("cross_attention", "o", "weight"): ("embed", "heads"),
    ("attention", "q_down", "weight"): (None, "embed"),
    ("attention", "q_down", "bias"): (None,),
    ("attention", "q_up", "weight"): ("heads", None),
    ("attention", "kv_down", "weight"): (None, "embed"),
    ("attention", "kv_down", "bias"): (None,),
    ("attention", "kv_norm", "scale"): (None,),
    ("attention", "kv_up", "weight"): ("heads", None),
    ("embed_norm", "scale"): ("embed",),
    ("embed_norm", "bias"): ("embed",),
    ("norm", "bias"): ("embed",),
    ("attention_norm", "bias"): ("embed",),
    ("mlp_norm", "bias"): ("embed",),
    ("compress", "weight"): (None, "embed"),
    ("expand", "weight"): ("embed", None),
    ("time_mix", "shift_x"): ("embed",),
    ("time_mix", "shift"): (None, "embed"),
    ("time_mix", "shift_down"): ("embed", None),
    ("time_mix", "shift_up"): (None, None, "embed"),
    ("time_mix", "decay"): ("heads",),
    ("time_mix", "decay_down"): ("embed", None),
    ("time_mix", "decay_up"): (None, "heads"),
    ("time_mix", "second_down"): ("embed", None),
    ("time_mix", "second_up"): (None, "heads"),
    ("time_mix", "r", "weight"): ("heads", "embed"),
    ("time_mix", "k", "weight"): ("heads", "embed"),
    ("time_mix", "v", "weight"): ("heads", "embed"),
    ("time_mix", "norm", "scale"): ("heads",),
    ("time_mix", "norm", "bias"): ("heads",),
    ("time_mix", "o", "weight"): ("embed", "heads"),
    ("attention", "shift_x"): ("embed",),
    ("attention", "shift"): (None, "embed"),
    ("attention", "shift_down"): ("embed", None),
    ("attention", "shift_up"): (None, None, "embed"),
    ("attention", "source_shift_x"): ("embed",),
    ("attention", "source_shift"): (None, "embed"),
    ("attention", "source_shift_down"): ("embed", None),
    ("attention", "source_shift_up"): (None, None, "embed"),
    ("attention", "key_down"): ("embed", None),
    ("attention", "key_up"): (None, "embed"),
    ("attention", "value_down"): ("embed", None),
    ("attention", "value_up"): (None, "embed"),
    ("attention", "q_norm", "bias"): (None,),
    ("attention", "k_norm", "bias"): (None,),
    ("attention", "v_norm", "scale"): (None,),
    ("attention", "v_norm", "bias"): (None,),
    ("attention", "out_norm", "scale"): (None,),
    ("attention", "out_norm", "bias"): (None,),
    ("channel_mix", "shift"): (None, "embed"),
    ("channel_mix", "key", "weight"): ("mlp", "embed"),
    ("channel_mix", "receptance", "weight"): (None, "embed"),
    ("channel_mix", "value", "weight"): ("embed", "mlp"),
    ("mlp", "router", "gate", "weight"): (None, "embed"),
    ("mlp", "router", "gate", "bias"): (None,),
    ("mlp", "router", "selection_bias"): (None,),
    ("mlp", "experts_gate", "kernel"): ("experts", "embed", "expert_mlp"),
    ("mlp", "experts_up", "kernel"): ("experts", "embed", "expert_mlp"),
    ("mlp", "experts_down", "kernel"): ("experts", "expert_mlp", "embed"),
    ("mlp", "experts_gate_bias", "bias"): ("experts", "expert_mlp"),
    ("mlp", "experts_up_bias", "bias"): ("experts", "expert_mlp"),
    ("mlp", "experts_down_bias", "bias"): ("experts", "embed"),
    ("mlp", "shared", "gate", "weight"): ("shared_mlp", "embed"),
    ("mlp", "shared", "up", "weight"): ("shared_mlp", "embed"),
    ("mlp", "shared", "down", "weight"): ("embed", "shared_mlp"),
    ("mlp", "gate", "weight"): ("mlp", "embed"),
    ("mlp", "gate", "bias"): ("mlp",),
    ("mlp", "up", "weight"): ("mlp", "embed"),
    ("mlp", "up", "bias"): ("mlp",),
    ("mlp", "down", "weight"): ("embed", "mlp"),
    ("mlp", "down", "bias"): ("embed",),
}


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """The mesh axis of each logical axis; None, or an axis the mesh does not have, means replicated.

    Heads are never cut: `heads` and `kv_heads` count heads, not channels. Where the mesh axis does not divide them,
    `kv_heads` and `vocab` are replicated (few key-value heads and odd vocabularies are common, and both stay right);
    any other logical axis is refused with `ConfigError`, because replicating it would cost the memory it should save.

    Attributes:
      embed: the residual stream's dimension; "data" gives fully sharded parameters.
      heads: query heads, in q's output and o's input.
      kv_heads: key-value heads, in the output of k and v.
      mlp: the feed-forward width; shared_mlp: that of the expert every token goes through.
      experts: the experts of a layer; expert_mlp: the width of each.
      vocab: rows of the embedding, columns of the head.
      layers: the leading axis of stacked parameters.
    """

    embed: str | None = None
    heads: str | None = "tensor"
    kv_heads: str | None = "tensor"
    mlp: str | None = "tensor"
    shared_mlp: str | None = "tensor"
    experts: str | None = "tensor"
    expert_mlp: str | None = None
    vocab: str | None = "tensor"
    layers: str | None = None


def logical_axes(path: tuple[str, ...]) -> tuple[str | None, ...]:
    """The logical axis of each dimension of the parameter at `path`, per layer or stacked.

    A context encoder is replicated: it is small beside its decoder, and has widths of its own.
    """
    if path[0] == "encoder":
        return (None,) * len(logical_axes(path[1:]))
    if path[0] == "layers":
        return ("layers", *logical_axes(path[1:]))
    inner = path[1:] if path[0].startswith("layers_") else path
    if inner not in LOGICAL_AXES:
        raise ConfigError(f"parameter {'/'.join(path)} has no logical axes; add it to LOGICAL_AXES in {__name__}")
    return LOGICAL_AXES[inner]


def partition_specs(
    config: ModelConfig, mesh_shape: Mapping[str, int], rules: AxisRules = AxisRules(), scan: bool = False
) -> Params:
    """A `PartitionSpec` per parameter.

    Args:
      mesh_shape: size of each mesh axis (`mesh.shape`).
      scan: the stacked layout of training, with a leading layer axis.

    Raises:
      ConfigError: a mesh axis does not divide a dimension that may not be replicated, or would split two of one array.
    """
    sizes = {
        "embed": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "mlp": config.intermediate_size,
        "shared_mlp": config.experts.shared_intermediate_size if config.experts else 0,
        "experts": config.experts.count if config.experts else 0,
        "expert_mlp": config.experts.intermediate_size if config.experts else 0,
        "vocab": config.vocab_size,
        "layers": config.num_layers,
    }
    chosen = {axis: _mesh_axis(axis, size, mesh_shape, rules) for axis, size in sizes.items()}

    def spec(path: tuple, leaf: jax.ShapeDtypeStruct) -> PartitionSpec:
        names = tuple(key.key for key in path)
        axes = [chosen[axis] if axis else None for axis in logical_axes(names)]
        used = [axis for axis in axes if axis]
        if len(set(used)) != len(used):
            raise ConfigError(
                f"{rules} splits two dimensions of {'/'.join(names)} over mesh axis {used[0]!r}; "
                "give one of them another axis or None"
            )
        return PartitionSpec(*axes)

    return jax.tree_util.tree_map_with_path(spec, parameter_shapes(config, scan))


def parameter_shardings(config: ModelConfig, mesh: Mesh, rules: AxisRules = AxisRules(), scan: bool = False) -> Params:
    """A `NamedSharding` per parameter; arguments and errors as `partition_specs`."""
    specs = partition_specs(config, mesh.shape, rules, scan)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def _mesh_axis(axis: str, size: int, mesh_shape: Mapping[str, int], rules: AxisRules) -> str | None:
    """The mesh axis that `axis` is split over, or None for replicated."""
    name = getattr(rules, axis)
    ways = mesh_shape.get(name, 1) if name else 1
    if ways == 1:
        return None
    if size % ways == 0:
        return str(name)
    if axis in MAY_REPLICATE:
        return None
    raise ConfigError(
        f"{axis} ({size}) cannot be split {ways} ways over mesh axis {name!r}; choose a mesh whose {name!r} size "
        f"divides {size}, or AxisRules({axis}=None) to replicate it"
    )
