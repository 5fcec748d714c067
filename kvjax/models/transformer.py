"""The decoder: one module definition for training, prefill and decoding.

Parameters come in two layouts of the same numbers. Per layer (`layers_0`, `layers_1`, ...): what checkpoints hold and
what decoding wants, since a scan would copy each layer's weights out of the stack at every step. Stacked (`layers`,
each array with a leading axis L): what training wants, since a scan over layers compiles once. `stack_layers` and
`unstack_layers` convert.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from kvjax.config import ModelConfig
from kvjax.models.attention import Attention
from kvjax.models.layers import FeedForward, RMSNorm
from kvjax.typing import Params


class Layer(nn.Module):
    """Pre-norm attention and feed-forward with residuals. (x[B,T,hidden], cache) -> the same."""

    config: ModelConfig
    attend: Any

    @nn.compact
    def __call__(self, carry: tuple[jax.Array, Any], layer: Any, positions: jax.Array) -> tuple[tuple, None]:
        x, cache = carry
        normed = RMSNorm(self.config.norm_eps, name="attention_norm")(x)
        out, cache = Attention(self.config, self.attend, name="attention")(normed, positions, layer, cache)
        x = x + out
        normed = RMSNorm(self.config.norm_eps, name="mlp_norm")(x)
        return (x + FeedForward(self.config, name="mlp")(normed), cache), None


class Decoder(nn.Module):
    """A decoder-only transformer.

    Attributes:
      attend: an object with `begin(cache, tokens, positions)`, the call itself, and `end(cache)` (`kvjax.attention`).
      scan: layers are scanned over and parameters stacked, instead of unrolled and per layer.
      remat: with `scan`, recompute each layer in the backward pass instead of keeping its activations.
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
            scanned = nn.scan(
                body,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),
                length=c.num_layers,
            )
            self.layers: Any = scanned(c, self.attend)
        else:
            self.layers = [Layer(c, self.attend) for _ in range(c.num_layers)]
        self.norm = RMSNorm(c.norm_eps)
        if not c.tie_word_embeddings:
            self.head = nn.Dense(c.vocab_size, use_bias=False)

    def __call__(self, tokens: jax.Array, positions: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """tokens, positions int32[B, T] (position -1: padding) -> final hidden states [B, T, hidden] and the cache."""
        x = self.embed_tokens(tokens)
        cache = self.attend.begin(cache, tokens, positions)
        if self.scan:
            (x, cache), _ = self.layers((x, cache), jnp.arange(self.config.num_layers), positions)
        else:
            for index, layer in enumerate(self.layers):
                (x, cache), _ = layer((x, cache), index, positions)
        return self.finish(x), self.attend.end(cache)

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """int32[B, T] -> [B, T, hidden], what the first layer takes."""
        return self.embed(tokens)

    def finish(self, x: jax.Array) -> jax.Array:
        """What the last layer gives, normalised: the final hidden states."""
        return self.norm(x)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., hidden] -> float32[..., V]."""
        if self.config.tie_word_embeddings:
            kernel = self.embed.embedding.T
        else:
            # Reading the weight rather than calling the module keeps the sum over `hidden` in float32.
            kernel = self.head.variables["params"]["kernel"]
        return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)

    def initialise(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """Touches every parameter; only for `init` and shape inference."""
        hidden, _ = self(tokens, positions, None)
        return self.logits(hidden) if self.config.tie_word_embeddings else self.head(hidden)


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
