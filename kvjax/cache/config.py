"""`CacheConfig`: the choices that make a cache, refused at construction where they cannot combine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from kvjax.cache.codecs import Codec, Dense
from kvjax.cache.policies import Full, Policy
from kvjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """How the KV cache is kept.

    Attributes:
      page_size: slots per page; None: what the codec prefers, else 16.
      num_pages: pages in each layer group's pool; None: enough for the call.
      memory_bytes: bytes the pool may take over all layer groups, instead of num_pages.
      overrides: (layers, CacheConfig) pairs, another policy, codec or page size for some layers.
      policy: which slot a new token takes and what is kept (`kvjax.policies`).
      codec: how a vector becomes bytes (`kvjax.codecs`).
      select: which slots a step reads; None: all.
    """

    page_size: int | None = None
    num_pages: int | None = None
    memory_bytes: int | None = None
    overrides: tuple[tuple[tuple[int, ...], CacheConfig], ...] = ()
    policy: Policy = Full()
    codec: Codec = Dense()
    select: Any = None

    @property
    def observes(self) -> bool:
        """Whether some layer's policy keeps tokens by the attention they receive."""
        return any(config.policy.observes for config in (self, *(other for _, other in self.overrides)))

    def __post_init__(self) -> None:
        for name in ("page_size", "num_pages", "memory_bytes"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value <= 0):
                raise ConfigError(f"CacheConfig.{name} must be None or a positive integer, got {value!r}")
        if self.page_size is not None and self.page_size & (self.page_size - 1):
            raise ConfigError(f"CacheConfig.page_size must be a power of two, got {self.page_size}")
        if self.num_pages is not None and self.memory_bytes is not None:
            raise ConfigError("CacheConfig takes num_pages or memory_bytes, not both")
        for name, kind, places in (("policy", Policy, "kvjax.policies"), ("codec", Codec, "kvjax.codecs")):
            value = getattr(self, name)
            # A class has all that its instances have: without the first test `policy=TOVA` would pass.
            if isinstance(value, type) or not isinstance(value, kind):
                raise ConfigError(f"CacheConfig.{name} must be an instance of one of {places}, got {value!r}")
            try:
                hash(value)
            except TypeError as error:
                raise ConfigError(
                    f"CacheConfig.{name} is compiled in and must be hashable: make {type(value).__name__} a frozen "
                    "dataclass of hashable fields"
                ) from error
        if self.select is not None:
            raise ConfigError(f"CacheConfig.select: no sparse reads are available yet, got {self.select!r}")
        overrides = []
        taken: set[int] = set()
        for override in self.overrides:
            if not isinstance(override, tuple) or len(override) != 2 or not isinstance(override[0], Iterable):
                raise ConfigError(f"each override is (layers, CacheConfig), got {override!r}")
            layers, config = tuple(int(layer) for layer in override[0]), override[1]
            if not isinstance(config, CacheConfig) or config.overrides:
                raise ConfigError("each override is (layers, CacheConfig) and has no overrides of its own")
            if not layers or taken.intersection(layers) or min(layers) < 0:
                raise ConfigError(f"override layers must be non-empty, not negative and distinct, got {layers}")
            taken.update(layers)
            overrides.append((layers, config))
        object.__setattr__(self, "overrides", tuple(overrides))
