"""What a model is."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from kvjax.cache.layout import KVSpec
from kvjax.config.checks import check_choices, check_encoder, check_merged_keys, checked_owners
from kvjax.config.layers import Experts, GoldFinch, Latent, LayerKind
from kvjax.config.rope import RopeScaling
from kvjax.config.toml import build, read_toml
from kvjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: MHA, GQA, MQA or MLA with RoPE, RMSNorm, and SwiGLU or experts.

    Attributes:
      family: the Hugging Face `model_type` it is read from and written as.
      head_dim: per-head width; None means hidden_size / num_heads.
      windows: per layer, how many positions it sees (None: all). Empty means every layer sees all.
      qkv_bias: biases on q, k and v; o_bias, mlp_bias: on the output projection and the MLP.
      qk_norm: RMSNorm over head_dim on q and k before rotation (Qwen3); qk_norm_whole: over all heads at once (OLMo-2).
      activation: of the gate, "silu", "gelu" or "gelu_tanh".
      norm_placement: "pre" normalises what a block reads, "post" what it gives (OLMo-2), "sandwich" both (Gemma 2).
      norm_unit_offset: norms multiply by 1 + scale (Gemma).
      embedding_scale: factor on embeddings (Gemma: the root of hidden_size).
      query_scale: factor on attention scores; None: one over the root of the head's width.
      attention_soft_cap, logit_soft_cap: scores, logits x become cap * tanh(x / cap).
      attention_sinks: a learned logit per head that takes attention and gives nothing (gpt-oss).
      rope_interleaved: RoPE turns channels (2i, 2i + 1) together.
      rotary_fraction: the part of each head that RoPE turns, from its first channel on (Phi-3).
      local_rope_theta: RoPE base of windowed layers, which is then not scaled (Gemma 3); None: the same for all.
      latent: multi-head latent attention; head_dim then plays no part.
      merged_keys: heads that keys are projected to, before those of each of num_kv_heads groups are merged into one
        after RoPE by a matrix of the layer's own (Yu et al. 2024, 2406.07056); None: keys are as they are projected.
      experts: mixture of experts.
      owners: per layer, the layer whose keys and values it reads, itself or an earlier one that is its own owner (CLA,
        Brandon et al. 2024, 2405.12981). Empty means every layer has its own.
      retention_layers: layers with gated retention, a state of one size, in place of attention.
      cross_from: layers from this one on read one set of keys and values, made from the hidden state that this layer is
        given (YOCO, Sun et al. 2024, 2405.05254); a prompt's tokens but the last need not pass through them.
      goldfinch: recurrent layers, and above them attention to rebuilt keys; says itself what owners are.
      encoder: a small bidirectional model that reads chunks of context, which layers attend to (CEPE, Yen et al. 2024,
        2402.16617). It has no head and no window, and its layers are plain ones.
      context_chunk: tokens of one chunk at most; positions start from 0 in each.
      cross_layers: how many layers, the last ones, have cross-attention; None: all.
      dtype: the checkpoint's own dtype, "float32", "bfloat16" or "float16".
      eos_token_ids: tokens that end a text.
      extra: remaining fields of the checkpoint's config, kept as JSON so that saving writes them back.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int | None = None
    family: str = "llama"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    activation: str = "silu"
    norm_placement: str = "pre"
    norm_unit_offset: bool = False
    embedding_scale: float = 1.0
    query_scale: float | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    attention_sinks: bool = False
    rope_interleaved: bool = False
    rotary_fraction: float = 1.0
    local_rope_theta: float | None = None
    latent: Latent | None = None
    merged_keys: int | None = None
    experts: Experts | None = None
    owners: tuple[int, ...] = ()
    retention_layers: tuple[int, ...] = ()
    cross_from: int | None = None
    encoder: ModelConfig | None = None
    context_chunk: int = 256
    cross_layers: int | None = None
    goldfinch: GoldFinch | None = None
    tie_word_embeddings: bool = False
    windows: tuple[int | None, ...] = ()
    max_position_embeddings: int = 4096
    dtype: str = "float32"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    extra: str = "{}"

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or value <= 0:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_dim is None:
            if self.hidden_size % self.num_heads:
                raise ConfigError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}; set head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if not isinstance(self.head_dim, int) or self.head_dim <= 0 or self.head_dim % 2:
            raise ConfigError(f"head_dim must be a positive even integer (RoPE turns pairs), got {self.head_dim!r}")
        if not any(w is not None for w in self.windows):
            # As many as there are layers, also after `dataclasses.replace(config, num_layers=...)`.
            object.__setattr__(self, "windows", (None,) * self.num_layers)
        if len(self.windows) != self.num_layers:
            raise ConfigError(f"windows has {len(self.windows)} entries for {self.num_layers} layers")
        if any(w is not None and (not isinstance(w, int) or w <= 0) for w in self.windows):
            raise ConfigError(f"every window must be None or a positive integer, got {self.windows}")
        for name in ("owners", "retention_layers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_choices(self)
        object.__setattr__(self, "owners", checked_owners(self))
        check_encoder(self)
        check_merged_keys(self)
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype must be float32, bfloat16 or float16, got {self.dtype!r}")
        if not self.rope_theta > 1 or not math.isfinite(self.rope_theta):
            raise ConfigError(f"rope_theta must be finite and greater than 1, got {self.rope_theta}")

    @property
    def context_spec(self) -> KVSpec | None:
        """What the cache must hold of a context: one encoded vector per token, for all layers; None: no encoder."""
        if self.encoder is None:
            return None
        return KVSpec(1, 1, self.encoder.hidden_size, self.encoder.hidden_size, value_in_key=True)

    @property
    def width(self) -> int:
        """Per-head width, never None."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def key_heads(self) -> int:
        """Heads that keys are projected to: num_kv_heads, or more that are merged into as many."""
        return self.num_kv_heads if self.merged_keys is None else self.merged_keys

    @property
    def rotary_width(self) -> int:
        """Channels of a head that RoPE turns."""
        return self.latent.qk_rope_head_dim if self.latent else int(self.width * self.rotary_fraction)

    @property
    def owning_layers(self) -> tuple[int, ...]:
        """Layers with keys and values of their own, ascending; a layer's place here is its number in the cache."""
        return tuple(sorted(set(self.owners) - {-1})) if self.owners else tuple(range(self.num_layers))

    def cache_layer(self, layer: int) -> int:
        """Where a model layer's keys and values are: its owner's place among `owning_layers`.

        Of a layer with a recurrent state alone, its place among those.
        """
        if layer in self.retention_layers:
            return self.retention_layers.index(layer)
        if self.goldfinch is not None:
            return layer if layer < self.goldfinch.lower_layers else 0
        return self.owning_layers.index(self.owners[layer]) if self.owners else layer

    @property
    def read_from(self) -> int | None:
        """The first of the layers that all read one thing, made of the hidden state that it is given; None: none do."""
        return self.cross_from if self.goldfinch is None else self.goldfinch.lower_layers

    @property
    def reach(self) -> int:
        """How many of a prompt's last tokens must pass the layers from `read_from` on for the last logits and states.

        Of a cross-decoder one. Each upper layer of GoldFinch looks back a token for the query and one to mix channels.
        """
        return 1 if self.goldfinch is None else 2 * (self.num_layers - self.goldfinch.lower_layers) + 1

    @property
    def cache_windows(self) -> tuple[int | None, ...]:
        """`windows` of the owning layers."""
        return tuple(self.windows[layer] for layer in self.owning_layers)

    def kind(self, layer: int) -> LayerKind:
        """What kind of layer this is."""
        owner = self.owners[layer] if self.owners else layer
        return LayerKind(
            sparse=self.experts is not None and layer not in self.experts.dense_layers,
            reads=0 <= owner < layer or layer == self.read_from,
            retains=layer in self.retention_layers,
            local=self.local_rope_theta is not None and self.windows[layer] is not None,
            crosses=self.encoder is not None and layer >= self.num_layers - (self.cross_layers or self.num_layers),
        )

    @property
    def segments(self) -> tuple[tuple[int, ...], ...]:
        """Layers in the smallest consecutive runs that share keys and values only among themselves."""
        runs: list[tuple[int, ...]] = []
        owners = self.owners or tuple(range(self.num_layers))
        first = 0
        while first < self.num_layers:
            last, layer = first, first
            while layer <= last:
                last = max(reader for reader, owner in enumerate(owners) if owner == layer or reader == last)
                layer += 1
            runs.append(tuple(range(first, last + 1)))
            first = last + 1
        return tuple(runs)

    @property
    def recurrent_shapes(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Per layer with a state, the shapes of its float32 arrays without the batch."""
        if self.goldfinch is not None:
            upper = ((self.hidden_size,),) * 2
            lower = (*upper, (self.num_heads, self.width, self.width))
            first = self.goldfinch.lower_layers
            return (lower,) * first + (upper,) * (self.num_layers - first)
        return (((self.num_heads, self.width, self.width),),) * len(self.retention_layers)

    @property
    def uniform(self) -> bool:
        """Whether all layers are of one kind, so that they can be scanned over."""
        return not self.owners and len({self.kind(layer) for layer in range(self.num_layers)}) == 1

    @property
    def kv_spec(self) -> KVSpec:
        """What the cache must hold for this model."""
        layers = len(self.owning_layers)
        if self.goldfinch is not None:
            return KVSpec(layers, 1, self.hidden_size // self.goldfinch.compression, 1, rebuilt=True)
        if self.latent is not None:
            scale = self.latent.qk_head_dim**-0.5 if self.query_scale is None else self.query_scale
            factor = scale * self.latent.key_dim**0.5
            return KVSpec(
                layers, 1, self.latent.key_dim, self.latent.kv_lora_rank, value_in_key=True, query_factor=factor
            )
        factor = 1.0 if self.query_scale is None else self.query_scale * self.width**0.5
        return KVSpec(layers, self.num_kv_heads, self.width, self.width, query_factor=factor)

    @property
    def attention_kind(self) -> str:
        """ "MHA", "GQA", "MQA", "MLA" or "GOLD"."""
        if self.goldfinch is not None:
            return "GOLD"
        if self.latent is not None:
            return "MLA"
        if self.num_kv_heads == self.num_heads:
            return "MHA"
        return "MQA" if self.num_kv_heads == 1 else "GQA"

    @classmethod
    def from_toml(cls, path: str | Path) -> ModelConfig:
        """Reads the `[model]` table of a TOML file; unknown keys are refused by name."""
        table = read_toml(path)
        return cls.from_dict(table.get("model", table), source=str(path))

    @classmethod
    def from_dict(cls, table: dict[str, Any], source: str = "config") -> ModelConfig:
        """Builds a config from plain values (lists become tuples, `rope_scaling` a nested table)."""
        values = dict(table)
        if isinstance(values.get("rope_scaling"), dict):
            values["rope_scaling"] = build(RopeScaling, values["rope_scaling"], f"{source}: rope_scaling")
        for name, kind in (("latent", Latent), ("experts", Experts), ("goldfinch", GoldFinch)):
            if isinstance(values.get(name), dict):
                values[name] = build(kind, values[name], f"{source}: {name}")
        if isinstance(values.get("encoder"), dict):
            values["encoder"] = cls.from_dict(values["encoder"], f"{source}: encoder")
        window = values.pop("sliding_window", None)
        if window is not None and "windows" not in values:
            values["windows"] = (window,) * int(values.get("num_layers", 0))
        for name in ("windows", "eos_token_ids", "owners", "retention_layers"):
            if name in values:
                # TOML has no null: 0 stands for "sees everything".
                values[name] = tuple(v or None if name == "windows" else v for v in values[name])
        return build(cls, values, source)
