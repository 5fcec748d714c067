"""Retrofitting a model to merge what it caches: the training of DMC (Nawrot et al. 2024, 2403.09636, section 3).

In two stages. First the two channels that will decide and weigh are faded out of attention (`fading`, `fade_at`), so
that the model no longer needs them. Then they do decide, in a relaxed way (`relaxed`), under a loss that asks for more
merging until a ratio is reached that itself rises from 1 (`dmc_loss`, `ratio_at`). The result is a model like any
other, for `kvjax.policies.DMC()`. All here are pure functions and static objects, for any training loop;
`kvjax.train.finetune` does both stages as a `DMCSchedule` says (`dmc_stages`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from kvjax.attention.dense import DenseAttend
from kvjax.cache.config import CacheConfig
from kvjax.cache.layout import KVSpec, group_layers
from kvjax.cache.policies.dmc import BIAS, DMC
from kvjax.config import ModelConfig
from kvjax.errors import ConfigError
from kvjax.generate.state import check_deciding, check_turning
from kvjax.models import Decoder
from kvjax.train.attend import Asked, PackedAttend, Reading, Segments
from kvjax.train.loss import next_token_loss
from kvjax.train.settings import DMCSchedule
from kvjax.typing import Params, Rotate, Scoring
from pallas_kernels.softmax import heads_last, scores, weighted

FAR = -1e30
"""The score of what is not seen: finite, so that no gradient is NaN."""


# Schedules


def fade_at(step: jax.Array | int, steps: int) -> jax.Array:
    """float32[], what the two channels are multiplied by: from 1 to 0 over the first four fifths of the first stage."""
    return jnp.maximum(1.0 - jnp.asarray(step, jnp.float32) / (0.8 * steps), 0.0)


def ratio_at(step: jax.Array | int, steps: int, ratio: float) -> jax.Array:
    """float32[], the compression asked for at a step: from 1 to `ratio` over `steps`, linearly, and then `ratio`.

    Raises:
      ConfigError: a ratio below 1, which no cache has.
    """
    if not ratio >= 1:
        raise ConfigError(f"ratio must be at least 1 (2: half the entries), got {ratio}")
    return 1.0 + (ratio - 1.0) * jnp.minimum(jnp.asarray(step, jnp.float32) / steps, 1.0)


# Losses


def merging_loss(share: jax.Array, ratio: jax.Array | float) -> jax.Array:
    """float32[], how far the share of tokens that join an entry is below the ratio's, 1 - 1 / ratio; at best 0.

    The share is of all layers, heads and sequences together: which of them merge is for the language loss to say.
    (Published code rounds the decisions it counts here, letting gradients through as if it did not.)
    """
    return jnp.maximum(1.0 - 1.0 / ratio - share, 0.0)


class Told(NamedTuple):
    """What a step of training says beside its loss, float32[] each.

    Attributes:
      language: the next-token loss, nats. share: of tokens, over layers and heads, that join an entry.
    """

    language: jax.Array
    share: jax.Array


def dmc_loss(logits: Callable[..., tuple[jax.Array, jax.Array]]) -> Callable[..., tuple[jax.Array, Told]]:
    """`loss(params, tokens int32[B, T], mask [B, T], key, ratio)`: next-token loss and `merging_loss`, and `Told`.

    Args:
      logits: as `relaxed` gives it.
    """

    def loss(
        params: Params, tokens: jax.Array, mask: jax.Array | None, key: jax.Array | None, ratio: jax.Array | float
    ) -> tuple[jax.Array, Told]:
        predicted, share = logits(params, tokens, key)
        language = next_token_loss(predicted, tokens, mask)
        return language + merging_loss(share, ratio), Told(language, share)

    return loss


# Models


def relaxed(
    config: ModelConfig, *, span: int = 12, temperature: float = 0.1, scan: bool = True
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """`logits(params, tokens int32[B, T], key) -> float32[B, T, V]` and the share of tokens that join, float32[].

    Args:
      span, temperature: as in `DMCAttend`. scan: over layers, if they are all of one kind: stacked parameters.

    Raises:
      ConfigError: a model that DMC cannot serve.
    """
    module = Decoder(config, DMCAttend.of(config, span, temperature), scan=scan and config.uniform)

    def logits(params: Params, tokens: jax.Array, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        passed: Any = module.apply({"params": params}, tokens, positions, Joining(key))
        hidden, told = passed
        result: Any = module.apply({"params": params}, hidden, method="logits")
        return result, told.share

    return logits


def fading(config: ModelConfig, *, scan: bool = True) -> Callable[[Params, jax.Array, jax.Array], jax.Array]:
    """`logits(params, tokens int32[B, T], factor float32[]) -> float32[B, T, V]`: the first stage's.

    Raises:
      ConfigError: a model that DMC cannot serve.
    """
    _check(config)
    module = Decoder(config, FadingAttend(config.cache_windows, None), scan=scan and config.uniform)

    def logits(params: Params, tokens: jax.Array, factor: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        hidden, _ = module.apply({"params": params}, tokens, positions, Fading(factor))
        result: Any = module.apply({"params": params}, hidden, method="logits")
        return result

    return logits


def dmc_stages(
    config: ModelConfig, schedule: DMCSchedule, backend: str | None = None
) -> tuple[tuple[int, Reading], ...]:
    """(first step, how it reads) of each stage of a schedule.

    Args:
      backend: which kernel the first stage takes; None: the best that can serve.

    Raises:
      ConfigError: a model that DMC cannot serve.
    """
    merges = DMCAttend.of(config, schedule.span, schedule.temperature)

    def fade(ids: jax.Array | None, key: jax.Array | None, step: jax.Array | int) -> Fading:
        return Fading(fade_at(step, schedule.fade_steps), ids)

    def asks(joining: Joining, step: jax.Array | int) -> Asked:
        ratio = ratio_at(jnp.asarray(step) - schedule.fade_steps, schedule.ramp_steps, schedule.ratio)
        missing = merging_loss(joining.share, ratio)
        return Asked(missing, {"merging": missing, "share": joining.share})

    first = (0, Reading(FadingAttend(config.cache_windows, backend), fade))
    second = (schedule.fade_steps, Reading(merges, lambda ids, key, step: Joining(key, ids=ids), asks))
    return (first, second) if schedule.fade_steps else (second,)


# Attention


class Fading(NamedTuple):
    """What stands for the cache in the first stage.

    Attributes:
      factor: float32[], what the two channels are multiplied by.
      ids: int32[B, T], tokens of equal ids are one document; None: each row is one.
    """

    factor: jax.Array
    ids: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class FadingAttend(PackedAttend):
    """Plain attention without a cache, the last channel of queries and keys faded before RoPE.

    What stands for the cache is a `Fading`.
    """

    def __call__(
        self,
        cache: Any,
        layer: Any,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array | None,
        positions: jax.Array,
        rotate: Rotate,
        *,
        scoring: Scoring = Scoring(),
        write: bool = True,
    ) -> tuple[jax.Array, Any]:
        """q [B,T,H,D], k [B,T,K,D], v [B,T,K,Dv], positions int32[B,T] -> out [B,T,H,Dv], the `Fading`."""
        q, k = (x.at[..., -1].multiply(cache.factor.astype(x.dtype)) for x in (q, k))
        among = None if cache.ids is None else Segments(cache.ids)
        return super().__call__(among, layer, q, k, v, positions, rotate, scoring=scoring, write=write)[0], cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Joining:
    """What is carried through the layers of a relaxed forward pass.

    Attributes:
      key: a random key for the noise on decisions; None: no noise.
      joined, count: float32[], the sum of all decisions so far, and how many they are.
      ids: int32[B, T], tokens of equal ids are one document, 0 is padding; None: each row is one.
    """

    key: jax.Array | None
    joined: jax.Array | float = 0.0
    count: jax.Array | float = 0.0
    ids: jax.Array | None = None

    @property
    def share(self) -> jax.Array:
        """float32[], the mean decision: 1 - 1 / ratio of the cache it makes."""
        return self.joined / jnp.maximum(self.count, 1.0)


@dataclasses.dataclass(frozen=True)
class DMCAttend(DenseAttend):
    """Causal attention over whole rows (positions 0, 1, ...; -1 only behind them) as `policies.DMC()` will make it.

    Documents in one row stay apart: none sees another, and a document's first token joins nothing.

    Every token keeps an entry of its own, the blend as of that token, and what will be overwritten is hidden from
    later queries: the more the next token joins it, the more. Decisions are Gumbel-sigmoid samples (Jang et al. 2017,
    1611.01144), 0 for a row's first token: alpha = sigmoid((k - 5 + logistic noise) / temperature). A blend reaches
    back over the last `span` tokens, each under its weight times all decisions since; to scores of other queries than
    its own is added log(1 - alpha) of the next token. Without noise, at temperatures near 0 and where no run is longer
    than `span`, that is what decoding computes.

    What stands for the cache is a `Joining`.

    Attributes:
      spec: what the model asks of its cache.
      span: tokens of a blend at most. temperature: of decisions. block: queries computed at once.
    """

    spec: KVSpec = KVSpec(1, 1, 2, 2)
    span: int = 12
    temperature: float = 0.1
    block: int = 128
    # Latents are merged as they will be cached, not expanded to heads that would each weigh for themselves.
    latent: ClassVar[bool] = True

    @classmethod
    def of(cls, config: ModelConfig, span: int = 12, temperature: float = 0.1) -> DMCAttend:
        """What a model takes.

        Raises:
          ConfigError: a model that DMC cannot serve, a span below 1, a temperature not above 0.
        """
        _check(config)
        if not isinstance(span, int) or span < 1:
            raise ConfigError(f"span must be an integer of at least 1, got {span!r}")
        if not temperature > 0:
            raise ConfigError(f"temperature must be above 0, got {temperature!r}")
        return cls(config.cache_windows, spec=config.kv_spec, span=span, temperature=temperature)

    def begin(self, cache: Joining, tokens: jax.Array, positions: jax.Array) -> Joining:
        """Nothing has been decided."""
        zero = jnp.zeros((), jnp.float32)
        return dataclasses.replace(cache, joined=zero, count=zero)

    def __call__(
        self,
        cache: Joining,
        layer: Any,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array | None,
        positions: jax.Array,
        rotate: Rotate,
        *,
        scoring: Scoring = Scoring(),
        write: bool = True,
    ) -> tuple[jax.Array, Joining]:
        """q [B,T,H,D], k [B,T,K,D], v [B,T,K,Dv], positions int32[B,T] -> out [B,T,H,Dv], the decisions so far."""
        alpha, stays = self._decisions(cache, layer, k, positions)
        decision = DMC().decide(q, k, self.spec.query_factor)
        merged = partial_means(decision.k, alpha, decision.weight, self.span)
        if v is None:
            values = merged[..., : self.spec.value_dim]
        else:
            values = partial_means(v, alpha, decision.weight, self.span)
        # The next token's, and nothing for the last one.
        hides = jnp.pad(stays[:, 1:], ((0, 0), (0, 1), (0, 0)))
        turned = rotate(decision.q, positions), rotate(merged, positions)
        out = self._attended(*turned, values, hides, cache.ids, layer, scoring)
        real = positions >= 0 if cache.ids is None else (positions >= 0) & (cache.ids != 0)
        count = jnp.sum(real).astype(jnp.float32) * k.shape[2]
        return out, dataclasses.replace(cache, joined=cache.joined + jnp.sum(alpha), count=cache.count + count)

    def _decisions(self, cache: Joining, layer: Any, k: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """alpha and log(1 - alpha), float32[B, T, K]."""
        gate = k[..., -1].astype(jnp.float32) - BIAS
        if cache.key is not None:
            # The difference of two Gumbel variables is logistic.
            gate = gate + jax.random.logistic(jax.random.fold_in(cache.key, layer), gate.shape)
        gate, free = gate / self.temperature, (positions > 0)[..., None]
        if cache.ids is not None:
            before = jnp.pad(cache.ids[:, :-1], ((0, 0), (1, 0)))
            free = free & ((cache.ids == before) & (cache.ids != 0))[..., None]
        return jnp.where(free, jax.nn.sigmoid(gate), 0.0), jnp.where(free, jax.nn.log_sigmoid(-gate), 0.0)

    def _attended(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        hides: jax.Array,
        ids: jax.Array | None,
        layer: Any,
        scoring: Scoring,
    ) -> jax.Array:
        """q [B,T,H,D] over k, v [B,T,K,*], hides float32[B,T,K] added to scores of later queries -> [B,T,H,Dv]."""
        keys, values, hides = (jnp.swapaxes(x, 1, 2) for x in (k, v, hides))
        window, out = self._window(layer), []
        for start in range(0, q.shape[1], self.block):
            end = min(start + self.block, q.shape[1])
            distance = jnp.arange(start, end)[:, None] - jnp.arange(end)
            score = scores(q[:, start:end], keys[:, :, :end], q.shape[3] ** -0.5, scoring.soft_cap)
            score = score + jnp.where(distance > 0, hides[:, :, None, None, :end], 0.0)
            sees = distance >= 0
            sees = sees if window is None else sees & (distance < window)
            if ids is not None:
                sees = (sees & (ids[:, start:end, None] == ids[:, None, :end]))[:, None, None]
            score = jnp.where(sees, score, FAR)
            if scoring.sinks is not None:
                column = scoring.sinks.astype(jnp.float32).reshape(1, keys.shape[1], -1, 1, 1)
                score = jnp.concatenate([score, jnp.broadcast_to(column, (*score.shape[:-1], 1))], axis=-1)
            weights = jax.nn.softmax(score, axis=-1)[..., :end]
            out.append(heads_last(weighted(weights, values[:, :, :end]).astype(q.dtype)))
        return jnp.concatenate(out, axis=1)


def partial_means(x: jax.Array, alpha: jax.Array, weight: jax.Array, span: int) -> jax.Array:
    """Each token's blend of itself and the span - 1 tokens before it: x [B, T, K, D] -> the same.

    A token counts by its weight float32[B, T, K] times all decisions alpha float32[B, T, K] made since.
    """
    tokens = x.shape[1]

    def back(y: jax.Array, steps: int) -> jax.Array:
        """As of `steps` tokens before; 0 before the first."""
        return jnp.pad(y, ((0, 0), (steps, 0), *((0, 0),) * (y.ndim - 2)))[:, :tokens]

    wide = x.astype(jnp.float32)
    share, total, mean = jnp.ones_like(weight), weight, weight[..., None] * wide
    for steps in range(1, min(span, tokens)):
        share = share * back(alpha, steps - 1)
        counts = share * back(weight, steps)
        total, mean = total + counts, mean + counts[..., None] * back(wide, steps)
    return (mean / total[..., None]).astype(x.dtype)


def _check(config: ModelConfig) -> None:
    layouts = group_layers(config.kv_spec, config.cache_windows, CacheConfig(policy=DMC()), config.dtype)
    check_deciding(config, layouts)
    check_turning(config, layouts)
