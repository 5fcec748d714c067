"""Sampling: what is kept, what is drawn, and what a draw may depend on."""

from __future__ import annotations

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.config import Sampling
from kvjax.errors import ConfigError, KvjaxError, RequestError
from kvjax.generate.sampling import (
    ProcessorContext,
    SamplingKind,
    SamplingState,
    check_finite,
    draw,
    filter_logits,
    kind_of,
    make_state,
    penalise,
)

B, V = 4, 12
GREEDY = SamplingKind(greedy=True, filtered=False, penalised=False)
PLAIN = SamplingKind(greedy=False, filtered=False, penalised=False)
FILTERED = SamplingKind(greedy=False, filtered=True, penalised=False)
# Critical value of the chi-square distribution with 7 degrees of freedom at p = 1e-6; the seeds are fixed.
CHI_SQUARE_7 = 40.5

few = hypothesis.settings(max_examples=60, deadline=None)
# A coarse grid makes ties frequent.
grids = st.lists(st.lists(st.integers(-6, 6), min_size=V, max_size=V), min_size=B, max_size=B).map(
    lambda rows: np.asarray(rows, np.float32) / 2
)
seeds_of = st.integers(0, 2**32 - 1)

jit_draw = jax.jit(draw, static_argnums=3)
jit_filter = jax.jit(filter_logits)


def context(batch: int, step: int | np.ndarray = 0) -> ProcessorContext:
    steps = jnp.broadcast_to(jnp.asarray(step, jnp.int32), (batch,))
    return ProcessorContext(steps, steps + 5, jnp.zeros(batch, jnp.int32))


def state_of(batch: int = B, seed: int = 0, **values: float) -> SamplingState:
    """One key per row, the same settings in every row."""
    seeds = [(seed + row) % 2**32 for row in range(batch)]
    return make_state(Sampling(**{"temperature": 1.0, **values}), seeds, [[0]] * batch, V, batch)


def logits_of(seed: int, batch: int = B, vocab: int = V) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (batch, vocab)).astype(np.float32)


def rows(value: float, dtype: type) -> jax.Array:
    return jnp.full(B, value, dtype)


# ---------------------------------------------------------------------------------------------- what is kept


@few
@hypothesis.given(grids, st.integers(0, V + 3), st.floats(1e-6, 1), st.floats(0, 1), st.integers(0, 3))
def test_some_token_is_always_kept_and_the_likeliest_among_them(logits, top_k, top_p, min_p, forbidden):
    logits[:, :forbidden] = -np.inf
    kept = np.asarray(jit_filter(logits, rows(top_k, int), rows(top_p, float), rows(min_p, float)))
    best = logits.max(-1)
    assert np.all(kept.max(-1) == best)
    assert np.all((kept == logits) | (kept == -np.inf))


@few
@hypothesis.given(grids, st.floats(0.01, 0.999))
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass_and_the_lowest_ids_of_equals(logits, top_p):
    mass = np.exp(logits.astype(np.float64))
    mass /= mass.sum(-1, keepdims=True)
    expected = np.full(logits.shape, -np.inf, np.float32)
    for row in range(B):
        order = np.argsort(-mass[row], kind="stable")
        cumulative = np.cumsum(mass[row, order])
        # float32 cumulative sums of 12 terms are good to about 1e-6: leave out masses that close to the boundary.
        hypothesis.assume(np.abs(cumulative - top_p).min() > 1e-5)
        chosen = order[: np.searchsorted(cumulative, top_p) + 1]
        expected[row, chosen] = logits[row, chosen]
    np.testing.assert_array_equal(jit_filter(logits, rows(0, int), rows(top_p, float), rows(0, float)), expected)


@few
@hypothesis.given(grids, st.integers(1, V + 3))
def test_top_k_keeps_k_tokens_and_all_equals_of_the_last(logits, top_k):
    kept = np.asarray(jit_filter(logits, rows(top_k, int), rows(1, float), rows(0, float)))
    kth = np.sort(logits, axis=-1)[:, ::-1][:, min(top_k, V) - 1]
    np.testing.assert_array_equal(kept > -np.inf, logits >= kth[:, None])


@few
@hypothesis.given(grids)
def test_filters_that_are_off_keep_everything(logits):
    np.testing.assert_array_equal(jit_filter(logits, rows(0, int), rows(1, float), rows(0, float)), logits)


def test_top_p_of_one_keeps_the_whole_of_a_large_vocabulary_in_spite_of_rounding():
    logits = np.random.default_rng(0).normal(0, 8, (1, 20000)).astype(np.float32)
    kept = filter_logits(logits, jnp.zeros(1, int), jnp.ones(1), jnp.zeros(1))
    np.testing.assert_array_equal(kept, logits)


@pytest.mark.parametrize("top_k", [0, 1, 7, 400])
@pytest.mark.parametrize("top_p", [1.0, 0.1, 0.73, 0.999])
@pytest.mark.parametrize("min_p", [0.0, 0.04, 1.0])
def test_kept_sets_equal_the_warpers_of_transformers(top_k, top_p, min_p):
    torch = pytest.importorskip("torch", reason="parity needs torch")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    logits = logits_of(top_k, batch=B, vocab=300) / 0.7
    expected = torch.tensor(logits)
    if top_k:
        expected = transformers.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = transformers.TopPLogitsWarper(top_p)(None, expected)
    if min_p:
        expected = transformers.MinPLogitsWarper(min_p)(None, expected)
    kept = jit_filter(logits, rows(top_k, int), rows(top_p, float), rows(min_p, float))
    np.testing.assert_array_equal(kept, expected.numpy())


def test_repetition_penalty_equals_that_of_transformers():
    torch = pytest.importorskip("torch", reason="parity needs torch")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    logits = logits_of(3)
    prompts = [[1, 2, 2], [0, 0, 0], [11, 4, 5], [7, 1, 7]]
    expected = transformers.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(prompts), torch.tensor(logits))
    state = make_state(Sampling(repetition_penalty=1.3), range(B), prompts, V, B)
    # One float32 multiplication or division: 1 ulp.
    np.testing.assert_allclose(penalise(logits, state.presence, state.penalty), expected.numpy(), rtol=2e-7)


# ---------------------------------------------------------------------------------------------- what is drawn


def chi_square(tokens: np.ndarray, probability: np.ndarray) -> float:
    expected = probability * tokens.size
    counts = np.bincount(tokens, minlength=probability.size)
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    return float((((counts - expected)[possible]) ** 2 / expected[possible]).sum())


@pytest.mark.parametrize("by", ["sequence", "step"])
@pytest.mark.parametrize("settings", [{}, {"top_k": 6, "top_p": 0.95, "temperature": 1.5}], ids=["plain", "filtered"])
def test_draws_follow_the_distribution_over_sequences_and_over_steps(settings, by):
    draws, vocab = 4000, 8
    logits = np.log(np.asarray([0.05, 0.3, 0.02, 0.2, 0.13, 0.1, 0.08, 0.12])).astype(np.float32)
    sampling = Sampling(**{"temperature": 1.0, **settings})
    seeds = range(draws) if by == "sequence" else [7] * draws
    state = make_state(sampling, seeds, [[0]] * draws, vocab, draws)
    steps = 3 if by == "sequence" else np.arange(draws)
    token, _, _ = jit_draw(np.tile(logits, (draws, 1)), state, context(draws, steps), kind_of(sampling))
    probability = np.exp(logits.astype(np.float64) / sampling.temperature)
    if sampling.top_k:
        probability[np.argsort(-probability)[sampling.top_k :]] = 0
    probability /= probability.sum()
    # No prefix of the six likeliest reaches 0.95, so top-p keeps them all.
    assert chi_square(np.asarray(token), probability) < CHI_SQUARE_7


@few
@hypothesis.given(seeds_of)
def test_filters_that_are_off_draw_what_the_plain_categorical_draws(seed):
    logits, state = logits_of(seed), state_of(seed=seed)
    plain, _, _ = jit_draw(logits, state, context(B, 2), PLAIN)
    filtered, _, _ = jit_draw(logits, state, context(B, 2), FILTERED)
    keys = [jax.random.fold_in(key, 2) for key in state.keys]
    by_hand = [jax.random.categorical(key, row) for key, row in zip(keys, jnp.asarray(logits), strict=True)]
    np.testing.assert_array_equal(plain, filtered)
    np.testing.assert_array_equal(plain, by_hand)


@few
@hypothesis.given(seeds_of, st.integers(1, V), st.floats(0.05, 1), st.floats(0, 1))
def test_a_drawn_token_is_a_kept_one(seed, top_k, top_p, min_p):
    logits = logits_of(seed)
    state = state_of(seed=seed, top_k=top_k, top_p=top_p, min_p=min_p, temperature=0.8)
    token, _, _ = jit_draw(logits, state, context(B), FILTERED)
    scaled = (logits - logits.max(-1, keepdims=True)) / np.float32(0.8)
    kept = np.asarray(jit_filter(scaled, state.top_k, state.top_p, state.min_p))
    assert np.all(kept[np.arange(B), token] > -np.inf)


@few
@hypothesis.given(grids)
def test_temperature_zero_in_a_mixed_batch_equals_the_greedy_kind_and_ties_take_the_lowest_id(logits):
    state = state_of()._replace(temperature=jnp.asarray([0, 1, 0, 1], jnp.float32))
    mixed, mixed_logprob, _ = jit_draw(logits, state, context(B), FILTERED)
    greedy, greedy_logprob, _ = jit_draw(logits, state, context(B), GREEDY)
    lowest = [int(np.flatnonzero(row == row.max())[0]) for row in logits]
    np.testing.assert_array_equal(greedy, lowest)
    np.testing.assert_array_equal(mixed[::2], greedy[::2])
    np.testing.assert_array_equal(mixed_logprob[::2], greedy_logprob[::2])


@few
@hypothesis.given(seeds_of, st.sampled_from([PLAIN, FILTERED]))
def test_tiny_temperatures_draw_the_likeliest(seed, kind):
    logits = logits_of(seed) * 40
    state = state_of(seed=seed)._replace(temperature=rows(1e-37, jnp.float32))
    token, logprob, _ = jit_draw(logits, state, context(B), kind)
    np.testing.assert_array_equal(token, logits.argmax(-1))
    assert np.all(np.isfinite(logprob))


@few
@hypothesis.given(seeds_of)
def test_logprob_is_the_log_softmax_of_the_raw_logits(seed):
    logits = logits_of(seed)
    sampling = Sampling(temperature=0.5, top_k=3, repetition_penalty=2.0)
    kind = kind_of(sampling, (forbid_even,))
    state = make_state(sampling, range(B), [[1, 2]] * B, V, B)
    token, logprob, _ = jit_draw(logits, state, context(B), kind)
    wide = logits.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    # float32 sums of 12 exponentials of numbers below 10: a few ulp of 10.
    np.testing.assert_allclose(logprob, expected[np.arange(B), token], atol=5e-6)


# ---------------------------------------------------------------------------------------------- what a draw depends on


@few
@hypothesis.given(seeds_of, st.integers(0, B - 1), st.integers(0, 1000))
def test_batch_mates_and_padding_do_not_matter(seed, place, step):
    """The same request, alone or in any row, among mates with other settings, filters compiled in or not."""
    logits, sampling = logits_of(seed), Sampling(temperature=0.9)
    alone = make_state(sampling, [seed], [[0]], V, 1)
    token, logprob, _ = jit_draw(logits[:1], alone, context(1, step), PLAIN)

    mates = state_of(seed=seed // 2, top_k=2, top_p=0.5, min_p=0.1, temperature=2.0)
    mixed = jax.tree.map(lambda many, one: many.at[place].set(one[0]), mates, alone)
    steps = np.arange(B)
    steps[place] = step
    others = logits_of(seed // 3)
    others[place] = logits[0]
    among, among_logprob, _ = jit_draw(others, mixed, context(B, steps), FILTERED)
    assert among[place] == token[0]
    # Reductions over V may be ordered otherwise at another batch size: 2 ulp of numbers up to 10.
    np.testing.assert_allclose(among_logprob[place], logprob[0], atol=2e-6)

    padded = make_state(sampling, [seed], [[0]], V, B)
    token_padded, _, _ = jit_draw(np.tile(logits[:1], (B, 1)), padded, context(B, step), PLAIN)
    assert token_padded[0] == token[0]


def test_equal_seeds_give_equal_tokens_and_other_seeds_or_steps_give_others():
    logits = np.zeros((2, V), np.float32)

    def tokens(seeds: tuple[int, int]) -> np.ndarray:
        state = make_state(Sampling(temperature=1.0), seeds, [[0], [0]], V, 2)
        return np.stack([jit_draw(logits, state, context(2, step), PLAIN)[0] for step in range(24)])

    same = tokens((5, 5))
    np.testing.assert_array_equal(same[:, 0], same[:, 1])
    np.testing.assert_array_equal(tokens((5, 6))[:, 0], same[:, 0])
    assert len(set(same[:, 0].tolist())) > 3
    assert np.any(tokens((5, 6))[:, 1] != same[:, 0])


def test_samples_of_a_prompt_have_distinct_keys_and_the_first_is_that_of_n_equals_one():
    prompts = [[1], [2, 3]]
    state = make_state(Sampling(temperature=1.0, n=3, repetition_penalty=1.5), [8, 9], prompts, V, 8)
    single = make_state(Sampling(temperature=1.0), [8, 9], prompts, V, 2)
    data = np.asarray(jax.random.key_data(state.keys))
    assert len({tuple(row) for row in data[:6].tolist()}) == 6
    np.testing.assert_array_equal(data[[0, 3]], jax.random.key_data(single.keys))
    np.testing.assert_array_equal(np.asarray(state.presence)[3:6, [1, 2, 3]], [[False, True, True]] * 3)
    assert not np.asarray(state.presence)[6:].any()


def test_the_penalty_sees_generated_tokens_too_inside_a_scan():
    logits = np.tile(np.asarray([3.0, 2.5, 2.0, -1.0], np.float32), (2, 1))
    sampling = Sampling(repetition_penalty=2.0)
    state = make_state(sampling, [0, 0], [[3], [0]], 4, 2)

    def step(state: SamplingState, number: jax.Array) -> tuple[SamplingState, jax.Array]:
        token, _, state = draw(logits, state, context(2, number), kind_of(sampling))
        return state, token

    _, tokens = jax.lax.scan(step, state, jnp.arange(4))
    # Penalised: 1.5, 1.25, 1.0, -2. First row: nothing but token 3 is present.
    np.testing.assert_array_equal(np.asarray(tokens).T, [[0, 1, 2, 0], [1, 2, 0, 0]])


def test_a_token_that_is_not_taken_is_not_present():
    logits = np.tile(np.asarray([3.0, 2.5, 2.0, -1.0], np.float32), (2, 1))
    sampling = Sampling(repetition_penalty=2.0)
    state = make_state(sampling, [0, 0], [[3], [0]], 4, 2)
    active = jnp.asarray([True, False])
    token, _, after = draw(logits, state, context(2), kind_of(sampling), active)
    np.testing.assert_array_equal(token, [0, 1])
    np.testing.assert_array_equal(after.presence, [[True, False, False, True], [True, False, False, False]])


def test_other_values_never_compile_again():
    traces = []

    def counted(logits, state, context, kind):
        traces.append(kind)
        return draw(logits, state, context, kind)

    jitted = jax.jit(counted, static_argnums=3)
    settings = [
        Sampling(temperature=t, top_k=k, top_p=p, min_p=m, repetition_penalty=r)
        for t, k, p, m, r in [(1, 2, 0.9, 0.1, 1.1), (0.5, 0, 0.5, 0, 2), (3, 9, 1, 0.9, 0.5)]
    ]
    for number, sampling in enumerate(settings):
        # Equal processors hash equal, so making them anew is free.
        kind = kind_of(sampling, (Bias(2, 5.0), forbid_even))
        state = make_state(sampling, [number] * B, [[number]] * B, V, B)
        jitted(logits_of(number), state, context(B, number), kind)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, GREEDY),
        ({"top_k": 3, "top_p": 0.5}, GREEDY),
        ({"temperature": 1.0}, PLAIN),
        ({"temperature": 1.0, "min_p": 0.1}, FILTERED),
        ({"repetition_penalty": 1.1}, dataclasses.replace(GREEDY, penalised=True)),
    ],
)
def test_a_kind_asks_for_no_more_than_the_settings_need(settings, expected):
    assert kind_of(Sampling(**settings)) == expected


@pytest.mark.parametrize(("kind", "sorts"), [(GREEDY, False), (PLAIN, False), (FILTERED, True)])
def test_the_vocabulary_is_sorted_only_where_a_filter_asks_for_it(kind, sorts):
    jaxpr = str(jax.make_jaxpr(functools.partial(draw, kind=kind))(logits_of(0), state_of(), context(B)))
    assert (" sort[" in jaxpr) == sorts
    assert ("random_bits" in jaxpr) == (not kind.greedy)


# ---------------------------------------------------------------------------------------------- processors and failures


def forbid_even(logits: jax.Array, context: ProcessorContext) -> jax.Array:
    return jnp.where(jnp.arange(logits.shape[-1]) % 2 == 0, -jnp.inf, logits)


def forbid_last(logits: jax.Array, context: ProcessorContext) -> jax.Array:
    return logits.at[jnp.arange(logits.shape[0]), context.last_token].set(-jnp.inf)


def drop_a_token(logits: jax.Array, context: ProcessorContext) -> jax.Array:
    return logits[:, 1:]


@dataclasses.dataclass(frozen=True)
class Bias:
    """Adds a number to one token's logit."""

    token: int
    amount: float

    def __call__(self, logits: jax.Array, context: ProcessorContext) -> jax.Array:
        return logits.at[:, self.token].add(self.amount)


@dataclasses.dataclass(frozen=True)
class ForbidAllAt:
    """Leaves nothing to draw at one position."""

    position: int

    def __call__(self, logits: jax.Array, context: ProcessorContext) -> jax.Array:
        return jnp.where(context.position[:, None] == self.position, -jnp.inf, logits)


def test_processors_run_in_order_and_see_the_context():
    logits = np.tile(np.asarray([0.0, 4.0, 3.0, 2.0], np.float32), (2, 1))
    state = make_state(Sampling(), [0, 0], [[0], [0]], 4, 2)
    where = ProcessorContext(jnp.zeros(2, int), jnp.ones(2, int), jnp.asarray([1, 3]))
    kind = dataclasses.replace(GREEDY, processors=(Bias(2, 0.5), forbid_last))
    np.testing.assert_array_equal(draw(logits, state, where, kind)[0], [2, 1])
    doubled = [(double, Bias(3, 3.0)), (Bias(3, 3.0), double)]
    tokens = [draw(logits, state, where, dataclasses.replace(GREEDY, processors=p))[0][0] for p in doubled]
    assert tokens == [1, 3]


def double(logits: jax.Array, context: ProcessorContext) -> jax.Array:
    return logits * 2


@pytest.mark.parametrize("kind", [GREEDY, PLAIN, FILTERED])
@pytest.mark.parametrize("poison", [np.nan, np.inf, "all -inf"])
def test_a_row_that_cannot_be_drawn_says_so_and_leaves_the_others_alone(kind, poison):
    logits, state = logits_of(1), state_of()
    clean = jit_draw(logits, state, context(B), kind)
    bad = logits.copy()
    bad[2, :] = -np.inf if poison == "all -inf" else bad[2, :]
    bad[2, 5] = -np.inf if poison == "all -inf" else poison
    token, logprob, _ = jit_draw(bad, state, context(B), kind)
    assert token[2] == 0
    assert np.isnan(logprob[2])
    others = np.asarray([0, 1, 3])
    np.testing.assert_array_equal(token[others], clean[0][others])
    np.testing.assert_array_equal(logprob[others], clean[1][others])


@pytest.mark.parametrize("kind", [GREEDY, PLAIN])
def test_a_processor_that_forbids_everything_is_reported_for_its_row_only(kind):
    kind = dataclasses.replace(kind, processors=(ForbidAllAt(7),))
    token, logprob, _ = jit_draw(logits_of(4), state_of(), context(B, np.asarray([0, 2, 1, 3])), kind)
    np.testing.assert_array_equal(np.isnan(logprob), [False, True, False, False])
    assert token[1] == 0


def test_some_forbidden_tokens_in_the_model_s_own_logits_are_fine():
    logits = logits_of(5)
    logits[:, 4:] = -np.inf
    token, logprob, _ = jit_draw(logits, state_of(), context(B), PLAIN)
    assert np.all(token < 4)
    assert np.all(np.isfinite(logprob))


def test_check_finite_names_the_sequence_and_the_token_on_ragged_lists():
    check_finite([[-1.0, -2.0], [], [-0.5]])
    check_finite(np.zeros((2, 3), np.float32))
    with pytest.raises(KvjaxError, match="sequence 2: generated token 1 "):
        check_finite([[-1.0], [], [-0.5, float("nan"), float("nan")]])


def test_bad_settings_are_refused_with_what_to_do():
    with pytest.raises(RequestError, match="one seed per prompt"):
        make_state(Sampling(), [1], [[0], [0]], V, 2)
    with pytest.raises(RequestError, match="need 4 rows"):
        make_state(Sampling(n=2), [1, 2], [[0], [0]], V, 3)
    for seed in (-1, 2**32, 0.5):
        with pytest.raises(RequestError, match="seeds are integers in"):
            make_state(Sampling(), [seed], [[0]], V, 1)
    with pytest.raises(ConfigError, match="frozen dataclass"):
        kind_of(Sampling(), (UnhashableProcessor(),))
    with pytest.raises(ConfigError, match="callable"):
        kind_of(Sampling(), (3,))
    with pytest.raises(ConfigError, match="must keep"):
        draw(logits_of(0), state_of(), context(B), dataclasses.replace(GREEDY, processors=(drop_a_token,)))
    with pytest.raises(ConfigError, match="presence"):
        draw(logits_of(0), state_of(), context(B), dataclasses.replace(GREEDY, penalised=True))


@dataclasses.dataclass
class UnhashableProcessor:
    """A plain dataclass defines equality and so loses its hash."""

    def __call__(self, logits: jax.Array, context: ProcessorContext) -> jax.Array:
        return logits
