"""Kinds of layers beside plain attention and a plain feed-forward block."""

from __future__ import annotations

import dataclasses

from kvjax.errors import ConfigError


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
      kv_norm: the latent of keys and values is normalised, as in DeepSeek; converted models have no use for it.
      q_bias: a bias on queries that come straight from the hidden state.
    """

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    interleaved: bool = True
    norm_eps: float = 1e-6
    kv_norm: bool = True
    q_bias: bool = False

    def __post_init__(self) -> None:
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank"):
            value = getattr(self, name)
            if not (value is None and name == "q_lora_rank") and (not isinstance(value, int) or value <= 0):
                raise ConfigError(f"latent {name} must be a positive integer, got {value!r}")
        if self.qk_rope_head_dim % 2:
            raise ConfigError(f"latent qk_rope_head_dim must be even (RoPE turns pairs), got {self.qk_rope_head_dim}")
        if self.q_bias and self.q_lora_rank is not None:
            raise ConfigError(
                f"latent q_bias is for queries without a bottleneck: with q_lora_rank={self.q_lora_rank} it must be "
                "False; the bottleneck's own bias is the model's qkv_bias"
            )

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
