"""Projections, with weights as checkpoints store them: [out, in]."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

FEW_ROWS = 32
"""Up to here a product on a CPU costs what reading the weight costs, and `few_rows` reads it best."""
INITIAL = nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)


class Weight(nn.Module):
    """A weight [out, in] that its user multiplies with in a way of its own."""

    shape: tuple[int, int]

    @nn.compact
    def __call__(self) -> jax.Array:
        weight: jax.Array = self.param("weight", INITIAL, self.shape)
        return weight


class Linear(nn.Module):
    """x W^T + b, like `flax.linen.Dense` with the weight the other way round. [..., in] -> [..., features].

    The parameter `weight` [features, in] lies in memory as in a Hugging Face checkpoint, so that loading turns nothing.

    Attributes:
      dtype: of the product; None: what x and the parameters promote to.
    """

    features: int
    use_bias: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.param("weight", INITIAL, (self.features, x.shape[-1]))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        x, weight, bias = promote_dtype(x, weight, bias, dtype=self.dtype)
        out = product(x, weight)
        return out if bias is None else out + bias


def product(x: jax.Array, weight: jax.Array, dtype: Any = None) -> jax.Array:
    """x [..., in] times weight [out, in] -> [..., out], summed and given in `dtype` (None: x's)."""
    rows = math.prod(x.shape[:-1])
    if jax.default_backend() == "cpu" and 1 < rows <= FEW_ROWS:
        return few_rows(x.reshape(rows, -1), weight, dtype).reshape(*x.shape[:-1], -1)
    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype)


def few_rows(x: jax.Array, weight: jax.Array, dtype: Any) -> jax.Array:
    """The same for x [rows, in], as W x^T.

    The barrier keeps XLA from turning the product back into x W^T, whose CPU code takes half as long again on 2 to 32
    rows.
    """
    turned = jax.lax.optimization_barrier(jnp.matmul(weight, x.T, preferred_element_type=dtype))
    return turned.T
