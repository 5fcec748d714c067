"""Gated retention (YOCO, Sun et al. 2024, 2405.05254, section 2.2): attention without a softmax, as a recurrence."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from kvjax.config import LayerKind, ModelConfig
from kvjax.models.layers import unit_rms
from kvjax.models.linear import Linear
from kvjax.models.rotary import rotary
from kvjax.typing import KeyValue

GATE_TEMPERATURE = 16.0
"""The decay is sigmoid(gate) ** (1 / 16): near 1 where training starts, so that memory is long."""

CHUNK = 256
"""Tokens computed in parallel; chunks follow one another through the state."""


class Retention(nn.Module):
    """S_t = decay_t S_{t-1} + k_t^T v_t / sqrt(D), out_t = q_t S_t, per head, in float32; then a norm and a gate.

    The state S, float32[B, H, D, D], is all that is remembered: its size does not depend on the text's length.
    """

    config: ModelConfig
    attend: Any
    kind: LayerKind

    @nn.compact
    def __call__(
        self, x: jax.Array, positions: jax.Array, layer: Any, cache: Any, shared: KeyValue | None = None
    ) -> tuple[jax.Array, Any, None]:
        c = self.config
        width = c.num_heads * c.width
        q, k, v = (
            Linear(width, use_bias=False, name=name)(x).reshape(*x.shape[:2], c.num_heads, c.width)
            for name in ("q", "k", "v")
        )
        gate = Linear(c.num_heads, use_bias=False, name="decay")(x)
        log_decay = nn.log_sigmoid(gate.astype(jnp.float32)) / GATE_TEMPERATURE
        rotate = rotary(c)
        q, k = rotate(q, positions), rotate(k, positions) * jnp.asarray(c.width**-0.5, k.dtype)
        before = self.attend.state(cache, layer)
        start = jnp.zeros((x.shape[0], c.num_heads, c.width, c.width)) if before is None else before[0]
        out, state = retain(q, k, v, log_decay, positions >= 0, start)
        cache = self.attend.keep(cache, layer, (state,))
        out = unit_rms(out, c.norm_eps).astype(x.dtype).reshape(*x.shape[:2], width)
        out = nn.silu(Linear(width, use_bias=False, name="gate")(x)) * out
        return Linear(c.hidden_size, use_bias=False, name="o")(out), cache, None


def retain(
    q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, real: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The recurrence over T tokens, a chunk at a time in parallel.

    Args:
      q, k, v: [B, T, H, D], rotated, k scaled. log_decay: float32[B, T, H], at most 0.
      real: bool[B, T]; other tokens neither decay nor enter the state.
      state: float32[B, H, D, D], keys by values.

    Returns:
      out float32[B, T, H, D] and the state after the last token.
    """
    length = q.shape[1]
    size = min(CHUNK, length)
    missing = -length % size
    q, k, v = (jnp.pad(x.astype(jnp.float32), ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (q, k, v))
    real = jnp.pad(real, ((0, 0), (0, missing)))
    log_decay = jnp.where(real[..., None], jnp.pad(log_decay, ((0, 0), (0, missing), (0, 0))), 0.0)
    k = jnp.where(real[..., None, None], k, 0.0)

    def chunks(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    def one(state: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q, k, v, log_decay = inputs
        total = jnp.cumsum(jnp.moveaxis(log_decay, 1, 2), axis=-1)  # [B, H, t]
        between = total[..., :, None] - total[..., None, :]
        # Masked before the exponential: above the diagonal it would overflow.
        weights = jnp.exp(jnp.where(jnp.tril(jnp.ones((size, size), bool)), between, -jnp.inf))
        inside = jnp.einsum("bthd,bshd->bhts", q, k) * weights
        out = jnp.einsum("bhts,bshd->bthd", inside, v)
        out = out + jnp.einsum("bthd,bhde,bht->bthe", q, state, jnp.exp(total))
        left = jnp.exp(total[..., -1:] - total)
        added = jnp.einsum("bshd,bshe,bhs->bhde", k, v, left)
        return state * jnp.exp(total[..., -1])[..., None, None] + added, out

    state, out = jax.lax.scan(one, state, tuple(map(chunks, (q, k, v, log_decay))))
    out = jnp.moveaxis(out, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])
    return out[:, :length], state
