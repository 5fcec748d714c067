"""Frozen, hashable configuration: what a model is, how its cache is kept, how tokens are drawn.

All of it can be passed to `jax.jit` as static arguments: equal configs hash equal and never compile again.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from pathlib import Path
from typing import Any

from kvjax.cache.config import CacheConfig
from kvjax.cache.layout import KVSpec
from kvjax.errors import ConfigError

__all__ = [
    "CacheConfig",
    "Experts",
    "GoldFinch",
    "Latent",
    "LayerKind",
    "MeshConfig",
    "ModelConfig",
    "RopeScaling",
    "Sampling",
    "build",
    "read_toml",
]

ROPE_KINDS = ("default", "linear", "llama3", "yarn", "longrope", "inclusive")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context (Hugging Face `rope_scaling` fields).

    kind "default" leaves them alone; "linear" divides by `factor` (Chen et al. 2023); "llama3" stretches low
    frequencies only (Llama 3.1); "yarn" ramps between both and scales cos and sin by `attention_factor` (Peng et al.
    2023, 2309.00071); "longrope" divides each pair's frequency by its own number, `long_factor` where `long`, else
    `short_factor` (Ding et al. 2024, 2402.13753); "inclusive" spaces exponents from 0 to 1, both included (YOCO).
    """

    kind: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    long: bool = False

    def __post_init__(self) -> None:
        for name in ("short_factor", "long_factor"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.kind not in ROPE_KINDS:
            raise ConfigError(f"rope scaling kind {self.kind!r} is unknown; allowed: {', '.join(ROPE_KINDS)}")
        if not self.factor > 0:
            raise ConfigError(f"rope scaling factor must be positive, got {self.factor}")
        if self.kind in ("llama3", "yarn", "longrope") and self.original_max_position_embeddings <= 0:
            raise ConfigError(f"rope scaling {self.kind!r} needs original_max_position_embeddings > 0")
        if self.kind == "yarn" and not self.beta_fast > self.beta_slow > 0:
            raise ConfigError(
                f"yarn rope scaling needs beta_fast > beta_slow > 0, got {self.beta_fast} and {self.beta_slow}"
            )
        if self.kind == "llama3" and not self.high_freq_factor > self.low_freq_factor:
            raise ConfigError(
                f"llama3 rope scaling needs high_freq_factor > low_freq_factor, "
                f"got {self.high_freq_factor} and {self.low_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2 2024, 2405.04434).

    Attributes:
      kv_lora_rank: width of the latent that stands for all heads' keys and values.
      q_lora_rank: width of the query's own bottleneck; None: queries come straight from the hidden state.
      qk_nope_head_dim, qk_rope_head_dim: columns of a head's query and key without and with position.
      v_head_dim: columns of a head's value.
      interleaved: RoPE turns channels (2i, 2i + 1) together, as DeepSeek's weights want; else (i, i + D/2).
      norm_eps: of the norms on the latents, which DeepSeek fixes whatever the model's own is.
    """

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    interleaved: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank"):
            value = getattr(self, name)
            if not (value is None and name == "q_lora_rank") and (not isinstance(value, int) or value <= 0):
                raise ConfigError(f"latent {name} must be a positive integer, got {value!r}")
        if self.qk_rope_head_dim % 2:
            raise ConfigError(f"latent qk_rope_head_dim must be even (RoPE turns pairs), got {self.qk_rope_head_dim}")

    @property
    def qk_head_dim(self) -> int:
        """Columns of a head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def key_dim(self) -> int:
        """Columns of what is cached: the latent and the rotated part, one for all heads."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclasses.dataclass(frozen=True)
class Experts:
    """Mixture of experts in place of the feed-forward block (Shazeer et al. 2017, 1701.06538).

    Attributes:
      count, per_token: experts of a layer, and how many each token goes through.
      intermediate_size: width of one expert; shared_intermediate_size: of the one every token goes through (0: none).
      dense_layers: layers that have a plain feed-forward block instead.
      scoring: "softmax" over all experts, or "sigmoid" of each.
      normalize: the weights of the chosen are divided by their sum; scaling_factor multiplies them afterwards.
      groups, groups_per_token: experts are chosen from the best groups only (DeepSeek-V2); group_score: a group is as
        good as its best expert ("max") or its two best together ("top2").
      selection_bias: a learned bias that counts for the choice but not for the weight (DeepSeek-V3 2024, 2412.19437).
      router_bias, bias: the router, the experts' projections have biases.
      limit: gpt-oss' gated unit, clamped to this; None: the model's activation.
    """

    count: int
    per_token: int
    intermediate_size: int
    shared_intermediate_size: int = 0
    dense_layers: tuple[int, ...] = ()
    scoring: str = "softmax"
    normalize: bool = True
    scaling_factor: float = 1.0
    groups: int = 1
    groups_per_token: int = 1
    group_score: str = "max"
    selection_bias: bool = False
    router_bias: bool = False
    bias: bool = False
    limit: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        if self.count < 1 or not 1 <= self.per_token <= self.count or self.intermediate_size < 1:
            raise ConfigError(
                "experts need count >= 1, 1 <= per_token <= count and a positive intermediate_size, got "
                f"{self.count}, {self.per_token} and {self.intermediate_size}"
            )
        if self.scoring not in ("softmax", "sigmoid") or self.group_score not in ("max", "top2"):
            raise ConfigError(
                'experts scoring is "softmax" or "sigmoid" and group_score "max" or "top2", got '
                f"{self.scoring!r} and {self.group_score!r}"
            )
        if self.groups < 1 or self.count % self.groups or not 1 <= self.groups_per_token <= self.groups:
            raise ConfigError(
                f"experts groups must divide count {self.count} and groups_per_token be 1 to groups, got {self.groups} "
                f"and {self.groups_per_token}"
            )
        if self.per_token > self.groups_per_token * (self.count // self.groups):
            raise ConfigError(
                f"experts per_token {self.per_token} exceeds the {self.groups_per_token * (self.count // self.groups)} "
                "experts of the groups chosen"
            )


@dataclasses.dataclass(frozen=True)
class GoldFinch:
    """Recurrent layers below, and above them attention to keys rebuilt from few numbers (GoldFinch 2024, 2407.12077).

    Of a token only hidden_size / compression elements and its id are cached, once for all layers.

    Attributes:
      lower_layers: layers with a recurrent state (Finch-C2), published two thirds of all; those above attend (GOLD).
      compression: how many times fewer elements than hidden_size are cached of a token.
      mix_rank: of what decides how much of its predecessor a token takes.
      decay_rank: of what decides a lower layer's decay, and of its second value.
      value_rank: of what corrects an upper layer's keys and values; None: hidden_size / 16, at least 64.
      rope: upper layers turn channels (2i, 2i + 1) by rope_theta; else order is known from predecessors and causality.
      norm_eps: of the LayerNorms, all of which have biases.
    """

    lower_layers: int
    compression: int = 16
    mix_rank: int = 32
    decay_rank: int = 64
    value_rank: int | None = None
    rope: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("lower_layers", "compression", "mix_rank", "decay_rank", "value_rank"):
            value = getattr(self, name)
            if not (value is None and name == "value_rank") and (not isinstance(value, int) or value <= 0):
                raise ConfigError(f"goldfinch {name} must be a positive integer, got {value!r}")


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What tells one layer of a model from another; layers of one kind share compilations.

    Attributes:
      sparse: experts instead of a plain feed-forward block.
      reads: has no keys and values of its own and attends to another layer's.
      retains: has gated retention in place of attention.
      local: sees only a window, and turns by `local_rope_theta` where the model has one.
      crosses: has cross-attention to an encoded context between self-attention and the feed-forward block.
    """

    sparse: bool = False
    reads: bool = False
    retains: bool = False
    local: bool = False
    crosses: bool = False


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
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_layers)
        if len(self.windows) != self.num_layers:
            raise ConfigError(f"windows has {len(self.windows)} entries for {self.num_layers} layers")
        if any(w is not None and (not isinstance(w, int) or w <= 0) for w in self.windows):
            raise ConfigError(f"every window must be None or a positive integer, got {self.windows}")
        self._check_choices()
        self._check_owners()
        self._check_encoder()
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype must be float32, bfloat16 or float16, got {self.dtype!r}")
        if not self.rope_theta > 1 or not math.isfinite(self.rope_theta):
            raise ConfigError(f"rope_theta must be finite and greater than 1, got {self.rope_theta}")

    def _check_choices(self) -> None:
        """Fields with few allowed values, and factors."""
        choices = {
            "activation": ("silu", "gelu", "gelu_tanh"),
            "norm_placement": ("pre", "post", "sandwich"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("query_scale", "attention_soft_cap", "logit_soft_cap", "local_rope_theta", "embedding_scale"):
            value = getattr(self, name)
            if value is not None and (not math.isfinite(value) or value <= 0):
                raise ConfigError(f"{name} must be a finite positive number, got {value!r}")
        if not 0 < self.rotary_fraction <= 1 or self.rotary_width % 2 or self.rotary_width == 0:
            raise ConfigError(
                f"rotary_fraction must be in (0, 1] and turn an even number of channels, got {self.rotary_fraction} of "
                f"{self.width}"
            )
        if self.latent is not None:
            names = ("qk_norm", "qk_norm_whole", "rotary_fraction", "rope_interleaved", "local_rope_theta")
            plain = {field.name: field.default for field in dataclasses.fields(self)}
            given = [name for name in (*names, "attention_sinks") if getattr(self, name) != plain[name]]
            if given:
                raise ConfigError(
                    f"latent attention has norms and rotated channels of its own, and no sinks: drop {', '.join(given)}"
                )
        if self.qk_norm and self.qk_norm_whole:
            raise ConfigError("qk_norm and qk_norm_whole exclude each other")
        for layer in self.experts.dense_layers if self.experts else ():
            if not 0 <= layer < self.num_layers:
                raise ConfigError(f"experts.dense_layers names layer {layer} of {self.num_layers}")

    def _check_owners(self) -> None:
        """Owners are earlier layers, own themselves, and see as far as their readers."""
        for name in ("owners", "retention_layers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.goldfinch is not None:
            return self._check_goldfinch(self.goldfinch)
        self._check_cross()
        if self.owners == tuple(range(self.num_layers)):
            object.__setattr__(self, "owners", ())
        if not self.owners:
            return
        if len(self.owners) != self.num_layers:
            raise ConfigError(f"owners has {len(self.owners)} entries for {self.num_layers} layers")
        for layer, owner in enumerate(self.owners):
            if layer in self.retention_layers:
                continue
            if not 0 <= owner <= layer or self.owners[owner] != owner:
                raise ConfigError(
                    f"owners[{layer}] is {owner}; it must be the layer itself or an earlier one that owns itself"
                )
            if self.windows[layer] != self.windows[owner]:
                raise ConfigError(
                    f"layer {layer} sees {self.windows[layer]} positions and reads layer {owner}, which sees "
                    f"{self.windows[owner]}; layers that share keys and values must have the same window"
                )
        if self.latent is not None:
            raise ConfigError("owners with latent attention is not implemented; give every layer its own latent")

    def _check_cross(self) -> None:
        """A cross-decoder and retention layers say themselves who owns what: -1 for a layer without keys."""
        if self.cross_from is None and not self.retention_layers:
            return
        first = self.num_layers if self.cross_from is None else self.cross_from
        if self.cross_from is not None and not 0 < first < self.num_layers:
            raise ConfigError(f"cross_from must be 1 to {self.num_layers - 1}, got {self.cross_from}")
        wrong = [layer for layer in self.retention_layers if not 0 <= layer < first]
        if wrong:
            raise ConfigError(f"retention_layers names layer {wrong[0]}; allowed: 0 to {first - 1}")
        if len(self.retention_layers) == self.num_layers:
            raise ConfigError("retention_layers names every layer; at least one must have keys and values to cache")
        if self.latent is not None or any(self.windows[first:]):
            raise ConfigError("a cross-decoder has neither latent attention nor windows")
        owners = tuple(-1 if layer in self.retention_layers else min(layer, first) for layer in range(self.num_layers))
        if self.owners not in ((), owners):
            raise ConfigError(f"owners {self.owners} contradicts cross_from and retention_layers, which mean {owners}")
        object.__setattr__(self, "owners", owners)

    def _check_goldfinch(self, goldfinch: GoldFinch) -> None:
        """Its layers are of kinds of their own: what shapes others does not apply."""
        foreign = (
            *("latent", "experts", "retention_layers", "cross_from", "qkv_bias", "o_bias", "mlp_bias", "qk_norm"),
            *("qk_norm_whole", "activation", "norm_placement", "norm_unit_offset", "embedding_scale", "query_scale"),
            *("attention_soft_cap", "attention_sinks", "rotary_fraction", "local_rope_theta"),
        )
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in foreign:
            if getattr(self, name) != defaults[name]:
                raise ConfigError(f"a model with goldfinch takes no {name}, got {getattr(self, name)!r}; leave it out")
        if any(self.windows):
            raise ConfigError(f"goldfinch rebuilds keys from every token: it takes no windows, got {self.windows}")
        if not goldfinch.lower_layers < self.num_layers:
            raise ConfigError(
                f"goldfinch lower_layers must be 1 to {self.num_layers - 1}, of {self.num_layers} layers, got "
                f"{goldfinch.lower_layers}"
            )
        if self.num_kv_heads != self.num_heads or self.num_heads * self.width != self.hidden_size:
            raise ConfigError(
                "goldfinch needs num_kv_heads equal to num_heads, and heads that make up hidden_size "
                f"{self.hidden_size}; got {self.num_kv_heads} and {self.num_heads} of {self.width}"
            )
        if self.hidden_size % goldfinch.compression:
            raise ConfigError(
                f"goldfinch compression must divide hidden_size {self.hidden_size}, got {goldfinch.compression}"
            )
        if goldfinch.rope and not self.rope_interleaved:
            raise ConfigError("goldfinch with rope turns neighbouring channels together: set rope_interleaved=True too")
        first = goldfinch.lower_layers
        owners = (-1,) * first + (first,) * (self.num_layers - first)
        if self.owners not in ((), owners):
            raise ConfigError(f"owners {self.owners} contradicts goldfinch, which means {owners}")
        object.__setattr__(self, "owners", owners)

    def _check_encoder(self) -> None:
        """Which decoders an encoder can serve, and what an encoder may be."""
        e = self.encoder
        if e is None:
            if self.cross_layers is not None:
                raise ConfigError(f"cross_layers={self.cross_layers} needs an encoder; give one or drop cross_layers")
            return
        if not isinstance(e, ModelConfig):
            raise ConfigError(f"encoder must be a ModelConfig or None, got {e!r:.80}")
        for name, most in (("context_chunk", e.max_position_embeddings), ("cross_layers", self.num_layers)):
            value = getattr(self, name)
            left_out = value is None and name == "cross_layers"
            if not left_out and (not isinstance(value, int) or not 1 <= value <= most):
                raise ConfigError(f"{name} must be an integer from 1 to {most}, got {value!r}")
        if self.latent or self.goldfinch or self.cross_from is not None or self.retention_layers:
            raise ConfigError(
                "an encoder serves layers that attend to keys and values: latent attention, goldfinch, cross_from and "
                "retention_layers are not implemented beside it"
            )
        if self.norm_placement != "pre":
            raise ConfigError(
                f"cross-attention normalises what it reads: with an encoder norm_placement must be 'pre', got "
                f"{self.norm_placement!r}"
            )
        if e.encoder or e.latent or e.goldfinch or e.owners or any(e.windows):
            raise ConfigError(
                "an encoder's layers are plain and see the whole chunk: drop its own encoder, latent attention, "
                "goldfinch, owners, cross_from, retention_layers and windows"
            )

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
            return KVSpec(layers, 1, self.latent.key_dim, self.latent.kv_lora_rank, value_in_key=True)
        return KVSpec(layers, self.num_kv_heads, self.width, self.width)

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


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: 0 is greedy.
      top_k: keep the k likeliest (0: all); top_p: the smallest set with at least this mass; min_p: tokens at least this
        fraction of the likeliest's probability. Applied in this order, after repetition_penalty and temperature.
      repetition_penalty: divides positive and multiplies negative logits of tokens already seen (Keskar et al. 2019).
      n: samples per prompt; the prompt's pages are shared.
      beams: beam search width; 1 is no beam search.
      length_penalty: beam scores are divided by length ** length_penalty.
      stop: strings that end a text (not part of it); stop_tokens: token ids that do, beside the model's own.
      seeds: one seed per prompt; None derives them from the call's seed and the prompt's place.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    n: int = 1
    beams: int = 1
    length_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    seeds: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "stop_tokens", "seeds"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        rules = (
            ("temperature", self.temperature >= 0 and math.isfinite(self.temperature), "finite and at least 0"),
            ("top_k", self.top_k >= 0, "at least 0 (0: all)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "positive"),
            ("n", self.n >= 1, "at least 1"),
            ("beams", self.beams >= 1, "at least 1"),
            ("stop", all(isinstance(s, str) and s for s in self.stop), "a tuple of non-empty strings"),
        )
        for name, ok, allowed in rules:
            if not ok:
                raise ConfigError(f"Sampling.{name} must be {allowed}, got {getattr(self, name)!r}")
        if self.beams > 1 and self.stop:
            raise ConfigError(
                f"beam search ends texts at tokens, not at strings: with beams={self.beams} use stop_tokens instead of "
                f"stop={self.stop!r}"
            )
        if self.beams > 1 and (self.temperature > 0 or self.n > self.beams):
            raise ConfigError(
                f"beam search is deterministic and returns at most `beams` texts a prompt: with beams={self.beams} "
                f"set temperature=0 and n<={self.beams}, got temperature={self.temperature}, n={self.n}"
            )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """A device mesh: axis names and sizes, e.g. axes=("data", "tensor"), shape=(2, 4). -1 takes what is left."""

    axes: tuple[str, ...] = ("data", "tensor")
    shape: tuple[int, ...] = (1, -1)

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.shape) or len(set(self.axes)) != len(self.axes):
            raise ConfigError(f"MeshConfig needs one size per distinct axis, got {self.axes} and {self.shape}")
        if sum(size == -1 for size in self.shape) > 1 or any(size < -1 or size == 0 for size in self.shape):
            raise ConfigError(f"MeshConfig.shape takes positive sizes and at most one -1, got {self.shape}")


def build(kind: type, values: dict[str, Any], source: str) -> Any:
    """Builds dataclass `kind` from a table, naming unknown and missing keys."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(f"{source}: unknown key {unknown[0]!r}; allowed: {', '.join(fields)}")
    required = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in values]
    if missing:
        raise ConfigError(f"{source}: missing key {missing[0]!r}; required: {', '.join(required)}")
    return kind(**values)


def read_toml(path: str | Path) -> dict[str, Any]:
    """Reads a TOML file, turning every failure into a `ConfigError` that names the file."""
    try:
        return tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give the path of a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
