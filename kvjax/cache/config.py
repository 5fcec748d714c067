"""`CacheConfig`: the choices that make a cache, refused at construction where they cannot combine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from kvjax.cache.codecs import Codec, Dense
from kvjax.cache.codecs.calibrated import check_calibrated
from kvjax.cache.codecs.waiting import check_waiting
from kvjax.cache.named import method_named
from kvjax.cache.policies import Full, Policy
from kvjax.cache.policies.optional import drops_hidden
from kvjax.cache.selects import Select
from kvjax.cache.selects.check import check_select
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
      select: what a step reads (`kvjax.selects`); None: everything held.
    """

    page_size: int | None = None
    num_pages: int | None = None
    memory_bytes: int | None = None
    overrides: tuple[tuple[tuple[int, ...], CacheConfig], ...] = ()
    policy: Policy = Full()
    codec: Codec = Dense()
    select: Select | None = None

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
        methods = (
            ("policy", Policy, "kvjax.policies"),
            ("codec", Codec, "kvjax.codecs"),
            ("select", Select, "kvjax.selects"),
        )
        for name, kind, places in methods:
            value = getattr(self, name)
            if name == "select" and value is None:
                continue
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
            check_select(self.select, self.policy)
        check_waiting(self.codec, self.policy, self.page_size)
        check_calibrated(self.codec, self.policy)
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
        policies = [self.policy, *(config.policy for _, config in overrides)]
        dropping = [policy for policy in policies if drops_hidden(policy)]
        if dropping and len(dropping) < len(policies):
            other = next(policy for policy in policies if not drops_hidden(policy))
            raise ConfigError(
                f"CacheConfig.overrides mixes {dropping[0]!r} with {other!r}: what one layer drops of a prompt never "
                "reaches those above, so the same policy must rule all layers"
            )

    @classmethod
    def from_dict(cls, table: dict[str, Any], source: str = "cache", methods: Iterable[type] = ()) -> CacheConfig:
        """Builds a config from plain values, as TOML gives them.

        `policy`, `codec` and `select` are a name with its arguments behind a colon (`"h2o:64,64"`), or a table of
        `name` and arguments (`{ name = "h2o", heavy = 64, recent = 64 }`); `overrides` is a list of tables, each with
        `layers` and such values of its own.

        Args:
          source: begins every error.
          methods: classes of one's own that names may mean, beside kvjax's.

        Raises:
          ConfigError: unknown keys or names, or choices that cannot combine.
        """
        allowed = [field.name for field in dataclasses.fields(cls)]
        unknown = [key for key in table if key not in allowed]
        if unknown:
            raise ConfigError(f"{source}: unknown key {unknown[0]!r}; allowed: {', '.join(allowed)}")
        values, methods = dict(table), tuple(methods)
        for what in ("policy", "codec", "select"):
            if what in values:
                values[what] = method_named(what, values[what], f"{source}: {what}", methods)
        overrides = []
        for number, override in enumerate(values.pop("overrides", ())):
            name = f"{source}: overrides[{number}]"
            if not isinstance(override, dict) or not isinstance(override.get("layers"), list):
                raise ConfigError(f"{name} must be a table with a list of `layers`, got {override!r}")
            rest = {key: value for key, value in override.items() if key != "layers"}
            overrides.append((tuple(override["layers"]), cls.from_dict(rest, name, methods)))
        return cls(**values, overrides=tuple(overrides))
