"""The decoder: one module definition for training, prefill and decoding.

Parameters come in two layouts of the same numbers. Per layer (`layers_0`, `layers_1`, ...): what checkpoints hold and
what decoding wants, since a scan would copy each layer's weights out of the stack at every step. Stacked (`layers`,
each array with a leading axis L): what training wants, since a scan over layers compiles once. `stack_layers` and
`unstack_layers` convert.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from kvjax.config import LayerKind, ModelConfig
from kvjax.errors import ConfigError
from kvjax.models.attention import Attention
from kvjax.models.cross_attention import CrossAttention
from kvjax.models.experts import MixtureOfExperts
from kvjax.models.goldfinch import GoldFinchLayer, Source, source_of
from kvjax.models.latent_attention import LatentAttention
from kvjax.models.layers import FeedForward, norm_of
from kvjax.models.linear import Linear, product
from kvjax.models.retention import Retention
from kvjax.models.rotary import rotary
from kvjax.typing import Held, KeyValue, Params

HIDDEN_STATES = "hidden_states"
"""A collection: made mutable, each layer notes in it as "given" what it gives. Distillation asks for it."""


class Layer(nn.Module):
    """Attention and feed-forward with residuals. (x[B,T,hidden], cache) -> the same, and the layer's keys and values.

    The keys and values (None where no layer shares any) are what layers that read this one are given as `shared`.
    """

    config: ModelConfig
    attend: Any
    kind: LayerKind = LayerKind()

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Any], layer: Any, positions: jax.Array, shared: KeyValue | None = None
    ) -> tuple[tuple, KeyValue | None]:
        c = self.config
        x, cache = carry
        attention: Any = Attention if c.latent is None else LatentAttention
        if self.kind.retains:
            attention = Retention
        out, cache, own = attention(c, self.attend, self.kind, name="attention")(
            self._before("attention_norm", x), positions, layer, cache, shared
        )
        x = x + self._after("attention_post_norm", out)
        if self.kind.crosses:
            read = CrossAttention(c, self.attend, name="cross_attention")(norm_of(c, "cross_norm")(x), positions, cache)
            x = x if read is None else x + read
        mlp: Any = (MixtureOfExperts if self.kind.sparse else FeedForward)(c, name="mlp")
        x = x + self._after("mlp_post_norm", mlp(self._before("mlp_norm", x)))
        self.sow(HIDDEN_STATES, "given", x)
        return (x, cache), own if c.owners else None

    def _before(self, name: str, x: jax.Array) -> jax.Array:
        """What a block reads."""
        return x if self.config.norm_placement == "post" else norm_of(self.config, name)(x)

    def _after(self, name: str, out: jax.Array) -> jax.Array:
        """What a block adds."""
        return out if self.config.norm_placement == "pre" else norm_of(self.config, name)(out)


class Bridge(nn.Module):
    """The keys and values [B, T, K, D] that a cross-decoder reads, from the hidden states it is given."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> KeyValue:
        c = self.config
        normed = norm_of(c, "norm")(x)
        k, v = (
            Linear(c.num_kv_heads * c.width, use_bias=c.qkv_bias, name=name)(normed).reshape(
                *x.shape[:2], c.num_kv_heads, c.width
            )
            for name in ("k", "v")
        )
        return k, v


class Decoder(nn.Module):
    """A decoder-only transformer.

    Attributes:
      attend: an object with `begin(cache, tokens, positions)`, the call itself, and `end(cache)` (`kvjax.attention`).
      scan: layers are scanned over and parameters stacked, instead of unrolled and per layer; needs layers of one kind.
      remat: recompute each layer in the backward pass instead of keeping its activations (GoldFinch's are kept).
    """

    config: ModelConfig
    attend: Any
    scan: bool = False
    remat: bool = False

    def setup(self) -> None:
        c = self.config
        self.embed = nn.Embed(c.vocab_size, c.hidden_size, name="embed")
        if self.scan:
            body = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
            if not c.uniform:
                raise ConfigError(
                    "a scan over layers needs layers of one kind; this model mixes dense and sparse, owning and "
                    "reading, or local and global ones: unroll them (scan=False)"
                )
            scanned = nn.scan(
                body,
                variable_axes={"params": 0, HIDDEN_STATES: 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),
                length=c.num_layers,
            )
            self.layers: Any = scanned(c, self.attend, c.kind(0))
        elif c.goldfinch is not None:
            self.embed_norm = norm_of(c)
            self.layers = [GoldFinchLayer(c, self.attend, index) for index in range(c.num_layers)]
            self.compress = Linear(c.hidden_size // c.goldfinch.compression, use_bias=False)
            self.expand = Linear(c.hidden_size, use_bias=False)
        else:
            # The layer's number stays a number: attention may choose by it.
            one: Any = nn.remat(Layer, static_argnums=(2,)) if self.remat else Layer
            self.layers = [one(c, self.attend, c.kind(index)) for index in range(c.num_layers)]
        if c.cross_from is not None:
            self.bridge = Bridge(c)
        self.norm = norm_of(c)
        if not c.tie_word_embeddings:
            self.head = Linear(c.vocab_size, use_bias=False)

    def __call__(self, tokens: jax.Array, positions: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """tokens, positions int32[B, T] (position -1: padding) -> final hidden states [B, T, hidden] and the cache."""
        x = self.embed_tokens(tokens)
        cache = self.attend.begin(cache, tokens, positions)
        if self.scan:
            (x, cache), _ = self.layers((x, cache), jnp.arange(self.config.num_layers), positions)
        else:
            x, cache, shared = self._below(tokens, x, positions, cache)
            x, cache = through(self.config, self.layers, x, cache, positions, self._split, shared)
        return self.finish(x), self.attend.end(cache)

    def below(self, tokens: jax.Array, positions: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """Tokens through the layers below `read_from` only: hidden states [B, T, hidden] as it takes them, the cache.

        The keys and values that all layers above read are in the cache then: but for a text's last token, that is all.
        """
        cache = self.attend.begin(cache, tokens, positions)
        x, cache, _ = self._below(tokens, self.embed_tokens(tokens), positions, cache)
        return x, self.attend.end(cache)

    def above(self, x: jax.Array, positions: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """What `below` gave for tokens that the cache holds, through the rest -> final hidden states, the cache."""
        cache = self.attend.resume(cache, positions)
        shared = (None, None) if self.config.goldfinch is None else self.source(self.attend.held(cache, 0))
        x, cache = through(self.config, self.layers, x, cache, positions, self._split, shared)
        return self.finish(x), self.attend.end(cache)

    @property
    def _split(self) -> int:
        return self.config.num_layers if self.config.read_from is None else self.config.read_from

    def _below(
        self, tokens: jax.Array, x: jax.Array, positions: jax.Array, cache: Any, only: Container[int] | None = None
    ) -> tuple[jax.Array, Any, Any]:
        """Through the layers below `read_from`, or all; and what those above read."""
        c = self.config
        x, cache = through(c, self.layers[: self._split], x, cache, positions, only=only)
        if c.goldfinch is not None:
            compressed, ids = self.compress(x)[:, :, None], tokens[:, :, None, None]
            held, cache = self.attend.hold(cache, 0, compressed, ids, positions)
            return x, cache, self.source(held)
        if c.cross_from is None:
            return x, cache, None
        shared = self.bridge(x)
        return x, self.attend.put(cache, c.cache_layer(c.cross_from), *shared, positions, rotary(c)), shared

    def source(self, held: Held) -> Source:
        """What GoldFinch's upper layers rebuild keys and values from."""
        return source_of(held, self.embed_tokens(held.v[:, :, 0, 0]), self.expand)

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """int32[B, T] -> [B, T, hidden], what the first layer takes."""
        x = self.embed(tokens)
        if self.config.goldfinch is not None:
            return self.embed_norm(x)
        scale = self.config.embedding_scale
        # As the models that scale were trained: by the factor as their dtype holds it.
        return x if scale == 1 else x * jnp.asarray(scale, x.dtype)

    def finish(self, x: jax.Array) -> jax.Array:
        """What the last layer gives, normalised: the final hidden states."""
        return self.norm(x)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., hidden] -> float32[..., V]."""
        if self.config.tie_word_embeddings:
            weight = self.embed.embedding
        else:
            # Reading the weight rather than calling the module keeps the sum over `hidden` in float32.
            weight = self.head.variables["params"]["weight"]
        logits = product(hidden, weight, jnp.float32)
        cap = self.config.logit_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def initialise(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """Touches every parameter, but of unrolled layers those of `first_of_kind` alone; only for shape inference."""
        c = self.config
        if self.scan:
            hidden, _ = self(tokens, positions, None)
        else:
            only = set(first_of_kind(c))
            # And the layers whose keys and values those read.
            only |= {c.owners[index] for index in only if c.kind(index).reads}
            x, cache, shared = self._below(tokens, self.embed_tokens(tokens), positions, None, only)
            x, _ = through(c, self.layers, x, cache, positions, self._split, shared, only)
            hidden = self.finish(x)
        return self.logits(hidden) if c.tie_word_embeddings else self.head(hidden)


def first_of_kind(config: ModelConfig) -> tuple[int, ...]:
    """Per layer, the first layer that has parameters of the same shapes: a hundred layers are of few kinds."""
    if config.goldfinch is not None:
        return tuple(range(config.num_layers))
    kinds = [config.kind(index) for index in range(config.num_layers)]
    return tuple(kinds.index(kind) for kind in kinds)


def through(
    config: ModelConfig,
    layers: Sequence[Any],
    x: jax.Array,
    cache: Any,
    positions: jax.Array,
    first: int = 0,
    shared: Any = None,
    only: Container[int] | None = None,
) -> tuple[jax.Array, Any]:
    """x [B, T, hidden] through layers[first:]; what owners make of it is handed to their readers.

    `shared`: what layers from `read_from` on read. `only`: layers that are not left out.
    """
    made: dict[int, Any] = {} if config.read_from is None else {config.read_from: shared}
    for index, layer in enumerate(layers[first:], first):
        if only is not None and index not in only:
            continue
        given = made[config.owners[index]] if config.kind(index).reads else None
        (x, cache), own = layer((x, cache), config.cache_layer(index), positions, given)
        if config.owners and not config.kind(index).reads:
            made[index] = own
    return x, cache


def stack_layers(params: Params) -> Params:
    """Per-layer parameters (`layers_0`, ...) to the stacked layout (`layers`, leading axis L)."""
    rest = {name: value for name, value in params.items() if not name.startswith("layers_")}
    count = len(params) - len(rest)
    layers = [params[f"layers_{i}"] for i in range(count)]
    return {**rest, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def unstack_layers(params: Params) -> Params:
    """The stacked layout back to per-layer parameters."""
    rest = {name: value for name, value in params.items() if name != "layers"}
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    for i in range(count):
        rest[f"layers_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
    return rest
