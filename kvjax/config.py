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

__all__ = ["CacheConfig", "MeshConfig", "ModelConfig", "RopeScaling", "Sampling", "build", "read_toml"]

ROPE_KINDS = ("default", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context (Hugging Face `rope_scaling` fields).

    kind "default" leaves them alone; "linear" divides by `factor` (Chen et al. 2023); "llama3" stretches low
    frequencies only (Llama 3.1); "yarn" ramps between both and scales cos and sin by `attention_factor` (Peng et al.
    2023, 2309.00071).
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

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ConfigError(f"rope scaling kind {self.kind!r} is unknown; allowed: {', '.join(ROPE_KINDS)}")
        if not self.factor > 0:
            raise ConfigError(f"rope scaling factor must be positive, got {self.factor}")
        if self.kind in ("llama3", "yarn") and self.original_max_position_embeddings <= 0:
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
class ModelConfig:
    """A decoder-only transformer: MHA, GQA or MQA with RoPE, RMSNorm and SwiGLU.

    Attributes:
      family: the Hugging Face `model_type` it is read from and written as.
      head_dim: per-head width; None means hidden_size / num_heads.
      windows: per layer, how many positions it sees (None: all). Empty means every layer sees all.
      qkv_bias: biases on q, k and v; o_bias, mlp_bias: on the output projection and the MLP.
      qk_norm: RMSNorm over head_dim on q and k before rotation (Qwen3).
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
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype must be float32, bfloat16 or float16, got {self.dtype!r}")
        if not self.rope_theta > 1 or not math.isfinite(self.rope_theta):
            raise ConfigError(f"rope_theta must be finite and greater than 1, got {self.rope_theta}")

    @property
    def width(self) -> int:
        """Per-head width, never None."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def kv_spec(self) -> KVSpec:
        """What the cache must hold for this model."""
        return KVSpec(layers=self.num_layers, kv_heads=self.num_kv_heads, key_dim=self.width, value_dim=self.width)

    @property
    def attention_kind(self) -> str:
        """ "MHA", "GQA" or "MQA"."""
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
        window = values.pop("sliding_window", None)
        if window is not None and "windows" not in values:
            values["windows"] = (window,) * int(values.get("num_layers", 0))
        for name in ("windows", "eos_token_ids"):
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
