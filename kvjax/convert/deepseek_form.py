"""Latent attention without a norm, in the form of DeepSeek's files, which always have one.

RMSNorm divides by the root of mean square + eps. Of a latent so small that its mean square vanishes beside eps, it
divides by the root of eps, a constant: so the weights that make the latent are shrunk by 2^-32, and the norm's own
scale brings it back. A power of two rounds nothing, in float32 and bfloat16 alike; what is lost is less than float32
tells apart. Queries that have a bias, for which the files have no place, get a bottleneck as wide as their input and
one more, which does nothing but carry a one to where the bias can be a column of the weight.

That eps is the one transformers fixes for these norms, 1e-6; a reader that takes the model's own sees latents of
another size.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from kvjax.config import Experts, Latent, ModelConfig
from kvjax.errors import CheckpointError
from kvjax.typing import Params

SHRINK = 2.0**-32
"""Latents of a root mean square up to 1000 are then off by less than 3e-8 of themselves, as float32 rounds."""


def deepseek_form(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The same model as DeepSeek's files can hold it; any other model than one without a norm as it is.

    Raises:
      CheckpointError: weights of float16, in which nothing can be that small.
    """
    latent = config.latent
    if latent is None or latent.kv_norm:
        return config, params
    if params["embed"]["embedding"].dtype == jnp.float16:
        raise CheckpointError(
            "DeepSeek's files norm every latent; that of this model has none, and can be made small enough for a norm "
            "to change nothing in float32 or bfloat16, but not in float16: load the model in one of these, or save "
            'with format="orbax"'
        )
    biased = config.qkv_bias or config.o_bias
    renewed = dataclasses.replace(
        config,
        qkv_bias=biased,
        o_bias=biased,
        experts=config.experts or _no_experts(config),
        latent=dataclasses.replace(
            latent,
            kv_norm=True,
            q_bias=False,
            q_lora_rank=config.hidden_size + 1 if latent.q_bias else latent.q_lora_rank,
        ),
    )
    layers = {
        name: {**part, "attention": _layer(part["attention"], config, renewed)}
        for name, part in params.items()
        if name.startswith("layers_")
    }
    return renewed, {**params, **layers}


def _no_experts(config: ModelConfig) -> Experts:
    """What the files must say of experts though no layer has any."""
    return Experts(
        count=1,
        per_token=1,
        intermediate_size=config.intermediate_size,
        shared_intermediate_size=config.intermediate_size,
        dense_layers=tuple(range(config.num_layers)),
        **(
            {"scoring": "sigmoid", "group_score": "top2", "selection_bias": True}
            if config.family == "deepseek_v3"
            else {"normalize": False}
        ),
    )


def _layer(attention: Params, config: ModelConfig, renewed: ModelConfig) -> Params:
    latent, width = config.latent, config.hidden_size
    assert latent is not None
    dtype = attention["kv_down"]["weight"].dtype
    rows = np.where(np.arange(latent.key_dim) < latent.kv_lora_rank, SHRINK, 1.0)
    scale, rest = _scale(latent, dtype)
    down, up = attention["kv_down"], _float(attention["kv_up"]["weight"])
    made: Params = {
        "kv_down": {"weight": _float(down["weight"]) * rows[:, None]},
        "kv_norm": {"scale": np.full(latent.kv_lora_rank, scale)},
        "kv_up": {"weight": up * rest},
    }
    if renewed.qkv_bias:
        made["kv_down"]["bias"] = _float(down["bias"]) * rows if "bias" in down else np.zeros(latent.key_dim)
    out = attention["o"]
    if renewed.o_bias and "bias" not in out:
        out = {**out, "bias": np.zeros(width)}
    kept = {name: part for name, part in attention.items() if name not in made}
    if latent.q_bias:
        del kept["q"]
        weight, bias = (_float(attention["q"][leaf]) for leaf in ("weight", "bias"))
        made["q_down"] = {
            "weight": SHRINK * np.eye(width + 1, width),
            "bias": SHRINK * np.eye(width + 1)[width],
        }
        made["q_norm"] = {"scale": np.full(width + 1, scale)}
        made["q_up"] = {"weight": rest * np.concatenate([weight, bias[:, None]], axis=1)}
    made["o"] = out
    cast = {name: {leaf: jnp.asarray(x, dtype) for leaf, x in part.items()} for name, part in made.items()}
    return {**kept, **cast}


def _scale(latent: Latent, dtype: Any) -> tuple[float, float]:
    """The norm's scale in `dtype`, and what weights behind it make up for its rounding."""
    exact = math.sqrt(latent.norm_eps) / SHRINK
    rounded = float(jnp.asarray(exact, dtype))
    return rounded, exact / rounded


def _float(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)
