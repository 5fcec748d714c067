"""What tells one Hugging Face `model_type` from another: what its config leaves unsaid, and its tensors' names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from kvjax.config import ModelConfig
from kvjax.convert.hf_fields import Fields
from kvjax.convert.hf_names import LEAVES, LLAMA_NAMES, OUTSIDE
from kvjax.convert.hf_place import Part, Place
from kvjax.convert.hf_rope import read_rope, write_rope
from kvjax.convert.hf_windows import Windows
from kvjax.errors import CheckpointError

Values = dict[str, Any]
"""Keyword arguments of `ModelConfig`, or fields of a `config.json`."""


def nothing(*_: Any) -> Values:
    """A family that differs in nothing."""
    return {}


def all_used(config: ModelConfig, name: str) -> bool:
    """A family whose every tensor is a parameter."""
    return False


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`. As it stands it is read like a Llama; a family says what is different about it.

    Attributes:
      architecture: the class name in `architectures`.
      biases: on q, k and v "never", "qkv" always, or "config": `attention_bias` puts them on q, k, v and o.
      mlp_bias: the config's `mlp_bias` is honoured.
      windows: which layers see only a window.
      activation: what an absent name of the gate's activation means, and `activation_field`, the field that names it.
      kv_heads, head_dim, max_position_embeddings, norm_eps, attention_bias, tie_word_embeddings, bos_token_id,
        eos_token_id: what an absent field means (None for kv_heads: as many as query heads; for head_dim: hidden_size /
        num_attention_heads).
      values: arguments of `ModelConfig` that no field says.
      reads: fields that `read` or `rope` understands, though for other families they would ask for something unknown.
      read: (fields, the arguments so far) -> arguments of `ModelConfig` that are to replace or join them.
      write: (config, its `extra`) -> the fields that `read` reads.
      rope: (fields, max_position_embeddings) -> the rotary arguments of `ModelConfig`.
      write_rope: (config, whether in transformers 5's form) -> the fields that `rope` reads.
      names: where the parameters of a layer are. A key is a module of `kvjax.models`, its value the module of the
        checkpoint that has the same parameters (kernels transposed), with {} for the number of an expert if there is a
        tensor per expert. Or a key is a single parameter, its value the tensor that holds it just as it is.
      parts: config -> for keys of `names` whose tensor holds several parameters, which part is theirs.
      unused: (config, name) -> whether decoding has no use for a tensor of that name.
    """

    model_type: str
    architecture: str
    biases: Literal["never", "qkv", "config"] = "never"
    mlp_bias: bool = False
    windows: Windows = Windows()
    activation: str = "silu"
    activation_field: str = "hidden_act"
    kv_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 32768
    norm_eps: float = 1e-6
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reads: frozenset[str] = frozenset()
    read: Callable[[Fields, Values], Values] = nothing
    write: Callable[[ModelConfig, Values], Values] = nothing
    rope: Callable[[Fields, int], Values] = read_rope
    write_rope: Callable[[ModelConfig, bool], Values] = write_rope
    names: Mapping[str, str] = dataclasses.field(default_factory=lambda: LLAMA_NAMES)
    parts: Callable[[ModelConfig], Mapping[str, Part]] = nothing
    unused: Callable[[ModelConfig, str], bool] = all_used

    def place(self, config: ModelConfig, path: tuple[str, ...]) -> Place:
        """Where the parameter at `path` lies, e.g. ("layers_3", "attention", "q", "weight") in
        "model.layers.3.self_attn.q_proj.weight"."""
        *modules, leaf = path
        first, module = modules[0], "/".join(modules[1:])
        if first in OUTSIDE and not module and leaf in LEAVES:
            return Place((f"{OUTSIDE[first]}.{LEAVES[leaf]}",), transposed=leaf == "kernel")
        prefix = f"model.layers.{first.removeprefix('layers_')}."
        exact = f"{module}/{leaf}"
        if first.startswith("layers_") and exact in self.names:
            return Place((prefix + self.names[exact],), part=self.parts(config).get(exact))
        if not first.startswith("layers_") or module not in self.names or leaf not in LEAVES:
            raise CheckpointError(
                f"parameter {'/'.join(path)} has no name in a Hugging Face checkpoint of model_type "
                f'{self.model_type!r}; save with format="orbax"'
            )
        name, part = f"{prefix}{self.names[module]}.{LEAVES[leaf]}", self.parts(config).get(module)
        if "{}" not in name:
            return Place((name,), transposed=leaf == "kernel", part=part)
        assert config.experts is not None
        each = tuple(name.format(number) for number in range(config.experts.count))
        return Place(each, stacked=True, transposed=leaf == "kernel", part=part)
