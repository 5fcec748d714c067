"""What is static about a cache: which layers share pages, how wide a page is, which policy and codec rule it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.cache.codecs import Codec
from kvjax.cache.codecs.calibrated import calibrated, first_tokens
from kvjax.cache.codecs.waiting import check_waiting, waits
from kvjax.cache.config import CacheConfig
from kvjax.cache.policies import Full, Policy, SlidingWindow
from kvjax.cache.policies.optional import decides, placed
from kvjax.cache.selects import Select
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
      query_factor: what queries have been multiplied by when they come to `attend`, which itself divides scores by the
        root of their width: 1 but for models whose scores are scaled otherwise.
    """

    layers: int
    kv_heads: int
    key_dim: int
    value_dim: int
    value_in_key: bool = False
    rebuilt: bool = False
    query_factor: float = 1.0

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
      select: what steps of these layers read; None: everything.
    """

    layers: tuple[int, ...]
    spec: KVSpec
    policy: Policy
    codec: Codec
    page_size: int
    window: int | None
    num_pages: int | None
    dtype: str
    select: Select | None = None

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
        # Optional: a codec may code keys in another way than values.
        of_key = getattr(self.codec, "bytes_per_key", self.codec.bytes_per_vector)
        key: int = of_key(self.spec.key_dim, self.dtype)
        if self.spec.value_in_key:
            return key
        if self.spec.rebuilt:
            return key + 4 * self.spec.value_dim
        return key + self.codec.bytes_per_vector(self.spec.value_dim, self.dtype)

    @property
    def page_state(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What the select remembers of one page of one layer and head, name -> its shape and dtype."""
        if self.select is None:
            return {}
        keys, values = (
            jax.ShapeDtypeStruct((self.page_size, width), self.dtype)
            for width in (self.spec.key_dim, self.spec.value_dim)
        )
        state: dict[str, jax.ShapeDtypeStruct] = jax.eval_shape(
            self.select.summary, keys, values, jax.ShapeDtypeStruct((self.page_size,), bool)
        )
        return state

    @property
    def page_state_bytes(self) -> int:
        """Bytes of that."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in self.page_state.values())

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of the pool, and of what the select remembers of it."""
        entries = self.page_size * self.bytes_per_vector_pair
        return self.layers_per_page * self.heads_per_page * (entries + self.page_state_bytes)

    @property
    def tail_bytes(self) -> int:
        """Bytes that one sequence's exact tokens take beside the pages, the newest or first, whatever its length."""
        codec: Any = self.codec
        width = self.spec.key_dim + (0 if self.spec.value_in_key else self.spec.value_dim)
        # First tokens lie there in float16.
        each = codec.ring * jnp.dtype(self.dtype).itemsize if waits(codec) else 2 * first_tokens(codec)
        return len(self.layers) * self.spec.kv_heads * width * each

    @property
    def bytes_per_token(self) -> int:
        """Bytes one held token takes over the group's layers and heads, its share of the page's state included."""
        each = self.bytes_per_vector_pair + -(-self.page_state_bytes // self.page_size)
        return len(self.layers) * self.spec.kv_heads * each

    def bytes_read(self, tokens: int) -> int:
        """Bytes that the attention of one step reads for one sequence of `tokens` tokens, this one included.

        Counted as whole pages of keys and values as stored, or the single entries a select picks from them, and what it
        looks at to pick them; block tables and positions are not.
        """
        pages = -(-self.policy.capacity(tokens) // self.page_size)
        entries, state = pages * self.page_size, 0
        if self.select is not None and not self.select.covers(pages, self.page_size):
            itemsize = jnp.dtype(self.dtype).itemsize
            entries, state = self.select.cost(pages, self.page_size, self.spec.key_dim, self.spec.value_dim, itemsize)
        return len(self.layers) * self.spec.kv_heads * (entries * self.bytes_per_vector_pair + state) + self.tail_bytes

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
        keys are rebuilt, or a codec its width.
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
        if spec.rebuilt and waits(config.codec):
            raise ConfigError(
                f"{config.codec!r} cannot serve this model: its values are token ids, which no codec touches, and its "
                "keys are rebuilt from all that is held; use a codec that codes each token by itself, such as "
                "codecs.Int4()"
            )
        if spec.rebuilt and calibrated(config.codec):
            raise ConfigError(
                f"{config.codec!r} cannot serve this model: it was made for keys and values, and what this model holds "
                "are token ids and what keys are rebuilt from; use another codec, such as codecs.Int4()"
            )
        if spec.rebuilt and not (config.policy.in_order and config.policy.append_only):
            raise ConfigError(
                f"{config.policy!r} cannot serve this model: its keys are rebuilt from each token and the one before, "
                "so every token must stay; use policies.Full()"
            )
        check_widths(config.codec, spec)
        policy, window = _within_window(config.policy, windows[layer])
        select = _select_of(config, layer, spec, windows[layer])
        check_waiting(config.codec, policy)
        key = (policy, config.codec, page_size_of(config), window, config.num_pages, select)
        groups.setdefault(key, []).append(layer)
    return tuple(
        GroupLayout(
            tuple(layers),
            spec,
            placed(policy, tuple(layers), spec.layers),
            codec,
            page_size,
            window,
            num_pages,
            dtype,
            select,
        )
        for (policy, codec, page_size, window, num_pages, select), layers in groups.items()
    )


def context_layout(spec: KVSpec, cache: CacheConfig, dtype: str) -> GroupLayout:
    """The group of an encoded context: held whole and in order, in the cache's codec and pages; sized by the call."""
    dtype = jnp.dtype(dtype).name
    if calibrated(cache.codec):
        raise ConfigError(
            f"CacheConfig.codec={cache.codec!r} cannot hold an encoded context: it is calibrated on the decoder's own "
            "keys and values, and a context is neither; take another codec, such as codecs.Int4()"
        )
    check_widths(cache.codec, spec)
    if waits(cache.codec):
        raise ConfigError(
            f"CacheConfig.codec={cache.codec!r} cannot hold an encoded context: it keeps the newest tokens exact, and "
            "a context has none; take a codec that codes each token by itself, such as codecs.Int4()"
        )
    return GroupLayout((0,), spec, Full(), cache.codec, page_size_of(cache), None, None, dtype)


def page_size_of(cache: CacheConfig) -> int:
    """Slots per page: as given, else what the codec prefers, else 16."""
    preferred: int = getattr(cache.codec, "page_size", DEFAULT_PAGE_SIZE)
    return cache.page_size or preferred


def check_widths(codec: Codec, spec: KVSpec) -> None:
    """Lets a codec that codes channels in groups refuse vectors they do not divide: its optional `check_width`.

    Raises:
      ConfigError: the codec cannot code the model's keys or values.
    """
    if calibrated(codec):
        known: Any = codec
        known.check_model(spec.layers, spec.kv_heads, spec.key_dim, spec.value_in_key)
    check = getattr(codec, "check_width", None)
    if check is None:
        return
    for width in (spec.key_dim,) if spec.value_in_key or spec.rebuilt else (spec.key_dim, spec.value_dim):
        check(width)


def _select_of(config: CacheConfig, layer: int, spec: KVSpec, window: int | None) -> Select | None:
    """What steps of a layer read by; a layer that the model itself windows reads its window."""
    select = config.select
    if select is None or window is not None or select.reads_all(layer):
        return None
    if spec.rebuilt:
        raise ConfigError(
            f"CacheConfig.select: {select!r} chooses by the keys held, but this model rebuilds its keys every step "
            "from its tokens; use select=None"
        )
    select.check(spec.key_dim)
    return select


def _within_window(policy: Policy, window: int | None) -> tuple[Policy, int | None]:
    """The policy a layer with this window really needs, and the window that reads must still respect."""
    if window is None:
        return policy, None
    if isinstance(policy, Full):
        return SlidingWindow(window), None
    if isinstance(policy, SlidingWindow):
        return SlidingWindow(min(window, policy.window)), None
    policy.reads(window)  # raises where the policy would look beyond the window
    return policy, window if policy.observes or decides(policy) else None
