"""Ranges and levels of a model's keys and values, from text: what `codecs.KVQuant` codes by.

Three passes over the text, each a sequence at a time: the span of each key channel; counts within it, from which its
range is cut; and counts of keys and values moved to [-1, 1], weighed by how much the loss minds an error there. What is
held between sequences does not grow with their number.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.attention.dense import DenseAttend
from kvjax.cache.codecs import Calibration, KVQuant
from kvjax.cache.codecs.calibration import BITS
from kvjax.config import ModelConfig
from kvjax.errors import ConfigError, RequestError
from kvjax.generate.forward import apply, logits_of
from kvjax.generate.levels import levels_of
from kvjax.model import Model
from kvjax.typing import Params, Rotate, Scoring

RANGE_BINS, LEVEL_BINS = 512, 4096
"""Bins of a channel's span and of [-1, 1]: what lies in one counts as its middle."""


class Seen(NamedTuple):
    """Keys before RoPE and values of one sequence, or anything of their shape, layer by layer: [L, T, K, *]."""

    k: jax.Array
    v: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
    """What goes through a pass.

    Attributes:
      nudge: added to keys and values, so that there is a gradient by them.
      seen: layer -> its keys and values [1, T, K, *], values None where they lie in the key.
    """

    nudge: Seen
    seen: dict[int, tuple[jax.Array, jax.Array | None]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Observe(DenseAttend):
    """The `attend` of calibration: plain causal attention, which notes what it is given.

    Attributes:
      value_dim: of a key that holds its value, how many columns are that.
    """

    value_dim: int = dataclasses.field(kw_only=True)
    latent: ClassVar[bool] = True

    def __call__(
        self,
        cache: Carry,
        layer: int,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array | None,
        positions: jax.Array,
        rotate: Rotate,
        *,
        scoring: Scoring = Scoring(),
        write: bool = True,
    ) -> tuple[jax.Array, Carry]:
        """As `DenseAttend`, and with latents as they would be cached."""
        if write:
            cache = self.put(cache, layer, k, v, positions, rotate)
        # A layer that reads another's is nudged as that one is: the loss minds all that read it.
        k = k + cache.nudge.k[layer][None].astype(k.dtype)
        v = k[..., : self.value_dim] if v is None else v + cache.nudge.v[layer][None].astype(v.dtype)
        return super().__call__(cache, layer, q, k, v, positions, rotate, scoring=scoring)

    def put(
        self, cache: Carry, layer: int, k: jax.Array, v: jax.Array | None, positions: jax.Array, rotate: Rotate
    ) -> Carry:
        """Notes keys and values that other layers will read."""
        return dataclasses.replace(cache, seen={**cache.seen, layer: (k, v)})


def calibrate(
    model: Model, tokens: Any, *, outliers: float = 0.01, first: int = 1, backend: str | None = None
) -> Calibration:
    """Ranges and levels of a model's keys and values for `codecs.KVQuant` (Hooper et al. 2024, 2401.18079).

    A key channel's range leaves out the share `outliers` of its tokens, half at either end. Levels come from k-means
    weighed by the squared gradient of the next-token loss by each element (the diagonal of the Fisher information)
    times the square of its range, for errors grow with that; tables for 2, 3 and 4 bits. The first tokens of each
    sequence and the channels of a vector that would be kept apart do not count.

    The same tokens give the same numbers. Some thousand tokens of the kind of text that will be served are enough (the
    paper takes 16 sequences of 2048); they need a forward and a backward pass, one sequence at a time.

    Args:
      tokens: int32[N, T], T at least first + 2.
      outliers, first: as the codec will be given them.

    Raises:
      ConfigError: a model that holds no keys and values, or settings that KVQuant would refuse.
      RequestError: tokens of another shape or outside the vocabulary.
    """
    spec, config = model.config.kv_spec, model.config
    if spec.rebuilt or not spec.layers:
        raise ConfigError(
            "kvjax.calibrate needs a model that holds keys and values; this one rebuilds them from tokens"
        )
    codec = KVQuant(outliers=outliers, first=first)
    rows = _checked(model, tokens, first)
    run = functools.partial(observe, model.params, config=config, backend=backend)

    spans = [span(run(row), first=first) for row in rows]
    low = np.min([np.asarray(least) for least, _ in spans], axis=0)
    high = np.max([np.asarray(greatest) for _, greatest in spans], axis=0)
    counts = sum(np.asarray(tally(run(row), low, high, first=first), np.int64) for row in rows)
    least, greatest = cut_ranges(np.asarray(counts), low, high, outliers)

    weigh = functools.partial(sensitivity, model.params, config=config, backend=backend, codec=codec)
    mass = [jax.device_get(weigh(row, least, greatest)) for row in rows]
    totals = jax.tree.map(lambda *parts: np.sum([np.asarray(part, np.float64) for part in parts], axis=0), *mass)
    centers = (np.arange(LEVEL_BINS) + 0.5) / LEVEL_BINS * 2 - 1

    def tables(part: np.ndarray) -> dict[int, np.ndarray]:
        """[L, 2, bins] -> bits -> [L, 2^bits]."""
        return {bits: np.stack([levels_of(m, c, centers, 2**bits) for m, c in part]) for bits in BITS}

    return Calibration(least, greatest, tables(totals.k), {} if spec.value_in_key else tables(totals.v))


@functools.partial(jax.jit, static_argnames=("config", "backend"))
def observe(params: Params, tokens: jax.Array, *, config: ModelConfig, backend: str | None) -> Seen:
    """Keys and values of a sequence int32[T]."""
    return _loss(_no_nudge(config, tokens), params, tokens, config, backend)[1]


@functools.partial(jax.jit, static_argnames="first")
def span(seen: Seen, *, first: int) -> tuple[jax.Array, jax.Array]:
    """The least and greatest of each key channel, float32[L, K, D]."""
    keys = seen.k[:, first:].astype(jnp.float32)
    return jnp.min(keys, axis=1), jnp.max(keys, axis=1)


@functools.partial(jax.jit, static_argnames="first")
def tally(seen: Seen, low: jax.Array, high: jax.Array, *, first: int) -> jax.Array:
    """How many keys lie in each of `RANGE_BINS` between low and high [L, K, D]: int32[L, K, D, bins]."""
    keys = seen.k[:, first:].astype(jnp.float32)
    width = jnp.where(high > low, high - low, 1)
    place = jnp.clip((keys - low[:, None]) / width[:, None] * RANGE_BINS, 0, RANGE_BINS - 1).astype(jnp.int32)
    layers, _, heads, channels = keys.shape
    where = jnp.ix_(jnp.arange(layers), jnp.arange(1), jnp.arange(heads), jnp.arange(channels))
    blank = jnp.zeros((layers, heads, channels, RANGE_BINS), jnp.int32)
    return blank.at[where[0], where[2], where[3], place].add(1)


def cut_ranges(counts: np.ndarray, low: np.ndarray, high: np.ndarray, outliers: float) -> tuple[np.ndarray, np.ndarray]:
    """Ranges float32[L, K, D] that leave out half of the share `outliers` at either end; with 0 low and high."""
    shares = np.cumsum(counts, axis=-1) / np.maximum(counts.sum(-1, keepdims=True), 1)
    bottom = (shares <= outliers / 2).sum(-1)
    top = RANGE_BINS - (shares >= 1 - outliers / 2).sum(-1) + 1
    if outliers >= 1:
        bottom, top = np.zeros_like(bottom), np.full_like(top, RANGE_BINS)
    step = (high - low) / RANGE_BINS
    # An edge that leaves nothing out stays exactly where it was.
    least = np.where(bottom == 0, low, low + bottom * step)
    greatest = np.where(top >= RANGE_BINS, high, low + top * step)
    return least.astype(np.float32), greatest.astype(np.float32)


@functools.partial(jax.jit, static_argnames=("config", "backend", "codec"))
def sensitivity(
    params: Params,
    tokens: jax.Array,
    least: jax.Array,
    greatest: jax.Array,
    *,
    config: ModelConfig,
    backend: str | None,
    codec: KVQuant,
) -> Seen:
    """Of a sequence's keys and values on [-1, 1], weight and number in each bin: float32[L, 2, `LEVEL_BINS`]."""
    gradient, seen = jax.grad(_loss, has_aux=True)(_no_nudge(config, tokens), params, tokens, config, backend)

    def binned(x: jax.Array, slope: jax.Array, part: str) -> jax.Array:
        # A layer at a time: of several, the marks of what is apart would be the largest thing in memory.
        return jax.lax.map(lambda layer: _binned(codec, part, *layer), (x, slope, least, greatest))

    keys = binned(seen.k, gradient.k, "key")
    return Seen(keys, keys if config.kv_spec.value_in_key else binned(seen.v, gradient.v, "value"))


def _binned(
    codec: KVQuant, part: str, x: jax.Array, slope: jax.Array, least: jax.Array, greatest: jax.Array
) -> jax.Array:
    """One layer's x and slope [T, K, D], key ranges [K, D] -> float32[2, `LEVEL_BINS`]."""
    x, slope = (part[codec.first :].astype(jnp.float32) for part in (x, slope))
    if part == "key":
        normed, half, apart = codec.normed_keys(x, (greatest + least) / 2, (greatest - least) / 2)
    else:
        normed, half, apart = codec.normed_values(x)
    # An error of a level is that times half the range in the element itself.
    weight = jnp.where(apart, 0, (slope * half) ** 2)
    place = jnp.clip((normed + 1) / 2 * LEVEL_BINS, 0, LEVEL_BINS - 1).astype(jnp.int32)
    blank = jnp.zeros(LEVEL_BINS, jnp.float32)
    return jnp.stack([blank.at[place].add(weight), blank.at[place].add(jnp.where(apart, 0.0, 1.0))])


def _loss(
    nudge: Seen, params: Params, tokens: jax.Array, config: ModelConfig, backend: str | None
) -> tuple[jax.Array, Seen]:
    """The summed next-token loss of a sequence int32[T], its keys and values beside."""
    spec = config.kv_spec
    attend: Any = Observe(config.cache_windows, backend, value_dim=spec.value_dim)
    positions = jnp.arange(tokens.shape[0])[None]
    hidden, carry = apply(config, attend, params, tokens[None], positions, Carry(nudge))
    logits = logits_of(params, hidden, config)[0, :-1]
    target = jnp.take_along_axis(logits, tokens[1:, None], axis=-1)[:, 0]
    loss = jnp.sum(jax.nn.logsumexp(logits, axis=-1) - target)
    layers = [carry.seen[layer] for layer in range(spec.layers)]
    keys = jnp.stack([k[0] for k, _ in layers])
    values = nudge.v if spec.value_in_key else jnp.stack([v[0] for _, v in layers if v is not None])
    return loss, Seen(keys, values)


def _no_nudge(config: ModelConfig, tokens: jax.Array) -> Seen:
    spec, count = config.kv_spec, tokens.shape[0]
    lead = (spec.layers, count, spec.kv_heads)
    values = (spec.layers, 0) if spec.value_in_key else (*lead, spec.value_dim)
    return Seen(jnp.zeros((*lead, spec.key_dim)), jnp.zeros(values))


def _checked(model: Model, tokens: Any, first: int) -> np.ndarray:
    array = np.asarray(tokens)
    if array.ndim != 2 or not len(array) or array.dtype.kind not in "iu" or array.shape[1] < first + 2:
        raise RequestError(
            f"kvjax.calibrate takes integer tokens[N, T] with T of at least first + 2 = {first + 2}, got "
            f"{array.dtype} {array.shape}"
        )
    if array.min() < 0 or array.max() >= model.config.vocab_size:
        raise RequestError(
            f"token ids must be 0 to {model.config.vocab_size - 1}, got {int(array.min())} to {int(array.max())}"
        )
    return array.astype(np.int32)
