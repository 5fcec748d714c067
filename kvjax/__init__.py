"""kvjax: the KV cache of large language models, small, shared, fast and easy to change, in JAX.

The KV cache is a value: every way to make it smaller, share it or read less of it is a small pure function over one
immutable pytree, so methods compose under one `jax.jit`.
"""

import importlib
from typing import Any

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
from kvjax.generate.calibrate import calibrate
from kvjax.generate.output import GenerateOutput, Stats
from kvjax.generate.rollback import rollback
from kvjax.generate.sampling import LogitsProcessor, ProcessorContext
from kvjax.generate.score import score
from kvjax.generate.snapshot import load_state, save_state
from kvjax.generate.state import State
from kvjax.generate.warmup import enable_compilation_cache, warmup
from kvjax.model import Model, init, with_encoder
from kvjax.plan import Plan, plan

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`kvjax.train`, loaded when it is first asked for: who only generates needs no optimisers."""
    if name == "train":
        return importlib.import_module("kvjax.train")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
    "calibrate",
    "chat_prompt",
    "codecs",
    "enable_compilation_cache",
    "errors",
    "extend",
    "fork",
    "generate",
    "init",
    "load",
    "load_state",
    "plan",
    "policies",
    "prefill",
    "render_chat",
    "rollback",
    "sampling_defaults",
    "save",
    "save_state",
    "score",
    "selects",
    "stream",
    "warmup",
    "with_encoder",
]
