"""GoldFinch (Goldstein et al. 2024, 2407.12077): recurrent layers, and above them attention to keys that nobody stores.

Lower layers are Finch-C2, a refined RWKV-6: a matrix per head that decays channel by channel. What they make of a token
is compressed to a few numbers; these and the token's id are all that is cached, once for all upper layers. Upper layers
(GOLD) are softmax attention whose keys are rebuilt from the compressed vector and the embedding, and whose values from
the embedding alone, each mixed with its predecessor's. Both kinds end with RWKV's channel mixing.

Every mixing needs the token before. Of a chunk's first token that is what the layer was given last, kept in float32
beside the matrices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from kvjax.config import ModelConfig
from kvjax.models.finch import remember
from kvjax.models.layers import LayerNorm
from kvjax.models.linear import Linear
from kvjax.models.rotary import rotary
from kvjax.typing import Held


class Source(NamedTuple):
    """What every upper layer rebuilds its keys and values from.

    Attributes:
      keys, values: [B, S, hidden], both of root mean square 1: from compressed vectors and embeddings, from embeddings.
      positions: int32[B, S], -1 where nothing is held.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array


def source_of(held: Held, embedded: jax.Array, expand: Any) -> Source:
    """From what is held, and the embeddings [B, S, hidden] of the held ids; expand: [hidden + compressed] -> hidden."""
    keys = expand(jnp.concatenate([embedded, held.k[:, :, 0]], axis=-1))
    return Source(unit_root(keys), unit_root(embedded), held.positions)


def unit_root(x: jax.Array) -> jax.Array:
    """x / (rms(x) + 1e-8) over the last axis, in float32 within; rows of zeros stay zero."""
    wide = x.astype(jnp.float32)
    square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    # The root has no slope at zero, where padding lies.
    root = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return (wide / (root + 1e-8)).astype(x.dtype)


def predecessors(x: jax.Array, real: jax.Array, last: jax.Array | None) -> jax.Array:
    """Each token's predecessor: x [B, T, hidden], real bool[B, T] -> [B, T, hidden].

    A token that follows no real one of the same call, be it the first or behind padding, has `last` [B, hidden], what
    came before the call; None: zeros.
    """
    before = jnp.zeros_like(x[:, :1]) if last is None else last[:, None].astype(x.dtype)
    shifted = jnp.concatenate([before, x[:, :-1]], axis=1)
    follows = jnp.pad(real[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(follows[..., None], shifted, before)


def newest(x: jax.Array, real: jax.Array, last: jax.Array | None) -> jax.Array:
    """The last real token of each row of x [B, T, hidden], or what there was before, where there is none: float32."""
    place = jnp.max(jnp.where(real, jnp.arange(x.shape[1]), -1), axis=1)
    found = jnp.take_along_axis(x, jnp.maximum(place, 0)[:, None, None], axis=1)[:, 0].astype(jnp.float32)
    before = jnp.zeros_like(found) if last is None else last
    return jnp.where((place >= 0)[:, None], found, before)


class GoldFinchLayer(nn.Module):
    """A lower or an upper layer with its residuals. (x [B, T, hidden], cache) -> the same.

    Attributes:
      number: which of the model's layers.
    """

    config: ModelConfig
    attend: Any
    number: int

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Any], layer: Any, positions: jax.Array, shared: Source | None = None
    ) -> tuple[tuple, None]:
        """`shared`: what upper layers rebuild keys and values from; None for lower ones."""
        c = self.config
        assert c.goldfinch is not None
        x, cache = carry
        real = positions >= 0
        state = self.attend.state(cache, self.number)
        shift, mlp_shift, *memory = state or (None,) * 3
        eps = c.goldfinch.norm_eps
        normed = LayerNorm(eps, name="attention_norm")(x)
        before = predecessors(normed, real, shift)
        if shared is None:
            out, *memory = TimeMix(c, name="time_mix")(normed, before, real, memory[0])
        else:
            out = GoldAttention(c, self.attend, name="attention")(normed, before, positions, shared)
            memory = []
        x = x + out
        mlp_normed = LayerNorm(eps, name="mlp_norm")(x)
        x = x + ChannelMix(c, name="channel_mix")(mlp_normed, predecessors(mlp_normed, real, mlp_shift))
        kept = (newest(normed, real, shift), newest(mlp_normed, real, mlp_shift), *memory)
        return (x, self.attend.keep(cache, self.number, kept)), None


class TimeMix(nn.Module):
    """Finch-C2: r, k, v and a decay from mixtures with the predecessor, a memory per head, one norm over all heads.

    What a token reads is what was remembered before it; itself it gives by a second value that goes past the memory.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, before: jax.Array, real: jax.Array, memory: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Normed x and its predecessors [B, T, hidden]; memory float32[B, H, D, D] or None -> out and the memory."""
        c, g = self.config, self.config.goldfinch
        assert g is not None
        hidden, split = c.hidden_size, (*x.shape[:2], c.num_heads, c.width)
        by = before - x
        for_r, for_k, for_v, for_decay, for_second = (x + by * taken for taken in mixture(self, 5, g.mix_rank, x, by))
        r, k = (
            Linear(hidden, use_bias=False, name=name)(mixed).astype(jnp.float32)
            for name, mixed in (("r", for_r), ("k", for_k))
        )
        value = Linear(hidden, use_bias=False, name="v")
        speed = self.param("decay", nn.initializers.zeros, (hidden,))
        speed = speed + low_rank(self, "decay", g.decay_rank, for_decay)
        log_decay = -jnp.exp(speed.astype(jnp.float32))
        k = k * -jnp.expm1(log_decay)
        second = value(for_second) + low_rank(self, "second", g.decay_rank, for_second)
        if memory is None:
            memory = jnp.zeros((x.shape[0], c.num_heads, c.width, c.width), jnp.float32)
        r, k, v, log_decay = (part.reshape(split) for part in (r, k, value(for_v), log_decay))
        out, memory = remember(r, k, v, log_decay, real, memory)
        out = out.reshape(x.shape) + second.astype(jnp.float32)
        out = LayerNorm(g.norm_eps, name="norm")(out).astype(x.dtype)
        return Linear(hidden, use_bias=False, name="o")(out), memory


class GoldAttention(nn.Module):
    """Softmax attention to rebuilt keys and values; only the query has a projection of its own."""

    config: ModelConfig
    attend: Any

    @nn.compact
    def __call__(self, x: jax.Array, before: jax.Array, positions: jax.Array, source: Source) -> jax.Array:
        """Normed x and its predecessors [B, T, hidden], positions int32[B, T] -> [B, T, hidden]."""
        c, g = self.config, self.config.goldfinch
        assert g is not None
        hidden = c.hidden_size

        def heads(name: str, y: jax.Array) -> jax.Array:
            return LayerNorm(g.norm_eps, name=name)(y).reshape(*y.shape[:2], c.num_heads, c.width)

        by = before - x
        (taken,) = mixture(self, 1, g.mix_rank, x, by)
        q = heads("q_norm", Linear(hidden, use_bias=False, name="q")(x + by * taken))
        held = source.positions >= 0
        by_key, by_value = (predecessors(y, held, None) - y for y in (source.keys, source.values))
        key_taken, value_taken = mixture(self, 2, g.mix_rank, source.values, by_value, "source_shift")
        rank = g.value_rank or max(hidden // 16, 64)
        k, v = source.keys + by_key * key_taken, source.values + by_value * value_taken
        k = heads("k_norm", k + low_rank(self, "key", rank, k))
        v = heads("v_norm", v + low_rank(self, "value", rank, v))
        rotate = rotary(c) if g.rope else unturned
        out = self.attend.over(q, k, v, source.positions, positions, rotate).reshape(x.shape)
        out = LayerNorm(g.norm_eps, name="out_norm")(out)
        return Linear(hidden, use_bias=False, name="o")(out)


class ChannelMix(nn.Module):
    """sigmoid(W_r x_r) * W_v relu(W_k x_k)^2, x_k and x_r mixed with the predecessor by fixed parts (RWKV-6)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, before: jax.Array) -> jax.Array:
        """Normed x and its predecessors [B, T, hidden] -> [B, T, hidden]."""
        c = self.config
        shift = self.param("shift", nn.initializers.zeros, (2, c.hidden_size))
        for_k, for_r = (x + (before - x) * taken for taken in shift)
        inner = jnp.square(nn.relu(Linear(c.intermediate_size, use_bias=False, name="key")(for_k)))
        gate = nn.sigmoid(Linear(c.hidden_size, use_bias=False, name="receptance")(for_r))
        return gate * Linear(c.hidden_size, use_bias=False, name="value")(inner)


def mixture(
    module: nn.Module, count: int, rank: int, x: jax.Array, by: jax.Array, name: str = "shift"
) -> list[jax.Array]:
    """How much of its predecessor, x + by, a token takes for each of `count` purposes: as many [B, T, hidden].

    mu + tanh((x + by mu_x) W_down) W_up, RWKV-6's data-dependent interpolation; the parameters are the module's own.
    """
    hidden = x.shape[-1]
    first = module.param(f"{name}_x", nn.initializers.zeros, (hidden,))
    fixed = module.param(name, nn.initializers.zeros, (count, hidden))
    down = module.param(f"{name}_down", nn.initializers.zeros, (hidden, count * rank))
    up = module.param(f"{name}_up", nn.initializers.zeros, (count, rank, hidden))
    low = jnp.tanh((x + by * first) @ down).reshape(*x.shape[:2], count, rank)
    return [fixed[n] + low[:, :, n] @ up[n] for n in range(count)]


def low_rank(module: nn.Module, name: str, rank: int, x: jax.Array) -> jax.Array:
    """tanh(x W_down) W_up, [..., hidden] -> [..., hidden], by parameters of the module."""
    hidden = x.shape[-1]
    down = module.param(f"{name}_down", nn.initializers.zeros, (hidden, rank))
    up = module.param(f"{name}_up", nn.initializers.zeros, (rank, hidden))
    return jnp.tanh(x @ down) @ up


def unturned(x: jax.Array, positions: jax.Array) -> jax.Array:
    """x, of whatever position."""
    return x
