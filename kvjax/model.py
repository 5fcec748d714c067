"""`Model`: a config, its weights and its tokenizer, in one immutable value."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.attention.dense import DenseAttend
from kvjax.config import ModelConfig
from kvjax.models import Decoder, Encoder
from kvjax.models.goldfinch_initial import initial
from kvjax.models.transformer import first_of_kind
from kvjax.typing import Params


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """What `kvjax.load` returns.

    Attributes:
      config: the architecture.
      params: weights, one subtree per layer (`layers_0`, ...).
      tokenizer: a `tokenizers.Tokenizer`, or None: then prompts are token ids.
      files: name and content of small files beside the weights, such as the chat template, that saving writes back.
    """

    config: ModelConfig
    params: Params
    tokenizer: Any = None
    files: tuple[tuple[str, bytes], ...] = ()

    @property
    def dtype(self) -> jnp.dtype:
        """dtype of the weights, and of activations."""
        return self.params["embed"]["embedding"].dtype

    @property
    def num_parameters(self) -> int:
        """Number of weights, tied ones once."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


@functools.lru_cache(maxsize=64)
def parameter_shapes(config: ModelConfig, scan: bool = False) -> Params:
    """The parameter tree of a config as `jax.ShapeDtypeStruct`s, without computing anything."""
    module = Decoder(config, DenseAttend(), scan=scan)
    dummy = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(lambda key: module.init(key, dummy, dummy, method="initialise"), jax.random.key(0))
    params = dict(shapes["params"])
    if not scan:
        # Traced once for each kind of layer.
        params |= {f"layers_{i}": params[f"layers_{same}"] for i, same in enumerate(first_of_kind(config))}
    if config.encoder is None:
        return params
    encoder = Encoder(config.encoder, DenseAttend(causal=False))
    read = jax.eval_shape(lambda key: encoder.init(key, dummy, dummy), jax.random.key(0))
    return {**params, "encoder": read["params"]}


def init(config: ModelConfig | str | Path, seed: int = 0, dtype: Any = None) -> Model:
    """A model with random weights: normal, 1/sqrt(fan-in); norms 1, biases 0, embeddings 0.02. GoldFinch has its own.

    What a context adds starts at 0 (the output of cross-attention): a decoder with an encoder begins as itself.

    Args:
      config: a ModelConfig, or the path of a TOML file with a `[model]` table.
      dtype: None: the config's own dtype.
    """
    if not isinstance(config, ModelConfig):
        config = ModelConfig.from_toml(config)
    wanted = jnp.dtype(config.dtype if dtype is None else dtype)
    leaves, tree = jax.tree_util.tree_flatten_with_path(parameter_shapes(config))
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def draw(path: Any, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
        name = path[-1].key
        if config.goldfinch is not None:
            return initial(config, tuple(part.key for part in path), shape, key).astype(wanted)
        owner = config.encoder if config.encoder and path[0].key == "encoder" else config
        if name == "scale":
            return jnp.full(shape, 0 if owner.norm_unit_offset else 1, wanted)
        silent = [part.key for part in path[-3:-1]] == ["cross_attention", "o"]
        if silent or name in ("bias", "selection_bias", "sinks"):
            return jnp.zeros(shape, wanted)
        fan_in = shape[-1] if name == "weight" else shape[-2]
        spread = 0.02 if name == "embedding" else fan_in**-0.5
        return (spread * jax.random.normal(key, shape, jnp.float32)).astype(wanted)

    arrays = [draw(path, leaf.shape, key) for (path, leaf), key in zip(leaves, keys, strict=True)]
    return Model(config, jax.tree_util.tree_unflatten(tree, arrays))


def with_encoder(
    model: Model,
    encoder: ModelConfig,
    *,
    context_chunk: int = 256,
    cross_layers: int | None = None,
    encoder_params: Params | None = None,
    seed: int = 0,
) -> Model:
    """A decoder that can also read encoded context (CEPE 2024, 2402.16617), to be trained; until then it is the same.

    Its weights are those of `model`; the cross-attention is drawn as in `init`, with an output of zeros.

    Args:
      encoder, context_chunk, cross_layers: as in `ModelConfig`.
      encoder_params: the encoder's weights; None: random ones.
    """
    config = dataclasses.replace(model.config, encoder=encoder, context_chunk=context_chunk, cross_layers=cross_layers)
    fresh = init(config, seed, model.dtype).params
    params = {name: {**part, **model.params[name]} if name in model.params else part for name, part in fresh.items()}
    if encoder_params is not None:
        params["encoder"] = encoder_params
    return dataclasses.replace(model, config=config, params=params)
