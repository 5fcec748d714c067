"""kvjax: the KV cache of large language models, small, shared, fast and easy to change, in JAX.

The KV cache is a value: every way to make it smaller, share it or read less of it is a small pure function over one
immutable pytree, so methods compose under one `jax.jit`.
"""

from kvjax import errors
from kvjax.attention.protocol import Attend
from kvjax.cache import codecs, policies, selects
from kvjax.cache.codecs import Codec
from kvjax.cache.config import CacheConfig
from kvjax.cache.layout import KVSpec
from kvjax.cache.policies import Policy
from kvjax.cache.selects import Select
from kvjax.chat import chat_prompt, render_chat
from kvjax.checkpoint import load, save
from kvjax.config import MeshConfig, ModelConfig, RopeScaling, Sampling
from kvjax.convert.generation import sampling_defaults
from kvjax.generate.api import Stream, extend, fork, generate, prefill, stream
from kvjax.generate.output import GenerateOutput, Stats
from kvjax.generate.sampling import LogitsProcessor, ProcessorContext
from kvjax.generate.score import score
from kvjax.generate.state import State
from kvjax.generate.warmup import enable_compilation_cache, warmup
from kvjax.model import Model, init, with_encoder
from kvjax.plan import Plan, plan

__version__ = "0.1.0"

__all__ = [
    "Attend",
    "CacheConfig",
    "Codec",
    "GenerateOutput",
    "KVSpec",
    "LogitsProcessor",
    "MeshConfig",
    "Model",
    "ModelConfig",
    "Plan",
    "Policy",
    "ProcessorContext",
    "RopeScaling",
    "Sampling",
    "Select",
    "State",
    "Stats",
    "Stream",
    "chat_prompt",
    "codecs",
    "enable_compilation_cache",
    "errors",
    "extend",
    "fork",
    "generate",
    "init",
    "load",
    "plan",
    "policies",
    "prefill",
    "render_chat",
    "sampling_defaults",
    "save",
    "score",
    "selects",
    "stream",
    "warmup",
    "with_encoder",
]
