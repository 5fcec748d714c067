"""Multi-head latent attention (DeepSeek-V2 2024, 2405.04434, section 2.1)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from kvjax.config import LayerKind, ModelConfig
from kvjax.models.attention import scaled
from kvjax.models.layers import RMSNorm
from kvjax.models.linear import Linear, Weight
from kvjax.models.rotary import rotary
from kvjax.typing import KeyValue, Scoring


class LatentAttention(nn.Module):
    """Keys and values of all heads come from one latent per token; a few columns beside it carry the position.

    Without a cache (`attend.latent` false) the latent is expanded to keys and values per head: the naive form. With
    one, the expansion is absorbed into the query and the output instead: a single KV head whose key is the latent and
    the rotated columns, and whose value is the latent, so that nothing else is ever held.
    """

    config: ModelConfig
    attend: Any
    kind: LayerKind

    @nn.compact
    def __call__(
        self, x: jax.Array, positions: jax.Array, layer: Any, cache: Any, shared: KeyValue | None = None
    ) -> tuple[jax.Array, Any, KeyValue]:
        c, a = self.config, self.config.latent
        assert a is not None
        heads = (*x.shape[:2], c.num_heads)

        def norm(name: str) -> RMSNorm:
            return RMSNorm(a.norm_eps, c.norm_unit_offset, name=name)

        if a.q_lora_rank is None:
            q = Linear(c.num_heads * a.qk_head_dim, use_bias=a.q_bias, name="q")(x)
        else:
            q = Linear(a.q_lora_rank, use_bias=c.qkv_bias, name="q_down")(x)
            q = Linear(c.num_heads * a.qk_head_dim, use_bias=False, name="q_up")(norm("q_norm")(q))
        q = q.reshape(*heads, a.qk_head_dim)
        down = Linear(a.key_dim, use_bias=c.qkv_bias, name="kv_down")(x)
        latent, rope = jnp.split(down, [a.kv_lora_rank], axis=-1)
        latent = norm("kv_norm")(latent) if a.kv_norm else latent
        both = a.qk_nope_head_dim + a.v_head_dim
        weight = Weight((c.num_heads * both, a.kv_lora_rank), name="kv_up")()
        expand = weight.reshape(c.num_heads, both, a.kv_lora_rank)
        scale = a.qk_head_dim**-0.5 if c.query_scale is None else c.query_scale
        options = {} if c.attention_soft_cap is None else {"scoring": Scoring(c.attention_soft_cap, None)}

        def attended(q: jax.Array, k: jax.Array, v: jax.Array | None) -> tuple[jax.Array, Any]:
            out: tuple[jax.Array, Any] = self.attend(
                cache, layer, scaled(q, scale), k, v, positions, rotary(c), **options
            )
            return out

        if getattr(self.attend, "latent", False):
            nope, turned = jnp.split(q, [a.qk_nope_head_dim], axis=-1)
            absorbed = jnp.einsum("bthd,hdr->bthr", nope, expand[:, : a.qk_nope_head_dim])
            key = jnp.concatenate([latent, rope], axis=-1)[:, :, None]
            out, cache = attended(jnp.concatenate([absorbed, turned], axis=-1), key, None)
            out = jnp.einsum("bthr,hdr->bthd", out, expand[:, a.qk_nope_head_dim :])
        else:
            expanded = jnp.einsum("btr,hdr->bthd", latent, expand)
            k, v = jnp.split(expanded, [a.qk_nope_head_dim], axis=-1)
            turned = jnp.broadcast_to(rope[:, :, None], (*heads, a.qk_rope_head_dim))
            out, cache = attended(q, jnp.concatenate([k, turned], axis=-1), v)
        out = out.reshape(*x.shape[:2], c.num_heads * a.v_head_dim)
        return Linear(c.hidden_size, use_bias=c.o_bias, name="o")(out), cache, (latent, rope)
