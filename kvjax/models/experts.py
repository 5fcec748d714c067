"""A mixture of experts in place of the feed-forward block."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from kvjax.config import Experts, ModelConfig
from kvjax.models.layers import ACTIVATIONS, Bias, FeedForward, Kernel
from kvjax.models.linear import Linear

SIGMOID_SLOPE = 1.702
"""gpt-oss' gate is x * sigmoid(1.702 x)."""


class MixtureOfExperts(nn.Module):
    """Each token through its best few experts, and through the shared one if there is one. [B, T, hidden] -> the same.

    Tokens are sorted by expert and multiplied group by group (`jax.lax.ragged_dot`): an expert that nobody chose costs
    nothing, none has a capacity, and no token is dropped.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        experts = self.config.experts
        assert experts is not None
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = Router(experts, name="router")(flat)
        out = self._through(experts, flat, weights, chosen).reshape(x.shape)
        if experts.shared_intermediate_size:
            out = out + FeedForward(self.config, experts.shared_intermediate_size, name="shared")(x)
        return out

    def _through(self, experts: Experts, x: jax.Array, weights: jax.Array, chosen: jax.Array) -> jax.Array:
        """x [n, hidden], weights and chosen [n, per_token] -> the weighted sum of the chosen experts' outputs."""
        count, hidden, width = experts.count, x.shape[-1], experts.intermediate_size
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        expert = chosen.reshape(-1)[order]
        sizes = jnp.bincount(expert, length=count).astype(jnp.int32)

        def project(name: str, rows: jax.Array, into: int) -> jax.Array:
            out = jax.lax.ragged_dot(rows, Kernel((count, rows.shape[-1], into), name=f"experts_{name}")(), sizes)
            return out + Bias((count, into), name=f"experts_{name}_bias")()[expert] if experts.bias else out

        rows = x[order // experts.per_token]
        gate, up = project("gate", rows, width), project("up", rows, width)
        if experts.limit is None:
            inner = ACTIVATIONS[self.config.activation](gate) * up
        else:
            gate, up = jnp.minimum(gate, experts.limit), jnp.clip(up, -experts.limit, experts.limit)
            inner = (up + 1) * (gate * nn.sigmoid(SIGMOID_SLOPE * gate))
        out = project("down", inner, hidden)
        back = jnp.zeros_like(out).at[order].set(out).reshape(*chosen.shape, hidden)
        return jnp.sum(back * weights[..., None].astype(back.dtype), axis=1)


class Router(nn.Module):
    """Which experts a token goes through, and with which weights. x [n, hidden] -> weights f32, chosen int32 [n, k].

    Logits and scores are float32 whatever the weights: close ones decide which expert is chosen. Group-limited choice:
    DeepSeek-V2, 2405.04434, section 2.2.3; the bias that counts only for the choice: DeepSeek-V3, 2412.19437, section
    2.1.2.
    """

    experts: Experts

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        e = self.experts
        logits = Linear(e.count, use_bias=e.router_bias, dtype=jnp.float32, name="gate")(x)
        scores = nn.softmax(logits) if e.scoring == "softmax" else nn.sigmoid(logits)
        ranked = scores
        if e.selection_bias:
            ranked = scores + self.param("selection_bias", nn.initializers.zeros, (e.count,)).astype(jnp.float32)
        _, chosen = jax.lax.top_k(_within_groups(ranked, e), e.per_token)
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if e.normalize:
            weights = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-20)
        return weights * e.scaling_factor, chosen


def _within_groups(scores: jax.Array, experts: Experts) -> jax.Array:
    """scores [n, count], -inf outside each token's best groups."""
    if experts.groups == experts.groups_per_token:
        return scores
    grouped = scores.reshape(-1, experts.groups, experts.count // experts.groups)
    best, _ = jax.lax.top_k(grouped, min(1 if experts.group_score == "max" else 2, grouped.shape[-1]))
    _, groups = jax.lax.top_k(jnp.sum(best, axis=-1), experts.groups_per_token)
    allowed = jnp.any(groups[..., None] == jnp.arange(experts.groups), axis=1)
    return jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(scores.shape)
