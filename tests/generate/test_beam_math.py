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


def search(models, prompts, beams, limit, stops, penalty, buffer_length=None, trace=None) -> BeamState:
    """Runs `advance` with the table models as the forward pass, following parents and tokens on the host."""
    state = beam_math.init(len(prompts), beams, buffer_length or limit)
    held = [[list(prompt)] * beams for prompt in prompts]
    stop_tokens = np.asarray(sorted(stops) or [-1], np.int32)
    for _ in range(limit):
        logprobs = np.asarray([[m.next(beam) for beam in row] for m, row in zip(models, held, strict=True)], np.float32)
        parents, tokens, state = jit_advance(state, logprobs, stop_tokens, penalty, limit)
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
    beams=st.sampled_from([1, 3, 4]),
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
    search([peaked, flat], [[1, 2], [1, 2]], 3, 8, (0,), 1.0, buffer_length=16, trace=trace)
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
            assert [beam[: 2 + done_at + 1] for beam in held[0]] == [beam for beam in trace[done_at][0][0]]


def test_token_logprobs_of_hypotheses_are_those_reported():
    model, prompt = TableModel(9, 3), [4, 5]
    raw = np.tile(model.next(prompt).astype(np.float32), (1, 2, 1))
    processed = raw - np.arange(9, dtype=np.float32)
    state = beam_math.init(1, 2, 4)
    _, tokens, state = jit_advance(state, processed, np.asarray([-1]), 1.0, 1, raw)
    result = jit_finalise(state, 2, 1.0)
    np.testing.assert_array_equal(result.tokens[0, :, 0], np.argsort(-processed[0, 0])[:2])
    np.testing.assert_array_equal(result.logprobs[0, :, 0], raw[0, 0][np.asarray(result.tokens[0, :, 0])])
    np.testing.assert_array_equal(result.scores[0], processed[0, 0][np.asarray(result.tokens[0, :, 0])])


def test_a_search_cut_short_returns_its_beams():
    model = TableModel(9, 6)
    state = beam_math.init(1, 3, 8)
    logprobs = np.tile(model.next([1, 2]).astype(np.float32), (1, 3, 1))
    assert listed(jit_finalise(state, 3, 1.0), 0) == []
    _, tokens, state = jit_advance(state, logprobs, np.asarray([-1]), 1.0, 8)
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
    clean = jit_advance(state, logprobs, np.asarray([-1]), 1.0, 4)
    if poison == "one NaN":
        logprobs[0, 0, 3] = np.nan
    else:
        logprobs[0] = -np.inf
    parents, tokens, broken = jit_advance(state, logprobs, np.asarray([-1]), 1.0, 4)
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
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("beams", "n", "limit", "stops", "penalty"),
    [(3, 2, 10, (5,), 1.0), (4, 4, 8, (7, 11, 30), 0.6), (2, 1, 6, (), 1.0), (3, 3, 12, (2, 9), 2.0)],
)
def test_texts_and_scores_equal_those_of_transformers(beams, n, limit, stops, penalty):
    """Scores within 1e-4: both forward passes are torch's, but in other batches, and sums are rounded otherwise."""
    llama = small_llama()
    import torch

    prompts = torch.tensor([[1, 2, 3, 4], [9, 8, 7, 6], [20, 21, 20, 21]])
    expected = llama.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
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

    state = beam_math.init(len(prompts), beams, limit)
    held = prompts.repeat_interleave(beams, 0)
    offsets = torch.arange(len(prompts))[:, None] * beams
    while not bool(state.done.all()):
        with torch.no_grad():
            logprobs = llama(held).logits[:, -1].float().log_softmax(-1)
        parents, tokens, state = jit_advance(
            state,
            logprobs.numpy().reshape(len(prompts), beams, -1),
            np.asarray(stops or [-1], np.int32),
            penalty,
            limit,
        )
        order = (torch.tensor(np.asarray(parents)) + offsets).flatten()
        held = torch.cat([held[order], torch.tensor(np.asarray(tokens)).flatten()[:, None]], dim=1)
    result = jit_finalise(state, n, penalty)

    ours = [listed(result, index) for index in range(len(prompts))]
    theirs = expected.sequences[:, prompts.shape[1] :].tolist()
    for hypothesis_tokens, row in zip([t for prompt in ours for _, t in prompt], theirs, strict=True):
        length = len(hypothesis_tokens)
        assert hypothesis_tokens == row[:length]
        # Theirs are padded after the end token.
        assert length == limit or row[length - 1] in stops
        assert set(row[length:]) <= {0}
    np.testing.assert_allclose(np.asarray(result.scores).flatten(), expected.sequences_scores.numpy(), atol=1e-4)
    if stops:
        assert any(len(t) < limit for prompt in ours for _, t in prompt)


def test_shapes_and_dtypes_hold_through_a_step():
    state = beam_math.init(2, 3, 4)
    logprobs = jnp.zeros((2, 3, 9), jnp.bfloat16)
    _, _, after = jax.eval_shape(beam_math.advance, state, logprobs, jnp.zeros(1, int), 1.0, 4)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
