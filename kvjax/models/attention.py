"""Self-attention with as many key-value heads as the config says: MHA, GQA (Ainslie et al. 2023, 2305.13245) or MQA."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from kvjax.config import LayerKind, ModelConfig
from kvjax.models.layers import norm_of
from kvjax.models.linear import Linear
from kvjax.models.merged_keys import MergedKeys, unturned
from kvjax.models.rotary import rotary
from kvjax.typing import KeyValue, Rotate, Scoring


class Attention(nn.Module):
    """Projects, normalises q and k if asked, and hands them unrotated to `attend`, which decides what is attended.

    `attend(cache, layer, q[B,T,H,D], k[B,T,K,D], v[B,T,K,D], positions, rotate) -> (out[B,T,H,D], cache)`. A layer that
    reads another's keys and values is given them as `shared`, and says so to `attend`. Merged keys, and the queries for
    them, are handed over rotated, with a `rotate` that leaves them so.
    """

    config: ModelConfig
    attend: Any
    kind: LayerKind

    @nn.compact
    def __call__(
        self, x: jax.Array, positions: jax.Array, layer: Any, cache: Any, shared: KeyValue | None = None
    ) -> tuple[jax.Array, Any, KeyValue]:
        c = self.config
        q = self._project("q", x, c.num_heads)
        rotate: Rotate = rotary(c, self.kind.local)
        if shared is None:
            k, v = self._project("k", x, c.key_heads), self._project("v", x, c.num_kv_heads)
        else:
            k, v = shared
        if c.merged_keys is not None:
            q, k = MergedKeys(c, name="key_merge")(rotate(q, positions), rotate(k, positions))
            rotate = unturned
        out, cache = self.attend(
            cache, layer, scaled(q, c.query_scale), k, v, positions, rotate, **self._options(shared)
        )
        out = out.reshape(*x.shape[:2], c.num_heads * c.width)
        return Linear(c.hidden_size, use_bias=c.o_bias, name="o")(out), cache, (k, v)

    def _project(self, name: str, x: jax.Array, heads: int) -> jax.Array:
        """[B, T, hidden] -> [B, T, heads, D], normalised if the model does."""
        c = self.config
        y = Linear(heads * c.width, use_bias=c.qkv_bias, name=name)(x)
        if c.qk_norm_whole and name != "v":
            y = norm_of(c, f"{name}_norm")(y)
        y = y.reshape(*x.shape[:2], heads, c.width)
        return norm_of(c, f"{name}_norm")(y) if c.qk_norm and name != "v" else y

    def _options(self, shared: KeyValue | None) -> dict[str, Any]:
        """What only some models ask of `attend`; one that does not know it refuses the call."""
        c = self.config
        options: dict[str, Any] = {}
        if c.attention_sinks or c.attention_soft_cap is not None:
            sinks = self.param("sinks", nn.initializers.zeros, (c.num_heads,)) if c.attention_sinks else None
            options["scoring"] = Scoring(c.attention_soft_cap, sinks)
        if shared is not None:
            options["write"] = False
        return options


def scaled(q: jax.Array, scale: float | None) -> jax.Array:
    """q, so that `attend`, which divides scores by the root of q's width, in effect multiplies them by `scale`."""
    return q if scale is None else q * jnp.asarray(scale * q.shape[-1] ** 0.5, q.dtype)
