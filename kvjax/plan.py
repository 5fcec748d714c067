"""`plan`: what a cache will cost, computed from the same layouts that build the live one, before anything is built."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from kvjax.cache.config import CacheConfig
from kvjax.cache.layout import GroupLayout, KVSpec, context_layout, group_layers
from kvjax.cache.size import power_of_two, size_groups
from kvjax.config import ModelConfig, build, read_toml
from kvjax.errors import ConfigError

UNBOUNDED = 1 << 50
"""Tokens beyond what any memory holds: a policy that fits as many has a bounded cache."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What keys and values cost for `batch` sequences of `context` tokens each.

    Attributes:
      context, batch: what was planned for.
      elements_per_token: key and value elements of one token over all layers and heads, before any codec.
      bytes_per_token: bytes one held token takes over all layers and heads, codec scales included.
      bytes_per_layer: bytes each layer's share of the pages in use takes; they add up to total_bytes.
      pages: pages in use, per group of layers that share a pool.
      total_bytes: bytes of the pages in use, the last page of each row rounded up.
      pool_bytes: bytes `kvjax.generate` allocates for such a call: sizes that nobody fixed round up to powers of two.
      recurrent_bytes: bytes of what layers without keys and values remember, whatever the context.
      read_bytes: bytes that one step's attention reads for all sequences at this context (`GroupLayout.bytes_read`).
      context_bytes_per_token: bytes one token of an encoded context takes for all layers together; 0: no encoder. No
        context is counted above.
      layouts: the groups themselves.
    """

    context: int
    batch: int
    elements_per_token: int
    bytes_per_token: int
    bytes_per_layer: tuple[int, ...]
    pages: tuple[int, ...]
    total_bytes: int
    pool_bytes: int
    recurrent_bytes: int
    read_bytes: int
    context_bytes_per_token: int
    layouts: tuple[GroupLayout, ...] = dataclasses.field(repr=False)

    def bytes_at(self, tokens: int) -> int:
        """Bytes of the pages that `batch` sequences of `tokens` tokens each use."""
        return self.batch * sum(
            layout.pages_per_sequence(tokens) * layout.page_bytes + layout.tail_bytes for layout in self.layouts
        )

    def tokens_that_fit(self, memory_bytes: int) -> int | float:
        """The longest context at which `batch` sequences fit; infinity if all do, as in a bounded cache."""
        if memory_bytes < 0:
            raise ConfigError(f"memory_bytes must not be negative, got {memory_bytes}")
        if self.bytes_at(UNBOUNDED) <= memory_bytes:
            return math.inf
        fits, exceeds = 0, UNBOUNDED
        while exceeds - fits > 1:
            middle = (fits + exceeds) // 2
            if self.bytes_at(middle) <= memory_bytes:
                fits = middle
            else:
                exceeds = middle
        return fits


def plan(
    config: ModelConfig | KVSpec | str | Path,
    cache: CacheConfig = CacheConfig(),
    context: int = 4096,
    batch: int = 1,
    dtype: str | None = None,
) -> Plan:
    """What a cache costs, layer by layer, without building it.

    Args:
      config: a model's config, what it asks of its cache, or the path of a TOML file with either (`read_shape`).
      cache: how keys and values are kept; layers that the model itself windows never hold more than their window.
      context: tokens per sequence, prompt and generated together. batch: sequences.
      dtype: of the model's keys and values; None: the config's own, and bfloat16 for a `KVSpec`.

    Raises:
      ConfigError: context or batch below 1, or a cache that cannot serve this model.
    """
    if isinstance(config, str | Path):
        config = read_shape(config)
    if context < 1 or batch < 1:
        raise ConfigError(f"plan needs context and batch of at least 1, got {context} and {batch}")
    if isinstance(config, ModelConfig):
        spec, windows, own = config.kv_spec, config.cache_windows, config.dtype
        states = sum(math.prod(shape) for shapes in config.recurrent_shapes for shape in shapes)
    else:
        spec, windows, own, states = config, (), "bfloat16", 0
    layouts = group_layers(spec, windows, cache, dtype or own)
    pages = tuple(batch * layout.pages_per_sequence(context) for layout in layouts)
    per_layer = {
        layer: (count * layout.page_bytes + batch * layout.tail_bytes) // len(layout.layers)
        for layout, count in zip(layouts, pages, strict=True)
        for layer in layout.layers
    }
    pools = size_groups(layouts, power_of_two(batch), context, cache.memory_bytes)
    read = config.context_spec if isinstance(config, ModelConfig) else None
    beside = context_layout(read, cache, dtype or own).bytes_per_token if read else 0
    return Plan(
        context=context,
        batch=batch,
        elements_per_token=spec.elements_per_token,
        bytes_per_token=sum(layout.bytes_per_token for layout in layouts),
        bytes_per_layer=tuple(per_layer[layer] for layer in sorted(per_layer)),
        pages=pages,
        total_bytes=sum(per_layer.values()),
        pool_bytes=sum(
            count * layout.page_bytes + power_of_two(batch) * layout.tail_bytes
            for layout, (_, count) in zip(layouts, pools, strict=True)
        ),
        recurrent_bytes=4 * batch * states,
        read_bytes=batch * sum(layout.bytes_read(context) for layout in layouts),
        context_bytes_per_token=beside,
        layouts=layouts,
    )


def read_shape(path: str | Path) -> ModelConfig | KVSpec:
    """A TOML file's `[model]` table, or its `[kv]` table, which models have that kvjax can only plan for."""
    table = read_toml(path)
    if "kv" in table:
        spec: KVSpec = build(KVSpec, table["kv"], f"{path}: kv")
        for name in ("layers", "kv_heads", "key_dim", "value_dim"):
            value = getattr(spec, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{path}: kv: {name} must be a positive integer, got {value!r}")
        return spec
    return ModelConfig.from_toml(path)


def attention_kinds(
    layers: int,
    heads: int,
    head_dim: int,
    groups: int,
    kv_lora_rank: int | None = None,
    rope_head_dim: int | None = None,
) -> dict[str, KVSpec]:
    """The same shape under each kind of attention; `elements_per_token` of each is the kind's formula.

    MHA 2 n_h d_h l; GQA 2 n_g d_h l (Ainslie et al. 2023, 2305.13245); MQA 2 d_h l (Shazeer 2019, 1911.02150);
    MLA (d_c + d_h^R) l (DeepSeek-V2 2024, 2405.04434).

    Args:
      layers: l. heads: n_h. head_dim: d_h. groups: n_g, the KV heads of GQA.
      kv_lora_rank, rope_head_dim: d_c and d_h^R; None: DeepSeek's choice, 4 d_h and d_h / 2.
    """
    latent = 4 * head_dim if kv_lora_rank is None else kv_lora_rank
    rotated = head_dim // 2 if rope_head_dim is None else rope_head_dim
    return {
        "MHA": KVSpec(layers, heads, head_dim, head_dim),
        "GQA": KVSpec(layers, groups, head_dim, head_dim),
        "MQA": KVSpec(layers, 1, head_dim, head_dim),
        "MLA": KVSpec(layers, 1, latent + rotated, latent, value_in_key=True),
    }
