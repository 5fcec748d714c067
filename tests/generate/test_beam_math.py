"""Beam search on arrays: equal to a plain search written from its definition, and to transformers."""

from __future__ import annotations

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.generate import beam_math
from kvjax.generate.beam_math import BeamState, Hypotheses

jit_advance = jax.jit(beam_math.advance)
jit_finalise = jax.jit(beam_math.finalise, static_argnums=1)

# Sums of at most a dozen float32 log-probabilities below 30 against float64 ones: a few ulp of 100.
TOLERANCE = 5e-5


class TableModel:
    """A language model whose next token depends on the last two: float64 log-probabilities [V, V, V]."""

    def __init__(self, vocab_size: int, seed: int, spread: float = 2.0):
        logits = np.random.default_rng(seed).normal(0, spread, (vocab_size,) * 3)
        self.logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def next(self, tokens: list[int]) -> np.ndarray:
        return self.logprobs[tokens[-2], tokens[-1]]


def plain_beam_search(model, prompt, beams, limit, stops, penalty) -> list[tuple[float, list[int]]]:
    """Beam search from its definition, on lists: (score, generated tokens), best first."""
    running: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    for length in range(1, limit + 1):
        continuations = [
            (score + float(logprob), [*tokens, token])
            for score, tokens in running
            for token, logprob in enumerate(model.next(prompt + tokens))
        ]
        continuations.sort(key=lambda c: -c[0])
        for rank, (score, tokens) in enumerate(continuations):
            if rank < beams and (tokens[-1] in stops or length == limit):
                finished.append((score / length**penalty, tokens))
        finished.sort(key=lambda c: -c[0])
        del finished[beams:]
        running = [c for c in continuations if c[1][-1] not in stops][:beams]
        if len(finished) == beams and (not running or running[0][0] / length**penalty <= finished[-1][0]):
            break
    return finished


def padded(stops, size: int = 2) -> np.ndarray:
    """One shape for all stop tokens, so that little is compiled."""
    return np.asarray([*stops, *[-1] * (size - len(stops))], np.int32)


def search(models, prompts, beams, limit, stops, penalty, buffer_length=8, trace=None) -> BeamState:
    """Runs `advance` with the table models as the forward pass, following parents and tokens on the host."""
    state = beam_math.init(len(prompts), beams, buffer_length)
    held = [[list(prompt)] * beams for prompt in prompts]
    for _ in range(limit):
        logprobs = np.asarray([[m.next(beam) for beam in row] for m, row in zip(models, held, strict=True)], np.float32)
        parents, tokens, state = jit_advance(state, logprobs, padded(stops), float(penalty), limit)
        held = [
            [[*row[parent], int(token)] for parent, token in zip(row_parents, row_tokens, strict=True)]
            for row, row_parents, row_tokens in zip(held, np.asarray(parents), np.asarray(tokens), strict=True)
        ]
        if trace is not None:
            trace.append((held, state))
        if bool(state.done.all()):
            break
    return state


def listed(hypotheses: Hypotheses, prompt: int) -> list[tuple[float, list[int]]]:
    scores, tokens, _, lengths = (np.asarray(x)[prompt] for x in hypotheses)
    return [(float(s), row[:n].tolist()) for s, row, n in zip(scores, tokens, lengths, strict=True) if s > -np.inf]


def assert_equal_hypotheses(ours, expected) -> None:
    assert [tokens for _, tokens in ours] == [tokens for _, tokens in expected]
    np.testing.assert_allclose([s for s, _ in ours], [s for s, _ in expected], atol=TOLERANCE)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    seed=st.integers(0, 10**6),
    beams=st.sampled_from([1, 3]),
    limit=st.sampled_from([1, 2, 7]),
    stops=st.sampled_from([(), (0,), (1, 4)]),
    penalty=st.sampled_from([0.0, 1.0, 2.0, -0.5]),
)
def test_hypotheses_equal_those_of_the_plain_search(seed, beams, limit, stops, penalty):
    models = [TableModel(9, seed), TableModel(9, seed + 1, spread=0.5)]
    prompts = [[seed % 9, 2], [3, 3]]
    state = search(models, prompts, beams, limit, stops, penalty)
    assert bool(state.done.all())
    result = jit_finalise(state, beams, penalty)
    for index, (model, prompt) in enumerate(zip(models, prompts, strict=True)):
        assert_equal_hypotheses(listed(result, index), plain_beam_search(model, prompt, beams, limit, stops, penalty))


def test_enough_beams_find_the_best_of_all_texts():
    """With no end token and a beam for every prefix, beam search is exhaustive search."""
    model, prompt, limit = TableModel(3, 5), [0, 1], 3
    everything = []
    for tokens in itertools.product(range(3), repeat=limit):
        text = prompt + list(tokens)
        everything.append((sum(model.next(text[:i])[text[i]] for i in range(2, 5)) / limit, list(tokens)))
    everything.sort(key=lambda c: -c[0])
    state = search([model], [prompt], 9, limit, (), 1.0)
    assert_equal_hypotheses(listed(jit_finalise(state, 9, 1.0), 0), everything[:9])


def test_one_beam_is_greedy_decoding():
    model, text = TableModel(9, 8), [1, 2]
    for _ in range(6):
        text.append(int(model.next(text).argmax()))
    state = search([model], [[1, 2]], 1, 6, (), 1.0)
    assert listed(jit_finalise(state, 1, 1.0), 0)[0][1] == text[2:]


def test_buffers_follow_the_parents_and_a_done_prompt_stays_as_it_is():
    """Prompt 0 ends early; prompt 1 goes on. What `advance` tells the host must be what its own buffers hold."""
    peaked, flat = TableModel(9, 1), TableModel(9, 2)
    peaked.logprobs[..., 0] = -1e-3  # token 0 ends a text and is nearly certain everywhere
    flat.logprobs[..., 0] = -30.0
    trace: list[tuple[list, BeamState]] = []
    search([peaked, flat], [[1, 2], [1, 2]], 3, 8, (0,), 1.0, trace=trace)
    done_at = next(step for step, (_, state) in enumerate(trace) if bool(state.done[0]))
    assert done_at < len(trace) - 2
    for step, (held, state) in enumerate(trace):
        if step + 1 < len(trace):
            tokens = np.asarray(state.running.tokens)[1]
            assert [row[: step + 1].tolist() for row in tokens] == [beam[2:] for beam in held[1]]
            assert np.all(tokens[:, step + 1 :] == -1)
            totals = np.asarray(state.running.logprobs)[1].sum(-1)
            np.testing.assert_allclose(totals, np.asarray(state.running.scores)[1], atol=TOLERANCE)
        if step > done_at:
            frozen = jax.tree.map(lambda x: np.asarray(x)[0], trace[done_at][1])
            jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x: np.asarray(x)[0], state), frozen)
            # In place, so that the pages of a prompt that is done are left alone.
            assert [beam[: 2 + done_at + 1] for beam in held[0]] == trace[done_at][0][0]


def test_token_logprobs_of_hypotheses_are_those_reported():
    model, prompt = TableModel(9, 3), [4, 5]
    raw = np.tile(model.next(prompt).astype(np.float32), (1, 2, 1))
    processed = raw - np.arange(9, dtype=np.float32)
    state = beam_math.init(1, 2, 4)
    _, _, state = jit_advance(state, processed, padded(()), 1.0, 1, raw)
    result = jit_finalise(state, 2, 1.0)
    np.testing.assert_array_equal(result.tokens[0, :, 0], np.argsort(-processed[0, 0])[:2])
    np.testing.assert_array_equal(result.logprobs[0, :, 0], raw[0, 0][np.asarray(result.tokens[0, :, 0])])
    np.testing.assert_array_equal(result.scores[0], processed[0, 0][np.asarray(result.tokens[0, :, 0])])


def test_a_search_cut_short_returns_its_beams():
    model = TableModel(9, 6)
    state = beam_math.init(1, 3, 8)
    logprobs = np.tile(model.next([1, 2]).astype(np.float32), (1, 3, 1))
    assert listed(jit_finalise(state, 3, 1.0), 0) == []
    _, _, state = jit_advance(state, logprobs, padded(()), 1.0, 8)
    cut = listed(jit_finalise(state, 3, 1.0), 0)
    best = np.argsort(-logprobs[0, 0])[:3]
    assert [tokens for _, tokens in cut] == [[token] for token in best]
    np.testing.assert_array_equal([score for score, _ in cut], logprobs[0, 0][best])


def test_the_buffer_ends_a_text_that_would_outgrow_it():
    state = search([TableModel(9, 7)], [[1, 2]], 2, 6, (), 1.0, buffer_length=4)
    assert bool(state.done.all())
    assert np.asarray(state.finished.lengths).tolist() == [[4, 4]]


@pytest.mark.parametrize("poison", ["one NaN", "nothing left"])
def test_log_probabilities_that_allow_no_choice_end_their_prompt_with_nan_and_no_other(poison):
    models = [TableModel(9, 1), TableModel(9, 2)]
    state = beam_math.init(2, 3, 4)
    logprobs = np.asarray([[m.next([1, 2])] * 3 for m in models], np.float32)
    clean = jit_advance(state, logprobs, padded(()), 1.0, 4)
    if poison == "one NaN":
        logprobs[0, 0, 3] = np.nan
    else:
        logprobs[0] = -np.inf
    parents, tokens, broken = jit_advance(state, logprobs, padded(()), 1.0, 4)
    assert broken.done.tolist() == [True, False]
    result = jit_finalise(broken, 2, 1.0)
    assert np.isnan(np.asarray(result.scores)).tolist() == [[True, True], [False, False]]
    np.testing.assert_array_equal(tokens[1], clean[1][1])
    np.testing.assert_array_equal(broken.running.scores[1], clean[2].running.scores[1])
    assert np.all((np.asarray(parents) >= 0) & (np.asarray(parents) < 3))


def test_other_limits_penalties_and_stop_tokens_never_compile_again():
    traces = []

    def counted(*args):
        traces.append(1)
        return beam_math.advance(*args)

    jitted = jax.jit(counted)
    state = beam_math.init(1, 3, 8)
    logprobs = np.tile(TableModel(9, 1).next([1, 2]).astype(np.float32), (1, 3, 1))
    for stop, penalty, limit in ((1, 0.5, 3), (-1, 1.0, 8), (8, -2.0, 5)):
        jitted(state, logprobs, np.asarray([stop], np.int32), np.float32(penalty), np.int32(limit))
    assert len(traces) == 1


# ---------------------------------------------------------------------------------------------- transformers


@functools.cache
def small_llama():
    torch = pytest.importorskip("torch", reason="parity needs torch")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    # Matrices this small only wait for each other on many threads.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.6,  # far from uniform, so that scores differ by more than rounding
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=39,
    )
    return transformers.LlamaForCausalLM(config).eval()


def transformers_search(prompts, beams, n, limit, stops, penalty):
    """Generated tokens and scores of `generate`, prompt-major; tokens are padded with 39 behind an end token."""
    import torch

    out = small_llama().generate(
        torch.tensor(prompts),
        attention_mask=torch.ones(np.shape(prompts), dtype=torch.long),
        num_beams=beams,
        num_return_sequences=n,
        do_sample=False,
        early_stopping=False,
        length_penalty=penalty,
        max_new_tokens=limit,
        eos_token_id=list(stops) or None,
        return_dict_in_generate=True,
        output_scores=True,
    )
    return out.sequences[:, np.shape(prompts)[1] :].tolist(), out.sequences_scores.numpy()


@pytest.mark.parametrize(
    ("beams", "n", "limit", "ends", "penalty", "some_end_early"),
    [(3, 2, 12, 3, 1.0, True), (4, 4, 8, 3, 0.6, True), (3, 1, 6, 0, 1.0, False), (3, 3, 12, 2, 2.0, False)],
    ids=["plain", "short favoured", "no end token", "long favoured"],
)
def test_texts_and_scores_equal_those_of_transformers(beams, n, limit, ends, penalty, some_end_early):
    """Scores within 1e-4: both forward passes are torch's, but in other batches, and sums are rounded otherwise."""
    llama = small_llama()
    import torch

    prompts = [[1, 2, 3, 4], [9, 8, 7, 6], [20, 21, 20, 21]]
    # End tokens that come up: the fourth tokens of the best texts that have none.
    endless, _ = transformers_search(prompts, beams, 1, 6, (), penalty)
    stops = sorted({row[3] for row in endless})[:ends]
    expected_tokens, expected_scores = transformers_search(prompts, beams, n, limit, stops, penalty)

    state = beam_math.init(len(prompts), beams, 12)
    held = torch.tensor(prompts).repeat_interleave(beams, 0)
    offsets = np.arange(len(prompts))[:, None] * beams
    while not bool(state.done.all()):
        with torch.no_grad():
            logits = llama(held).logits[:, -1].float()
        logprobs = logits.log_softmax(-1).numpy().reshape(len(prompts), beams, -1)
        parents, tokens, state = jit_advance(state, logprobs, padded(stops, 3), penalty, limit)
        order = torch.tensor((np.asarray(parents) + offsets).flatten())
        held = torch.cat([held[order], torch.tensor(np.asarray(tokens).reshape(-1, 1))], dim=1)
    result = jit_finalise(state, n, penalty)

    ours = [tokens for index in range(len(prompts)) for _, tokens in listed(result, index)]
    for tokens, row in zip(ours, expected_tokens, strict=True):
        assert tokens == row[: len(tokens)]
        assert len(tokens) == limit or tokens[-1] in stops
        assert set(row[len(tokens) :]) <= {39}
    np.testing.assert_allclose(np.asarray(result.scores).flatten(), expected_scores, atol=1e-4)
    assert any(len(tokens) < limit for tokens in ours) == some_end_early


def test_shapes_and_dtypes_hold_through_a_step():
    state = beam_math.init(2, 3, 4)
    logprobs = jnp.zeros((2, 3, 9), jnp.bfloat16)
    _, _, after = jax.eval_shape(beam_math.advance, state, logprobs, jnp.zeros(1, int), 1.0, 4)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
