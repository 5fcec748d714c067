"""Drawing the next token: pure functions of a step's logits, for use inside the decode scan.

What has to be computed at all is static (`SamplingKind`): greedy decoding draws no noise and sorts no vocabulary. Every
number is traced, one per sequence (`SamplingState`): other values never compile again. A sequence's noise comes from
its own key and its own count of tokens, so that equal requests give equal tokens whatever shares their batch.

Order of work: repetition penalty, the users' processors, temperature, top-k, top-p, min-p, the draw.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.config import Sampling
from kvjax.errors import ConfigError, KvjaxError, RequestError

MAX_SEED = 2**32


class ProcessorContext(NamedTuple):
    """What is known of each sequence when its next token is drawn.

    Attributes:
      step: int32[B], tokens the sequence has generated so far (0: the first draw).
      position: int32[B], the position that the token to be drawn will take, prompt included.
      last_token: int32[B], the token before it.
    """

    step: jax.Array
    position: jax.Array
    last_token: jax.Array


@runtime_checkable
class LogitsProcessor(Protocol):
    """A user's own change of the logits, run after the repetition penalty and before temperature and filters.

    A pure function of arrays that `jax.jit` can trace, called with logits float32[B, V] and a `ProcessorContext`, and
    returning float32[B, V]; -inf forbids a token. It is a static argument, so it must be hashable: a module-level
    function, or an instance of a frozen dataclass. A fresh lambda per call would compile every time.
    """

    def __call__(self, logits: jax.Array, context: ProcessorContext, /) -> jax.Array:
        """Logits float32[B, V] to logits float32[B, V]."""
        ...


@dataclasses.dataclass(frozen=True)
class SamplingKind:
    """What `draw` has to compute, static under `jax.jit`.

    Attributes:
      greedy: every sequence takes its likeliest token; no noise, no sort.
      filtered: some sequence uses top-k, top-p or min-p; costs one sort of the vocabulary.
      penalised: some sequence has a repetition penalty; costs bool[B, V] of state.
      processors: the users' processors, in the order they run.
    """

    greedy: bool
    filtered: bool
    penalised: bool
    processors: tuple[LogitsProcessor, ...] = ()


class SamplingState(NamedTuple):
    """The numbers of a draw, one entry per sequence. `draw` changes only `presence`.

    Attributes:
      keys: typed PRNG keys [B].
      temperature: float32[B]; 0 takes the likeliest token.
      top_k: int32[B], 0: all.
      top_p: float32[B], 1: all.
      min_p: float32[B], 0: all.
      penalty: float32[B], 1: none.
      presence: bool[B, V], tokens in the prompt or generated so far; None unless the kind is penalised.
    """

    keys: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    penalty: jax.Array
    presence: jax.Array | None


def kind_of(sampling: Sampling, processors: Sequence[LogitsProcessor] = ()) -> SamplingKind:
    """What has to be computed for these settings.

    Raises:
      ConfigError: a processor is not callable or not hashable.
    """
    for processor in processors:
        if not callable(processor):
            raise ConfigError(f"a logits processor must be callable as processor(logits, context), got {processor!r}")
        try:
            hash(processor)
        except TypeError as error:
            raise ConfigError(
                f"a logits processor must be hashable, since it is compiled into the decode loop; {processor!r} is "
                "not: make it a module-level function or a frozen dataclass"
            ) from error
    greedy = sampling.temperature == 0
    return SamplingKind(
        greedy=greedy,
        filtered=not greedy and (sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0),
        penalised=sampling.repetition_penalty != 1,
        processors=tuple(processors),
    )


def make_state(
    sampling: Sampling, seeds: Sequence[int], prompts: Sequence[Sequence[int]], vocab_size: int, batch: int
) -> SamplingState:
    """The state of a batch before its first draw.

    Row i * sampling.n + j is sample j of prompt i; its key is fold_in(key(seeds[i]), j), so that sample 0 is the same
    whatever n is. Rows beyond these are padding and take their likeliest token.

    Args:
      seeds: one per prompt, each in [0, 2**32).
      prompts: token ids, for the repetition penalty; all of them below vocab_size.
      batch: rows, at least len(seeds) * sampling.n.

    Raises:
      RequestError: a seed out of range, or sizes that do not fit together.
    """
    n = sampling.n
    rows = len(seeds) * n
    if len(prompts) != len(seeds):
        raise RequestError(f"there must be one seed per prompt, got {len(seeds)} seeds for {len(prompts)} prompts")
    if batch < rows:
        raise RequestError(f"{len(seeds)} prompts with n={n} need {rows} rows, but the batch has {batch}")
    for index, seed in enumerate(seeds):
        if not isinstance(seed, (int, np.integer)) or not 0 <= seed < MAX_SEED:
            raise RequestError(f"seed {seed!r} of prompt {index} is out of range; seeds are integers in [0, 2**32)")

    def column(value: float, padding: float, dtype: type) -> jax.Array:
        values: np.ndarray = np.full(batch, padding, dtype)
        values[:rows] = value
        return jnp.asarray(values)

    seed_column, sample_column = np.zeros((2, batch), np.uint32)
    seed_column[:rows] = np.repeat(np.asarray(seeds, np.uint32), n)
    sample_column[:rows] = np.tile(np.arange(n, dtype=np.uint32), len(seeds))
    presence = None
    if sampling.repetition_penalty != 1:
        seen = np.zeros((batch, vocab_size), bool)
        for index, prompt in enumerate(prompts):
            seen[index * n : (index + 1) * n, np.asarray(prompt, np.int64)] = True
        presence = jnp.asarray(seen)
    return SamplingState(
        keys=_sample_keys(seed_column, sample_column),
        temperature=column(sampling.temperature, 0, np.float32),
        top_k=column(min(sampling.top_k, vocab_size), 0, np.int32),
        top_p=column(sampling.top_p, 1, np.float32),
        min_p=column(sampling.min_p, 0, np.float32),
        penalty=column(sampling.repetition_penalty, 1, np.float32),
        presence=presence,
    )


@jax.jit
def _sample_keys(seeds: jax.Array, samples: jax.Array) -> jax.Array:
    # The implementation is named because others (rbg) give other bits under vmap: then batch mates would matter.
    return jax.vmap(lambda seed, j: jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), j))(seeds, samples)


def draw(
    logits: jax.Array,
    state: SamplingState,
    context: ProcessorContext,
    kind: SamplingKind,
    active: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, SamplingState]:
    """Draws one token per sequence.

    Args:
      logits: [B, V], the model's own; computed with in float32.
      state: see `SamplingState`.
      context: see `ProcessorContext`; `context.step` also picks each sequence's noise.
      kind: static; must cover what the state's values ask for (a row with temperature 0 is greedy under any kind).
      active: bool[B], sequences that will take their token; None: all. The others' state does not change.

    Returns:
      token: int32[B]; among equal logits the likeliest is the lowest id.
      logprob: float32[B], log-softmax at the token of the logits as given, before penalty, processors and temperature.
        NaN, with token 0, where no token can be drawn: the logits, as given or as processed, hold NaN or +inf or are
        all -inf. Nothing can be raised on the device; the host calls `check_finite`.
      state: with the token marked as present where it is taken.
    """
    raw = jnp.asarray(logits, jnp.float32)
    adjusted = raw
    if kind.penalised:
        if state.presence is None:
            raise ConfigError("a penalised kind needs a state with presence; make it with the same Sampling")
        adjusted = penalise(adjusted, state.presence, state.penalty)
    for processor in kind.processors:
        adjusted = processor(adjusted, context)
        if adjusted.shape != raw.shape:
            raise ConfigError(
                f"logits processor {processor!r} returned shape {adjusted.shape}; it must keep {raw.shape}"
            )
    adjusted = adjusted.astype(jnp.float32)
    token = jnp.argmax(adjusted, axis=-1).astype(jnp.int32)
    if not kind.greedy:
        sampled = _sample(adjusted, state, context.step, kind.filtered)
        token = jnp.where(state.temperature > 0, sampled, token)

    usable = _drawable(raw) & _drawable(adjusted)
    token = jnp.where(usable, token, 0)
    chosen = jnp.take_along_axis(raw, token[:, None], axis=-1)[:, 0]
    logprob = jnp.where(usable, chosen - jax.nn.logsumexp(raw, axis=-1), jnp.nan)
    if state.presence is not None:
        taken = jnp.ones_like(usable) if active is None else active
        state = state._replace(presence=state.presence.at[jnp.arange(token.shape[0]), token].max(taken))
    return token, logprob, state


def penalise(logits: jax.Array, presence: jax.Array, penalty: jax.Array) -> jax.Array:
    """Divides positive and multiplies negative logits of present tokens by the penalty (Keskar et al., 1909.05858).

    logits float32[B, V], presence bool[B, V], penalty float32[B] -> float32[B, V].
    """
    penalty = penalty[:, None]
    return jnp.where(presence, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def filter_logits(logits: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """Sets to -inf what top-k, then top-p, then min-p drop; the likeliest token always stays. One sort serves all.

    top-k keeps every logit that is at least the k-th largest, so equals at the threshold all stay, as in `transformers`
    (Fan et al. 2018, 1805.04833). top-p keeps the smallest set whose mass among what top-k left reaches top_p, the
    token that crosses it included; among equals the lowest ids stay (Holtzman et al. 2020, 1904.09751). min-p drops
    tokens less likely than min_p times the likeliest (Nguyen et al. 2024, 2407.01082).

    Args:
      logits: float32[B, V], after temperature.
      top_k: int32[B], 0: all. top_p: float32[B], 1: all. min_p: float32[B], 0: all.
    """
    vocab_size = logits.shape[-1]
    ranked = jnp.sort(logits, axis=-1, descending=True)
    rank = jnp.arange(vocab_size)
    # In ranked order each filter keeps a prefix, so all that is needed of each is its length.
    k = jnp.where(top_k > 0, jnp.minimum(top_k, vocab_size), vocab_size)[:, None]
    kept_k = jnp.sum(ranked >= jnp.take_along_axis(ranked, k - 1, axis=-1), axis=-1)

    mass = jax.nn.softmax(jnp.where(rank < kept_k[:, None], ranked, -jnp.inf), axis=-1)
    mass_before = jnp.cumsum(mass, axis=-1) - mass
    # Rounding may push the cumulative mass to 1 before the last token: top_p = 1 must still keep all.
    kept_p = jnp.sum((mass_before < top_p[:, None]) | (top_p[:, None] >= 1), axis=-1)

    kept_m = jnp.sum(jnp.exp(ranked - ranked[:, :1]) >= min_p[:, None], axis=-1)

    kept = jnp.clip(jnp.minimum(jnp.minimum(kept_k, kept_p), kept_m), 1, vocab_size)[:, None]
    threshold = jnp.take_along_axis(ranked, kept - 1, axis=-1)
    above = logits > threshold
    level = logits == threshold
    room = kept - jnp.sum(above, axis=-1, keepdims=True)
    keep = above | (level & (jnp.cumsum(level, axis=-1) <= room))
    return jnp.where(keep, logits, -jnp.inf)


def check_finite(logprobs: Sequence[Sequence[float]] | np.ndarray) -> None:
    """Raises if some draw had nothing to draw from. On the host; logprobs: per sequence, those of its real tokens.

    Raises:
      KvjaxError: names the first such sequence and its token.
    """
    for sequence, values in enumerate(logprobs):
        undrawable = np.flatnonzero(np.isnan(np.atleast_1d(np.asarray(values, np.float32))))
        if undrawable.size:
            raise KvjaxError(
                f"sequence {sequence}: generated token {undrawable[0]} could not be drawn: its logits hold NaN or "
                "+inf, or a logits processor left every token at -inf; check the weights (and their dtype's range) "
                "and the processors"
            )


def _sample(logits: jax.Array, state: SamplingState, step: jax.Array, filtered: bool) -> jax.Array:
    """Categorical draw by the Gumbel-max trick: int32[B]."""
    temperature = jnp.where(state.temperature > 0, state.temperature, 1.0)[:, None]
    # The likeliest becomes 0 before the division, so that a tiny temperature cannot overflow to inf - inf.
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    if filtered:
        scaled = filter_logits(scaled, state.top_k, state.top_p, state.min_p)

    # Noise by token id, drawn alike with and without filters: what batch mates ask for must not change a draw.
    def noise_of(key: jax.Array, step: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(key, step), logits.shape[-1:], jnp.float32)

    return jnp.argmax(scaled + jax.vmap(noise_of)(state.keys, step), axis=-1).astype(jnp.int32)


def _drawable(logits: jax.Array) -> jax.Array:
    """bool[B]: no NaN, no +inf, and not all -inf."""
    return jnp.all(logits < jnp.inf, axis=-1) & jnp.any(logits > -jnp.inf, axis=-1)
