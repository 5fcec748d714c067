"""Questions have one right answer, at the place they say, and the length they should."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kvjax.errors import ConfigError
from kvjax.evaluate.tasks import (
    CUE,
    Material,
    Question,
    copy_questions,
    material_of,
    recall_questions,
    text_questions,
    tracking_questions,
)
from kvjax.train.data import library_files, read_bytes, split_files
from kvjax.train.probes import copy_probe, recall_probe
from kvjax.train.tokenizer import END_ID
from tests.evaluate.tiny import material, model

LENGTH = 256


def text(tokens: tuple[int, ...]) -> str:
    return bytes(tokens).decode("utf-8", "replace")


def lines_of(question: Question) -> dict[str, str]:
    """key -> value of every key=value line that stands alone in the prompt."""
    found = {}
    for line in text(question.prompt).split("\n")[:-1]:
        key, _, value = line.partition("=")
        if key.isalpha() and key.islower() and value.isalnum() and 3 <= len(key) <= 6 and 3 <= len(value) <= 6:
            found.setdefault(key, value)
    return found


def test_text_is_what_training_holds_out_in_the_models_own_tokens() -> None:
    held_out = read_bytes(split_files(library_files())[1], END_ID)
    np.testing.assert_array_equal(material().tokens, held_out)


def test_windows_are_consecutive_text_and_half_of_each_is_predicted() -> None:
    whole = material().tokens
    for number, question in enumerate(text_questions(material(), LENGTH, 3)):
        window = [*question.prompt, *question.continuation]
        start = int(np.linspace(0, len(whole) - LENGTH, 3)[number])
        assert window == whole[start : start + LENGTH].tolist()
        assert len(question.prompt) == LENGTH // 2 == sum(question.asked)


def test_in_byte_tokens_recall_asks_exactly_what_training_probes_do() -> None:
    depths = (0.0, 0.4, 1.0)
    asked = recall_questions(material(), LENGTH, depths, 2, distractors=3, seed=7)
    rng = np.random.default_rng(7)
    probes = [recall_probe(LENGTH, depth, material().tokens, rng, 3, END_ID) for depth in depths for _ in range(2)]
    assert [(q.prompt, q.continuation, q.kind) for q in asked] == [(p.prompt, p.answer, p.depth) for p in probes]


def test_a_chain_can_be_followed_from_its_question_through_the_prompt() -> None:
    for hops in (2, 3, 4):
        for question in tracking_questions(material(), LENGTH, [hops], 4, distractors=2, seed=1):
            lines = lines_of(question)
            key = text(question.prompt).rpartition("\n")[2].removesuffix("=")
            said = ""
            for step in range(hops):
                said += f"{key}={lines[key]}\n" if step else f"{lines[key]}\n"
                key = lines[key]
            assert said == text(question.continuation)
            assert key not in lines, "the last value is nobody's key"
            assert len(question.prompt) + len(question.continuation) == LENGTH
            # What is asked are the values and their newlines; what is given is `key=`.
            values = "".join(line.rpartition("=")[2] + "\n" for line in said.splitlines())
            marked = zip(question.continuation, question.asked, strict=True)
            assert text(tuple(token for token, asked in marked if asked)) == values


def test_a_copy_repeats_its_prompt_as_training_probes_do() -> None:
    (question,) = copy_questions(material(), LENGTH, 1)
    probe = copy_probe(LENGTH, np.random.default_rng([0, 2]), CUE)
    assert (question.prompt, question.continuation) == (probe.prompt, probe.answer)
    assert len(question.prompt) + len(question.continuation) <= LENGTH


def test_a_seed_draws_the_same_questions_again_and_another_draws_others() -> None:
    def drawn(seed: int) -> list[Question]:
        return [
            *recall_questions(material(), LENGTH, (0.5,), 2, seed=seed),
            *tracking_questions(material(), LENGTH, (2,), 2, seed=seed),
            *copy_questions(material(), LENGTH, 2, seed=seed),
        ]

    assert drawn(0) == drawn(0)
    assert all(one != other for one, other in zip(drawn(0), drawn(1), strict=True))


def test_every_prompt_begins_with_what_the_model_wants_first_and_stays_as_long() -> None:
    begun = dataclasses.replace(material(), prefix=(257,))
    for questions in (
        text_questions(begun, LENGTH, 2),
        recall_questions(begun, LENGTH, (0.5,), 2),
        tracking_questions(begun, LENGTH, (2,), 2),
        copy_questions(begun, LENGTH, 2),
    ):
        for question in questions:
            assert question.prompt[0] == 257
            assert LENGTH - 1 <= len(question.prompt) + len(question.continuation) <= LENGTH


def test_questions_that_do_not_fit_are_refused() -> None:
    short = Material(np.arange(50, dtype=np.int32), -1, material().encode)
    for ask in (
        lambda: text_questions(short, 64, 1),
        lambda: recall_questions(material(), 40, (0.5,), 1),
        lambda: tracking_questions(material(), 40, (4,), 1),
        lambda: copy_questions(material(), 12, 1),
    ):
        with pytest.raises(ConfigError):
            ask()


def test_a_model_without_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="tokenizer"):
        material_of(dataclasses.replace(model(), tokenizer=None))
