"""Second moments of a model's keys and values: from text, or from its weights where there is none.

Activations are never kept: one pass over the text adds up a matrix per layer, on the device for a few thousand tokens,
in float64 on the host beyond that.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.attention.dense import DenseAttend
from kvjax.config import ModelConfig
from kvjax.errors import ConfigError
from kvjax.model import Model
from kvjax.models import Decoder
from kvjax.models.rotary import rotary
from kvjax.typing import Params, Rotate, Scoring

TOKENS_AT_ONCE = 4096
"""About as many go through the model in one step."""
ANGLES = 64
"""Positions over which a moment is averaged where there is no text."""


class Moments(NamedTuple):
    """One layer's second moments, means over tokens, float64.

    Attributes:
      keys, values: [groups, n, n] of what lies side by side in each group, keys after RoPE; or, with one matrix for all
        heads, keys [1, m, m] of keys before RoPE followed by values, and no values.
    """

    keys: np.ndarray
    values: np.ndarray | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """Layer -> the sums so far of what `Moments` holds."""

    of_layer: dict[int, tuple[jax.Array, jax.Array | None]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Collect(DenseAttend):
    """The `attend` of calibration: plain causal attention, which adds up products of the keys and values it is given.

    Attributes:
      groups: heads are taken together in so many groups, keys after RoPE; None: all together, keys before RoPE, and
        values beside them.
    """

    groups: int | None = dataclasses.field(kw_only=True)

    def __call__(
        self,
        cache: Sums,
        layer: int,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array | None,
        positions: jax.Array,
        rotate: Rotate,
        *,
        scoring: Scoring = Scoring(),
        write: bool = True,
    ) -> tuple[jax.Array, Sums]:
        """As `DenseAttend`."""
        assert v is not None
        sums: tuple[jax.Array, jax.Array | None]
        if self.groups is None:
            both = jnp.concatenate([x.reshape(*x.shape[:2], 1, -1) for x in (k, v)], axis=-1)
            sums = _outer(both, 1), None
        else:
            sums = _outer(rotate(k, positions), self.groups), _outer(v, self.groups)
        out, _ = super().__call__(cache, layer, q, k, v, positions, rotate, scoring=scoring)
        return out, Sums({**cache.of_layer, layer: sums})


def _outer(x: jax.Array, groups: int) -> jax.Array:
    """x [B, T, K, D] -> float32[groups, n, n], the sum over tokens of each group's outer product with itself."""
    wide = x.reshape(-1, groups, x.shape[2] * x.shape[3] // groups).astype(jnp.float32)
    return jnp.einsum("xgi,xgj->gij", wide, wide, precision="highest")


def moments_of(model: Model, tokens: np.ndarray | None, groups: int | None) -> list[Moments]:
    """Each layer's moments, over text int32[N, T], or from weights alone.

    Args:
      groups: as in `Collect`.

    Raises:
      ConfigError: they are not finite.
    """
    if tokens is None:
        moments = [_of_weights(model, layer, groups) for layer in range(model.config.num_layers)]
    else:
        moments = _of_text(model, tokens, groups)
    for layer, each in enumerate(moments):
        if not all(np.isfinite(part).all() for part in each if part is not None):
            raise ConfigError(
                f"keys or values of layer {layer} are not finite on this calibration; are the model's weights damaged?"
            )
    return moments


def _of_text(model: Model, tokens: np.ndarray, groups: int | None) -> list[Moments]:
    totals: Any = None
    for rows in _batches(tokens):
        sums = _collect(model.params, rows, config=model.config, groups=groups)
        part = jax.tree.map(lambda x: np.asarray(x, np.float64), sums.of_layer)
        totals = part if totals is None else jax.tree.map(np.add, totals, part)
    means = jax.tree.map(lambda x: x / tokens.size, totals)
    return [Moments(*means[layer]) for layer in range(model.config.num_layers)]


@functools.partial(jax.jit, static_argnames=("config", "groups"))
def _collect(params: Params, tokens: jax.Array, *, config: ModelConfig, groups: int | None) -> Sums:
    attend: Any = Collect(config.cache_windows, groups=groups)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    decoder: Any = Decoder(config, attend)
    sums: Sums = decoder.apply({"params": params}, tokens, positions, Sums())[1]
    return sums


def _of_weights(model: Model, layer: int, groups: int | None) -> Moments:
    """As if what a norm gives were white, and every position as likely as another."""
    c, params = model.config, model.params[f"layers_{layer}"]
    gain = np.ones(c.hidden_size)
    if "attention_norm" in params:
        gain = wide(params["attention_norm"]["scale"]) + (1.0 if c.norm_unit_offset else 0.0)

    def projected(name: str) -> np.ndarray:
        """What the projection makes of the unit vectors of its input, and its bias: [hidden + 1, heads * D]."""
        part = params["attention"][name]
        bias = wide(part["bias"]) if "bias" in part else np.zeros(part["weight"].shape[0])
        return np.concatenate([gain[:, None] * wide(part["weight"]).T, bias[None]])

    keys, values = projected("k"), projected("v")
    if "k_norm" in params["attention"]:
        scale = wide(params["attention"]["k_norm"]["scale"]) + (1.0 if c.norm_unit_offset else 0.0)
        by_head = keys.reshape(len(keys), -1, scale.size)
        keys = (by_head / np.sqrt((by_head**2).sum(0).mean(-1))[:, None] * scale).reshape(keys.shape)
    if groups is None:
        both = np.concatenate([keys, values], axis=1)
        return Moments((both.T @ both)[None], None)

    def grouped(x: np.ndarray) -> np.ndarray:
        x = x.reshape(len(x), groups, -1)
        return np.einsum("xgi,xgj->gij", x, x, optimize=True)

    return Moments(_turned(grouped(keys), c, c.kind(layer).local), grouped(values))


def _turned(moments: np.ndarray, config: ModelConfig, local: bool) -> np.ndarray:
    """Moments [groups, t * D, t * D] of keys before RoPE, as they are after it, averaged over the model's positions."""
    width = config.width
    places = np.linspace(0, config.max_position_embeddings - 1, ANGLES).astype(np.int32)
    units = jnp.broadcast_to(jnp.eye(width), (1, ANGLES, width, width))
    turns = np.asarray(rotary(config, local)(units, jnp.asarray(places)[None])[0], np.float64)
    count = moments.shape[1] // width
    parts = moments.reshape(-1, count, width, count, width)
    total = np.zeros_like(parts)
    for turn in turns:
        total += np.einsum("gaibj,ix,jy->gaxby", parts, turn, turn, optimize=True)
    return (total / ANGLES).reshape(moments.shape)


def mean_loss(model: Model, tokens: np.ndarray) -> float:
    """Nats per token of the next token over text int32[N, T], without a cache."""
    total = sum(float(_loss(model.params, rows, config=model.config)) for rows in _batches(tokens))
    return total / (tokens.shape[0] * (tokens.shape[1] - 1))


@functools.partial(jax.jit, static_argnames="config")
def _loss(params: Params, tokens: jax.Array, *, config: ModelConfig) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    decoder: Any = Decoder(config, DenseAttend(config.cache_windows))
    hidden, _ = decoder.apply({"params": params}, tokens, positions, None)
    logits = decoder.apply({"params": params}, hidden[:, :-1], method="logits")
    target = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - target)


def _batches(tokens: np.ndarray) -> list[np.ndarray]:
    """Parts of equally many rows, so that nothing compiles twice."""
    most = max(1, TOKENS_AT_ONCE // tokens.shape[1])
    rows = max(count for count in range(1, most + 1) if len(tokens) % count == 0)
    return [tokens[first : first + rows] for first in range(0, len(tokens), rows)]


def losses(before: Model, after: Model, tokens: np.ndarray | None) -> tuple[float | None, float | None]:
    """Of both models on calibration text; None without one."""
    return (None, None) if tokens is None else (mean_loss(before, tokens), mean_loss(after, tokens))


def checked_calibration(model: Model, tokens: Any) -> np.ndarray | None:
    """Calibration text as int32[N, T], None for none.

    Raises:
      ConfigError: it is of another shape or kind, empty, or outside the vocabulary.
    """
    if tokens is None:
        return None
    try:
        array = np.asarray(tokens)
    except ValueError as error:  # rows of unequal length
        raise ConfigError(f"calibration must be integer tokens[N, T], rows of one length; {error}") from error
    if array.ndim != 2 or array.dtype.kind not in "iu" or array.shape[0] < 1 or array.shape[1] < 2:
        raise ConfigError(
            "calibration must be integer tokens[N, T] of at least one row of two tokens (as a tokenizer gives them, "
            f"rows of one length), got {array.dtype} {array.shape}"
        )
    if array.min() < 0 or array.max() >= model.config.vocab_size:
        raise ConfigError(
            f"calibration tokens must be 0 to {model.config.vocab_size - 1}, got {int(array.min())} to "
            f"{int(array.max())}; encode the text with the model's own tokenizer"
        )
    return array.astype(np.int32)


def wide(x: Any) -> np.ndarray:
    """A weight on the host in float64."""
    return np.asarray(x).astype(np.float64)
