"""RMSNorm and the gated feed-forward block."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from kvjax.config import ModelConfig
from kvjax.models.linear import Linear

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
}


def unit_rms(x: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32 whatever the input (Zhang and Sennrich 2019, 1910.07467).

    With `unit_offset` the factor is 1 + scale, and so is the product in float32 (Gemma).
    """

    eps: float
    unit_offset: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        normed = unit_rms(x, self.eps)
        if self.unit_offset:
            return (normed * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)
        return normed.astype(x.dtype) * scale


class LayerNorm(nn.Module):
    """(x - mean) / deviation * scale + bias over the last axis, in float32 within (Ba et al. 2016, 1607.06450)."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        return (unit_rms(centred, self.eps) * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


class Kernel(nn.Module):
    """A weight [in, out] per expert, as `jax.lax.ragged_dot` wants them: [experts, in, out]."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> jax.Array:
        kernel: jax.Array = self.param("kernel", nn.initializers.lecun_normal(), self.shape)
        return kernel


class Bias(nn.Module):
    """A bias, or a bias per expert."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> jax.Array:
        bias: jax.Array = self.param("bias", nn.initializers.zeros, self.shape)
        return bias


def norm_of(config: ModelConfig, name: str | None = None) -> RMSNorm | LayerNorm:
    """A model's kind of norm."""
    if config.goldfinch is not None:
        return LayerNorm(config.goldfinch.norm_eps, name=name)
    return RMSNorm(config.norm_eps, config.norm_unit_offset, name=name)


class FeedForward(nn.Module):
    """A gated unit, down(act(gate(x)) * up(x)): with silu SwiGLU (Shazeer 2020, 2002.05202). [B,T,hidden] -> the same.

    Attributes:
      width: None: the config's intermediate_size.
    """

    config: ModelConfig
    width: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, bias = self.width or self.config.intermediate_size, self.config.mlp_bias
        gate = Linear(width, use_bias=bias, name="gate")(x)
        up = Linear(width, use_bias=bias, name="up")(x)
        return Linear(self.config.hidden_size, use_bias=bias, name="down")(
            ACTIVATIONS[self.config.activation](gate) * up
        )
