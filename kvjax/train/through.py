"""Training through a smaller cache: what attention reads is what the cache will hold.

A model that sees in training what it will see when it is served learns to do with it. Windows and sinks are masks over
a policy's reads. A codec's rounding has no gradient of use, so it is passed over as if it were not there (the
straight-through estimator: Bengio et al. 2013, 1308.3432): keys and values are read as stored, and what is learnt about
them goes to those that were stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kvjax.attention.dense import DenseAttend
from kvjax.attention.partial import merged, turned
from kvjax.attention.sharded import attention
from kvjax.cache.codecs import KIVI, Dense
from kvjax.cache.codecs.calibrated import calibrated
from kvjax.cache.codecs.waiting import waits
from kvjax.cache.config import CacheConfig
from kvjax.cache.layout import GroupLayout
from kvjax.cache.policies import Full, StreamingLLM
from kvjax.cache.policies.optional import decides
from kvjax.cache.policies.protocol import Read
from kvjax.errors import ConfigError
from kvjax.generate.state import layouts_of
from kvjax.model import Model
from kvjax.train.attend import Segments
from kvjax.typing import Rotate, Scoring
from pallas_kernels.softmax import heads_last, scores, weighted

FAR = -1e30
"""The score of what is not seen: finite, so that no gradient is NaN."""


def through_attend(model: Model, cache: CacheConfig, backend: str | None = None) -> ThroughAttend:
    """The attention of training through `cache`; it takes `Segments` as its cache, as `training_attend`'s does.

    Raises:
      ConfigError: what a query would read does not follow from positions alone, or the cache cannot serve the model.
    """
    if model.config.goldfinch is not None:
        raise ConfigError(
            "through cannot serve GoldFinch: what it holds are no keys and values but what they are rebuilt from; "
            "train it without"
        )
    layouts = layouts_of(model, cache)
    for layout in layouts:
        _check(layout)
    return ThroughAttend(backend=backend, layouts=layouts)


def straight_through(x: jax.Array, stored: jax.Array) -> jax.Array:
    """`stored`, to the last bit; gradients go to `x` as if it were `x`."""
    return jax.lax.stop_gradient(stored) + (x - jax.lax.stop_gradient(x))


@dataclasses.dataclass(frozen=True)
class ThroughAttend(DenseAttend):
    """Causal attention over whole rows as one token a step will have it over a cache; `Segments` keep documents apart.

    Positions begin at 0 with each document. One read of all, or of a window, goes to the flash kernels, keys and values
    as their codec gives them back; sinks and KIVI's exact newest tokens go by plain products, `block` queries at once.

    A prompt that is prefilled in one piece reads KIVI's keys and values exactly; here every token is one that was
    decoded, so that what is seen in training is never better than what will be.

    Attributes:
      layouts: the cache's groups of layers.
    """

    layouts: tuple[GroupLayout, ...] = ()
    block: int = 128

    @property
    def latent(self) -> bool:
        """Whether latents are attended to as they are cached, not expanded: a codec codes them so."""
        return any(layout.codec != Dense() for layout in self.layouts)

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
        """q [B,T,H,D], k [B,T,K,D], v [B,T,K,Dv] or None, positions int32[B,T] -> out [B,T,H,Dv], the cache."""
        layout = self._layout(layer)
        ids = cache.ids if isinstance(cache, Segments) else None
        keys = rotate(k, positions)
        codec: Any = layout.codec
        if waits(codec):
            parts = _waiting(codec, rotate(q, positions), keys, v, positions, layout.spec.value_dim)
            return attend_parts(parts, positions, ids, scoring, self.block), cache
        keys = _as_stored(codec, keys)
        values = keys[..., : layout.spec.value_dim] if v is None else _as_stored(codec, v)
        reads = layout.policy.reads(layout.window)
        if len(reads) == 1 and reads[0] == Read(window=reads[0].window):
            part = attention(
                rotate(q, positions),
                keys,
                values,
                window=reads[0].window,
                segment_ids=ids,
                soft_cap=scoring.soft_cap,
                backend=self.backend,
            )
            return merged([part], scoring.sinks)[0], cache
        parts = [_part(read, q, keys, values, positions, rotate, ids is None) for read in _single(reads)]
        return attend_parts(parts, positions, ids, scoring, self.block), cache

    def _layout(self, layer: Any) -> GroupLayout:
        if len(self.layouts) == 1:
            return self.layouts[0]
        return next(layout for layout in self.layouts if layer in layout.layers)


class Part(NamedTuple):
    """Queries, and some of the keys that they see.

    Attributes:
      q: [B, T, H, D] and k: [B, S, K, D], rotated; v: [B, S, K, Dv]; S up to T, the first tokens of the rows.
      sees: (positions of queries int32[B, n, 1], of keys int32[B, 1, m]) -> bool[B, n, m]; no key is in two parts.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    sees: Callable[[jax.Array, jax.Array], jax.Array]


def attend_parts(
    parts: Sequence[Part], positions: jax.Array, ids: jax.Array | None, scoring: Scoring, block: int
) -> jax.Array:
    """One softmax over the keys of all parts; a token sees none behind it, and none of another id -> [B, T, H, Dv]."""
    tokens, out = positions.shape[1], []
    keys, values = ([jnp.swapaxes(x, 1, 2) for x in side] for side in zip(*((p.k, p.v) for p in parts), strict=True))
    for start in range(0, tokens, block):
        end = min(start + block, tokens)
        masked = []
        for part, key in zip(parts, keys, strict=True):
            stop = min(end, key.shape[2])
            seen = part.sees(positions[:, start:end, None], positions[:, None, :stop])
            seen = seen & (jnp.arange(start, end)[:, None] >= jnp.arange(stop))
            if ids is not None:
                seen = seen & (ids[:, start:end, None] == ids[:, None, :stop])
            score = scores(part.q[:, start:end], key[:, :, :stop], part.q.shape[3] ** -0.5, scoring.soft_cap)
            masked.append(jnp.where(seen[:, None, None], score, FAR))
        if scoring.sinks is not None:
            column = scoring.sinks.astype(jnp.float32).reshape(1, masked[0].shape[1], -1, 1, 1)
            masked.append(jnp.broadcast_to(column, (*masked[0].shape[:-1], 1)))
        weights, first = jax.nn.softmax(jnp.concatenate(masked, axis=-1), axis=-1), 0
        total: jax.Array | float = 0.0
        for score, value in zip(masked, values, strict=False):
            width = score.shape[-1]
            total = total + weighted(weights[..., first : first + width], value[:, :, :width])
            first += width
        assert isinstance(total, jax.Array)
        out.append(heads_last(total.astype(parts[0].q.dtype)))
    return jnp.concatenate(out, axis=1)


def _single(reads: Sequence[Read]) -> list[Read]:
    """Reads with a `lag` turn the query for each token apart: as one read per token."""
    found = []
    for read in reads:
        if read.lag is None:
            found.append(read)
            continue
        assert read.last is not None
        for token in range(read.first, read.last):
            found.append(Read(first=token, last=token + 1, turn=token + read.lag, slots=read.slots))
    return found


def _part(
    read: Read, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, rotate: Rotate, whole: bool
) -> Part:
    """What a read covers, keys rotated. whole: each row is one document, whose tokens lie at their positions."""

    def sees(queries: jax.Array, keys: jax.Array) -> jax.Array:
        found = (keys >= read.first) & (keys <= queries)
        found = found if read.last is None else found & (keys < read.last)
        return found if read.window is None else found & (queries - keys < read.window)

    columns = slice(read.last if whole else None)
    return Part(rotate(q, turned(positions, read)), k[:, columns], v[:, columns], sees)


def _as_stored(codec: Any, x: jax.Array) -> jax.Array:
    """x [..., D] as it is read back, straight through; Dense() stores it as it is."""
    if codec == Dense():
        return x
    return straight_through(x, codec.decode(codec.encode(jax.lax.stop_gradient(x)), x.dtype))


def _waiting(
    codec: KIVI, q: jax.Array, k: jax.Array, v: jax.Array | None, positions: jax.Array, value_dim: int
) -> list[Part]:
    """What a query at i reads of a cache that has coded the first i - i mod residual keys and i - residual values."""
    residual, keys = codec.residual, straight_through(k, _coded_keys(codec, jax.lax.stop_gradient(k), positions))

    def old(queries: jax.Array, keys: jax.Array) -> jax.Array:
        return keys < queries - queries % residual

    def new(queries: jax.Array, keys: jax.Array) -> jax.Array:
        return ~old(queries, keys)

    if v is None:
        return [Part(q, keys, keys[..., :value_dim], old), Part(q, k, k[..., :value_dim], new)]
    values = straight_through(v, codec.read_values(codec.code_values(jax.lax.stop_gradient(v)), v.dtype))
    return [
        Part(q, keys, values, lambda queries, keys: keys < queries - residual),
        Part(q, keys, v, lambda queries, keys: (keys >= queries - residual) & old(queries, keys)),
        Part(q, k, v, new),
    ]


def _coded_keys(codec: KIVI, k: jax.Array, positions: jax.Array) -> jax.Array:
    """k [B, T, K, D] with whole pages of a document read back from their codes; what fills no page stays as it is."""
    group, tokens = codec.group, k.shape[1]

    def one(k: jax.Array, positions: jax.Array) -> jax.Array:
        last = (positions >= 0) & (positions % group == group - 1)
        (ends,) = jnp.nonzero(last, size=tokens // group, fill_value=-1)
        place = ends[:, None] - group + 1 + jnp.arange(group)
        # A row may begin in the midst of a page, which then is none.
        place = jnp.where((ends >= group - 1)[:, None], place, tokens)
        pages = jnp.moveaxis(k.at[place].get(mode="fill", fill_value=0), 2, 1)
        read = codec.read_keys(codec.code_keys(pages), k.dtype)
        return k.at[place].set(jnp.moveaxis(read, 1, 2), mode="drop")

    return k if tokens < group else jax.vmap(one)(k, positions)


def _check(layout: GroupLayout) -> None:
    policy, codec = layout.policy, layout.codec
    if decides(policy):
        raise ConfigError(
            f"through.policy={policy!r} is learnt in all layers or in none, under a loss of its own: give it without "
            "overrides, and dmc=DMCSchedule(ratio, fade_steps, ramp_steps)"
        )
    if not isinstance(policy, Full | StreamingLLM):
        raise ConfigError(
            f"through.policy={policy!r} keeps or merges tokens by more than their positions, and what is chosen has no "
            "gradient: take Full, SlidingWindow, StreamingLLM or LMInfinite"
        )
    if layout.select is not None:
        raise ConfigError(
            f"through.select={layout.select!r} reads what scores highest, a choice that has no gradient; take None, "
            "which reads everything held"
        )
    if calibrated(codec):
        raise ConfigError(
            f"through.codec={codec!r} was calibrated on the keys and values that training changes; take Int8, FP8, "
            "Int4 or KIVI, or train first and calibrate then"
        )
