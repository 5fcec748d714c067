"""Frozen, hashable configuration: what a model is, how its cache is kept, how tokens are drawn.

All of it can be passed to `jax.jit` as static arguments: equal configs hash equal and never compile again.
"""

from kvjax.cache.config import CacheConfig
from kvjax.config.layers import Experts, GoldFinch, Latent, LayerKind
from kvjax.config.mesh import MeshConfig
from kvjax.config.model import ModelConfig
from kvjax.config.rope import ROPE_KINDS, RopeScaling
from kvjax.config.sampling import Sampling
from kvjax.config.toml import build, read_toml

__all__ = [
    "ROPE_KINDS",
    "CacheConfig",
    "Experts",
    "GoldFinch",
    "Latent",
    "LayerKind",
    "MeshConfig",
    "ModelConfig",
    "RopeScaling",
    "Sampling",
    "build",
    "read_toml",
]
