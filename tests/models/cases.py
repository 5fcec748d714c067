"""Small models, one per family of traits that decoders combine, with weights that leave no trait without effect."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import Model
from kvjax.config import Experts, Latent, ModelConfig, RopeScaling
from kvjax.model import parameter_shapes

VOCAB = 61
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "rope_theta": 100.0,  # within the few positions of a test every pair turns noticeably
}
YARN = RopeScaling("yarn", factor=4.0, original_max_position_embeddings=64)
"""Of four rotated pairs one is kept, one stretched and two blended."""

PLAIN = ModelConfig(**BASE)
MLA = ModelConfig(
    **BASE,
    latent=Latent(kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=6, q_lora_rank=12),
    rope_scaling=dataclasses.replace(YARN, attention_factor=1.0),
    query_scale=16**-0.5 * (0.1 * np.log(4.0).item() + 1) ** 2,
    norm_eps=1e-2,
)
"""DeepSeek-V2: YaRN turns cos and sin unscaled, its factor on the scores is squared; latents are normed by 1e-6."""

DEEPSEEK_V3 = ModelConfig(
    **BASE,
    latent=Latent(kv_lora_rank=16, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8),
    experts=Experts(
        count=8,
        per_token=3,
        intermediate_size=16,
        shared_intermediate_size=24,
        dense_layers=(0,),
        scoring="sigmoid",
        scaling_factor=2.5,
        groups=4,
        groups_per_token=2,
        group_score="top2",
        selection_bias=True,
    ),
)
"""Queries without compression; experts chosen by sigmoid scores and a bias."""

DEEPSEEK_V2_EXPERTS = ModelConfig(
    **{**BASE, "num_kv_heads": 4},
    qkv_bias=True,
    qk_norm=True,
    experts=Experts(
        count=6,
        per_token=2,
        intermediate_size=16,
        shared_intermediate_size=16,
        normalize=False,
        scaling_factor=1.5,
        groups=3,
        groups_per_token=2,
    ),
)
"""Softmax scores that are not normalised, groups as good as their best expert; per-head norms as in Qwen3."""

GEMMA_2 = ModelConfig(
    **{**BASE, "num_layers": 4},
    windows=(5, None, 5, None),
    norm_placement="sandwich",
    norm_unit_offset=True,
    attention_soft_cap=2.0,
    logit_soft_cap=3.0,
    query_scale=0.3,
    embedding_scale=32**0.5,
    activation="gelu_tanh",
    tie_word_embeddings=True,
)
GEMMA_3 = ModelConfig(
    **{**BASE, "num_layers": 3},
    windows=(6, 6, None),
    norm_placement="sandwich",
    norm_unit_offset=True,
    qk_norm=True,
    local_rope_theta=20.0,
    rope_scaling=RopeScaling("linear", factor=2.0),
    activation="gelu_tanh",
)
"""Windowed layers turn by a base of their own, unscaled."""

GPT_OSS = ModelConfig(
    **BASE,
    windows=(5, None),
    qkv_bias=True,
    o_bias=True,
    attention_sinks=True,
    rope_scaling=dataclasses.replace(YARN, truncate=False),
    experts=Experts(count=4, per_token=2, intermediate_size=16, router_bias=True, bias=True, limit=1.0),
)
"""A limit that many of the gates and ups exceed; YaRN's own factor on cos and sin."""

OLMO_2 = ModelConfig(**BASE, norm_placement="post", qk_norm_whole=True, mlp_bias=True)
PHI_3 = ModelConfig(
    **{**BASE, "num_kv_heads": 1},
    rotary_fraction=0.5,
    rope_scaling=RopeScaling(
        "longrope", factor=8.0, original_max_position_embeddings=64, short_factor=(1.0, 1.5), long_factor=(2.0, 7.0)
    ),
)
CLA = ModelConfig(**{**BASE, "num_layers": 4}, owners=(0, 0, 2, 2), qk_norm=True)
CLA_WINDOWS = ModelConfig(
    **{**BASE, "num_layers": 4},
    owners=(0, 1, 0, 1),
    windows=(6, None, 6, None),
    local_rope_theta=20.0,
    rope_interleaved=True,
    activation="gelu",
    experts=Experts(count=4, per_token=2, intermediate_size=16, dense_layers=(1,)),
)
"""Readers beyond other owners, windowed and not; Mixtral's experts."""

CASES = {
    "mla": MLA,
    "deepseek-v3": DEEPSEEK_V3,
    "deepseek-v2-experts": DEEPSEEK_V2_EXPERTS,
    "gemma-2": GEMMA_2,
    "gemma-3": GEMMA_3,
    "gpt-oss": GPT_OSS,
    "olmo-2": OLMO_2,
    "phi-3": PHI_3,
    "cla": CLA,
    "cla-windows": CLA_WINDOWS,
}


@functools.lru_cache(maxsize=64)
def random_params(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """float32 NumPy leaves, every one drawn: no norm, bias, sink or selection bias starts where it does nothing.

    Query weights are thrice the usual size, so that attention is far from uniform.
    """
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        names = [key.key for key in path]
        noise = rng.standard_normal(leaf.shape)
        match names[-1]:
            case "scale":
                value = (0.0 if config.norm_unit_offset else 1.0) + 0.2 * noise
            case "bias" | "selection_bias":
                value = 0.3 * noise
            case "sinks" | "embedding":
                value = noise
            case _:
                fan_in = leaf.shape[-1] if names[-1] == "weight" else leaf.shape[-2]
                value = (3.0 if names[-2] in ("q", "q_up") else 1.0) * noise * fan_in**-0.5
        return value.astype(np.float32)

    params: dict[str, Any] = jax.tree_util.tree_map_with_path(draw, parameter_shapes(config))
    return params


def model_of(config: ModelConfig, params: dict[str, Any] | None = None) -> Model:
    """A model with these weights, or random ones."""
    return Model(config, jax.tree.map(jnp.asarray, random_params(config) if params is None else params))


def random_tokens(seed: int, *shape: int) -> np.ndarray:
    """int[*shape] token ids."""
    return np.random.default_rng(seed).integers(0, VOCAB, shape)
