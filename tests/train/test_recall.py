"""Recall and copy sequences are what they say, and probes have one right answer."""

from __future__ import annotations

import numpy as np
import pytest

from kvjax.errors import ConfigError
from kvjax.train.probes import copy_probe, recall_probe, right_tokens
from kvjax.train.recall import copy_sequence, dense_recall, needle_recall

END = 256
MARK = 5.0


@pytest.fixture(scope="module")
def code() -> np.ndarray:
    # No "=" in it, so that every "=" of a sequence belongs to a key=value line.
    lines = "".join(f"    compute(item_{i}, {i * i})\n" for i in range(300))
    return np.frombuffer(lines.encode(), np.uint8).astype(np.int32)


def text(tokens: np.ndarray) -> str:
    return bytes(np.asarray(tokens).astype(np.uint8)).decode()


def check_pairs(tokens: np.ndarray, weights: np.ndarray) -> int:
    """Repeated key=value lines repeat the value, which counts; first ones don't. Returns the number of repeats."""
    known: dict[str, str] = {}
    repeats = start = 0
    for line in text(tokens).splitlines(keepends=True):
        end = start + len(line)
        if "=" in line and line.endswith("\n"):
            key, value = line[:-1].split("=")
            cut = start + len(key) + 1
            assert (weights[start:cut] == 0).all()
            if key in known:
                assert known[key] == value
                assert (weights[cut:end] == MARK).all()
                repeats += 1
            else:
                known[key] = value
                assert (weights[cut:end] == 0).all()
        start = end
    return repeats


@pytest.mark.parametrize("filler", [0, 60])
def test_in_dense_recall_exactly_the_values_of_repeated_keys_count_extra(code, filler):
    repeats = 0
    for seed in range(20):
        tokens, weights = dense_recall(400, filler, code, END, np.random.default_rng(seed), weight=MARK)
        assert tokens.shape == weights.shape == (400,)
        repeats += check_pairs(tokens, weights)
    assert repeats > 20 * 4


def test_needles_are_all_asked_for_again_at_the_end(code):
    for seed in range(20):
        tokens, weights = needle_recall(600, code, END, np.random.default_rng(seed), weight=MARK)
        assert check_pairs(tokens, weights) > 0
        said = {line.split("=")[0] for line in text(tokens).splitlines()[:-1] if "=" in line}
        counted = "".join(chr(t) if w == MARK else "|" for t, w in zip(tokens, weights, strict=True))
        assert len([part for part in counted.split("|") if part]) >= len(said)


def test_every_counted_random_token_of_a_copy_sequence_follows_a_context_seen_before(code):
    for seed in range(20):
        tokens, weights = copy_sequence(300, code, END, np.random.default_rng(seed), weight=MARK)
        assert (weights == MARK).sum() > 50
        line = text(tokens)
        for place in np.flatnonzero(weights == MARK):
            # A repetition: the two tokens before and this one occurred together earlier.
            assert line[place - 2 : place + 1] in line[:place]


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_recall_probe_holds_its_answer_once_at_its_depth(code, depth):
    for seed in range(10):
        probe = recall_probe(500, depth, code, np.random.default_rng(seed))
        assert len(probe.prompt) + len(probe.answer) == 500
        prompt, answer = text(np.array(probe.prompt)), text(np.array(probe.answer))
        key = prompt.splitlines()[-1]
        line = f"\n{key}{answer}"
        assert prompt.count(line) == 1
        # Up to five lines of at most 15 tokens may stand before it, and the question after it takes a few.
        assert abs(prompt.index(line) / len(prompt) - depth) < 0.2


def test_probes_that_do_not_fit_say_so(code):
    rng = np.random.default_rng(0)
    with pytest.raises(ConfigError, match="do not fit in 40"):
        recall_probe(40, 0.5, code, rng, distractors=8)
    with pytest.raises(ConfigError, match="depth"):
        recall_probe(400, 1.5, code, rng)
    with pytest.raises(ConfigError, match="more than 19"):
        copy_probe(12, rng)


def test_right_tokens_are_those_a_perfect_predictor_gets_and_a_wrong_one_misses(code):
    rng = np.random.default_rng(0)
    probes = [recall_probe(200 + 10 * i, 0.5, code, rng) for i in range(3)] + [copy_probe(100, rng)]
    perfect = right_tokens(lambda tokens: np.roll(tokens, -1, axis=1), probes, rows=2)
    assert [right.all() for right in perfect] == [True] * 4
    assert [len(right) for right in perfect] == [len(probe.answer) for probe in probes]
    wrong = right_tokens(lambda tokens: np.roll(tokens, -1, axis=1) + 1, probes, rows=2)
    assert not any(right.any() for right in wrong)
