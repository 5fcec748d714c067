"""How rotary frequencies are stretched beyond the trained context."""

from __future__ import annotations

import dataclasses

from kvjax.errors import ConfigError

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
