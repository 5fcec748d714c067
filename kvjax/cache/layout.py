"""What is static about a cache: which layers share pages, how wide a page is, which policy and codec rule it."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from kvjax.cache.codecs import Codec
from kvjax.cache.config import CacheConfig
from kvjax.cache.policies import Full, Policy, SlidingWindow
from kvjax.errors import ConfigError

DEFAULT_PAGE_SIZE = 16


@dataclasses.dataclass(frozen=True)
class KVSpec:
    """What a model asks of its cache. To the cache every model is one of these.

    Attributes:
      layers: layers that own keys and values.
      kv_heads: key-value heads per layer.
      key_dim, value_dim: elements of one key and one value.
      value_in_key: the value is the first value_dim elements of the key (MLA): nothing else is stored.
      rebuilt: keys and values are rebuilt on every read from what is held of a token and of the one before it: the key
        as stored, and the value, int32 token ids that no codec touches (GoldFinch).
    """

    layers: int
    kv_heads: int
    key_dim: int
    value_dim: int
    value_in_key: bool = False
    rebuilt: bool = False

    @property
    def elements_per_token(self) -> int:
        """Elements stored per token over all layers, before any codec."""
        width = self.key_dim + (0 if self.value_in_key else self.value_dim)
        return self.layers * self.kv_heads * width


@dataclasses.dataclass(frozen=True)
class GroupLayout:
    """Layers that share one page pool, one policy and one codec.

    Attributes:
      layers: the model's layers, ascending; a layer's place here is its index within the group.
      window: how many positions the model itself lets these layers see; None: all.
      num_pages: the pool's size if the user fixed it; None: sized by the call.
      dtype: of the model's keys and values.
    """

    layers: tuple[int, ...]
    spec: KVSpec
    policy: Policy
    codec: Codec
    page_size: int
    window: int | None
    num_pages: int | None
    dtype: str

    @property
    def layers_per_page(self) -> int:
        """Layers whose entries one page holds."""
        return len(self.layers) if self.policy.rows == "shared" else 1

    @property
    def heads_per_page(self) -> int:
        """KV heads whose entries one page holds."""
        return 1 if self.policy.rows == "head" else self.spec.kv_heads

    @property
    def rows_per_layer(self) -> int:
        """Rows that hold one layer's entries."""
        return self.spec.kv_heads // self.heads_per_page

    @property
    def rows(self) -> int:
        """R: block-table rows per sequence."""
        return len(self.layers) // self.layers_per_page * self.rows_per_layer

    @property
    def bytes_per_vector_pair(self) -> int:
        """Bytes of one token's key and value in one head, scales included."""
        key = self.codec.bytes_per_vector(self.spec.key_dim, self.dtype)
        if self.spec.value_in_key:
            return key
        if self.spec.rebuilt:
            return key + 4 * self.spec.value_dim
        return key + self.codec.bytes_per_vector(self.spec.value_dim, self.dtype)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of the pool."""
        return self.layers_per_page * self.heads_per_page * self.page_size * self.bytes_per_vector_pair

    @property
    def bytes_per_token(self) -> int:
        """Bytes one held token takes over the group's layers and heads."""
        return len(self.layers) * self.spec.kv_heads * self.bytes_per_vector_pair

    def pages_per_row(self, tokens: int) -> int:
        """Pages one row takes at most while its sequence grows to `tokens` tokens."""
        return -(-self.policy.capacity(tokens) // self.page_size)

    def pages_per_sequence(self, tokens: int) -> int:
        """Pages all rows of one sequence take at most while it grows to `tokens` tokens."""
        return self.rows * self.pages_per_row(tokens)


def group_layers(
    spec: KVSpec, windows: tuple[int | None, ...], cache: CacheConfig, dtype: str
) -> tuple[GroupLayout, ...]:
    """Splits a model's layers into groups of equal choices, in order of their first layer.

    A layer that the model itself windows holds only that window: Full becomes SlidingWindow there.

    Raises:
      ConfigError: an override names a layer the model lacks, or a policy cannot serve a windowed layer, or one whose
        keys are rebuilt.
    """
    dtype = jnp.dtype(dtype).name
    windows = windows or (None,) * spec.layers
    chosen = {layer: config for layers, config in cache.overrides for layer in layers}
    beyond = [layer for layer in chosen if layer >= spec.layers]
    if beyond:
        raise ConfigError(
            f"CacheConfig.overrides names layer {beyond[0]}, but the model has layers 0..{spec.layers - 1}"
        )
    groups: dict[tuple, list[int]] = {}
    for layer in range(spec.layers):
        config = chosen.get(layer, cache)
        if spec.rebuilt and not (config.policy.in_order and config.policy.append_only):
            raise ConfigError(
                f"{config.policy!r} cannot serve this model: its keys are rebuilt from each token and the one before, "
                "so every token must stay; use policies.Full()"
            )
        policy, window = _within_window(config.policy, windows[layer])
        key = (policy, config.codec, config.page_size or DEFAULT_PAGE_SIZE, window, config.num_pages)
        groups.setdefault(key, []).append(layer)
    return tuple(
        GroupLayout(tuple(layers), spec, policy, codec, page_size, window, num_pages, dtype)
        for (policy, codec, page_size, window, num_pages), layers in groups.items()
    )


def context_layout(spec: KVSpec, cache: CacheConfig, dtype: str) -> GroupLayout:
    """The group of an encoded context: held whole and in order, in the cache's codec and pages; sized by the call."""
    dtype = jnp.dtype(dtype).name
    return GroupLayout((0,), spec, Full(), cache.codec, cache.page_size or DEFAULT_PAGE_SIZE, None, None, dtype)


def _within_window(policy: Policy, window: int | None) -> tuple[Policy, int | None]:
    """The policy a layer with this window really needs, and the window that reads must still respect."""
    if window is None:
        return policy, None
    if isinstance(policy, Full):
        return SlidingWindow(window), None
    if isinstance(policy, SlidingWindow):
        return SlidingWindow(min(window, policy.window)), None
    policy.reads(window)  # raises where the policy would look beyond the window
    return policy, None if not policy.observes else window
