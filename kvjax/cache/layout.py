"""What is static about a cache: which layers share pages, how wide a page is, which policy and codec rule it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class KVSpec:
    """What a model asks of its cache. To the cache every model is one of these.

    Attributes:
      layers: layers that own keys and values.
      kv_heads: key-value heads per layer.
      key_dim, value_dim: elements of one key and one value.
      value_in_key: the value is the first value_dim elements of the key (MLA): nothing else is stored.
    """

    layers: int
    kv_heads: int
    key_dim: int
    value_dim: int
    value_in_key: bool = False

    @property
    def elements_per_token(self) -> int:
        """Elements stored per token over all layers, before any codec."""
        width = self.key_dim + (0 if self.value_in_key else self.value_dim)
        return self.layers * self.kv_heads * width
