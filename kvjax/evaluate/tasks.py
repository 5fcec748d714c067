"""What a cache is asked: text to go on with, values to find again, chains of them to follow, letters to copy.

Every task is a list of questions: a prompt, and the tokens that follow it, of which some must be predicted. They are
fed one at a time whatever the model would have said (teacher forcing): if the likeliest token is the right one
everywhere, greedy decoding gives the answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from kvjax.errors import ConfigError
from kvjax.model import Model
from kvjax.train.data import library_files, split_files
from kvjax.train.recall import LETTERS, random_code, random_pairs

CUE = 8
"""Tokens of a copy that its prompt already shows."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt and what follows it.

    Attributes:
      prompt: token ids.
      continuation: token ids; the first is predicted from the prompt, each further one from a decoding step.
      asked: which tokens of the continuation count; the others are given.
      kind: what the results are divided by: a depth, a number of hops.
    """

    prompt: tuple[int, ...]
    continuation: tuple[int, ...]
    asked: tuple[bool, ...]
    kind: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Material:
    """What questions are made of.

    Attributes:
      tokens: int32[N], held-out text; what separates files in it is `end_token` (-1: nothing does).
      encode: text to token ids, without special tokens.
      prefix: what begins every prompt of this model, such as a beginning-of-text token.
    """

    tokens: np.ndarray
    end_token: int
    encode: Callable[[str], list[int]]
    prefix: tuple[int, ...] = ()


def material_of(model: Model, files: Sequence[Path] | None = None) -> Material:
    """Questions in a model's own tokens.

    Args:
      files: text; None: what training on the standard library holds out (`kvjax.train.data.split_files`).

    Raises:
      ConfigError: a model without tokenizer.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ConfigError("the questions are text, and this model has no tokenizer; put tokenizer.json beside it")

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    letter = encode("a")
    whole = list(tokenizer.encode("a").ids)
    prefix = tuple(whole[: whole.index(letter[0])])
    end_token = model.config.eos_token_ids[0] if model.config.eos_token_ids else -1
    pieces: list[int] = []
    for path in files if files is not None else split_files(library_files())[1]:
        pieces += encode(path.read_bytes().decode("utf-8", "replace"))
        pieces += [end_token] if end_token >= 0 else []
    return Material(np.array(pieces, np.int32), end_token, encode, prefix)


def text_questions(material: Material, length: int, rows: int) -> list[Question]:
    """Windows of `length` tokens, evenly spread over the text; the second half is predicted. Kind: the window."""
    last = len(material.tokens) - length
    if last < rows:
        raise ConfigError(
            f"{rows} windows of {length} tokens need at least {rows + length}, the text has {len(material.tokens)}; "
            "give a longer text, fewer rows or a shorter context"
        )
    questions = []
    for number, start in enumerate(np.linspace(0, last, rows).astype(int)):
        window = (*material.prefix, *material.tokens[start : start + length].tolist())[:length]
        half = length // 2
        questions.append(Question(window[:half], window[half:], (True,) * (length - half), number))
    return questions


def recall_questions(
    material: Material, length: int, depths: Sequence[float], count: int, distractors: int = 4, seed: int = 0
) -> list[Question]:
    """Code with `key=value` lines that ends in one of their keys; `count` for each depth. Kind: the depth.

    The line asked for stands at `depth` of the room before the question (0: the start), `distractors` others at random
    places. `length` tokens, answer included; the questions of `kvjax.train.probes.recall_probe`, in any vocabulary.
    """
    rng = np.random.default_rng(seed)
    questions = []
    for depth in depths:
        for _ in range(count):
            pairs = [(_text(key), _text(value)) for key, value in random_pairs(distractors + 1, rng)]
            key, value = pairs[0]
            question, answer = material.encode(f"\n{key}="), material.encode(f"{value}\n")
            lines = [material.encode(f"\n{name}={text}\n") for name, text in pairs]
            room = _room(material, length, [question, answer, *lines])
            places = [round(depth * room), *rng.integers(0, room + 1, distractors).tolist()]
            prompt = (*_scattered(material, lines, places, room, rng), *question)
            questions.append(Question(prompt, tuple(answer), (True,) * len(answer), depth))
    return questions


def tracking_questions(
    material: Material, length: int, hops: Sequence[int], count: int, distractors: int = 4, seed: int = 0
) -> list[Question]:
    """As recall, but a value is the next line's key, over a number of hops; places are random. Kind: the hops.

    `a=b`, `b=c`, `c=5` is asked as `a=` and answered `b`, then `b=` is given and answered `c`, and so on (written out,
    as a small model needs it). What later hops need is not known when the prompt is read.
    """
    rng = np.random.default_rng([seed, 1])
    questions = []
    for steps in hops:
        for _ in range(count):
            pairs = [(_text(key), _text(value)) for key, value in random_pairs(distractors + steps, rng)]
            names = [key for key, _ in pairs[:steps]]
            chain = list(zip(names, [*names[1:], pairs[0][1]], strict=True))
            lines = [material.encode(f"\n{name}={text}\n") for name, text in [*chain, *pairs[steps:]]]
            question = material.encode(f"\n{names[0]}=")
            continuation: list[int] = []
            asked: list[bool] = []
            for number, (name, text) in enumerate(chain):
                given = material.encode(f"{name}=") if number else []
                wanted = material.encode(f"{text}\n")
                continuation += given + wanted
                asked += [False] * len(given) + [True] * len(wanted)
            room = _room(material, length, [question, continuation, *lines])
            places = rng.integers(0, room + 1, len(lines)).tolist()
            prompt = (*_scattered(material, lines, places, room, rng), *question)
            questions.append(Question(prompt, tuple(continuation), tuple(asked), steps))
    return questions


def copy_questions(material: Material, length: int, count: int, seed: int = 0) -> list[Question]:
    """Random letters, a newline, and their first tokens again; the rest of the copy is predicted. Kind: 0.

    Half of the `length` tokens is the original, half is generated (`kvjax.train.probes.copy_probe`).
    """
    rng = np.random.default_rng([seed, 2])
    size = (length - 2 - len(material.prefix)) // 2
    if size <= CUE:
        raise ConfigError(f"copying needs a context of more than {2 * CUE + 3} tokens, got {length}")
    questions = []
    for _ in range(count):
        letters: list[int] = []
        while len(letters) < size:
            letters += material.encode(_text(rng.choice(LETTERS, size)))
        segment = [*letters[:size], *material.encode("\n")]
        answer = tuple(segment[CUE:])
        questions.append(Question((*material.prefix, *segment, *segment[:CUE]), answer, (True,) * len(answer)))
    return questions


def _text(tokens: np.ndarray) -> str:
    """Of the byte values that keys and values are drawn as."""
    return bytes(np.asarray(tokens).astype(np.uint8)).decode()


def _room(material: Material, length: int, pieces: Sequence[Sequence[int]]) -> int:
    """Tokens left for text between the pieces."""
    room = length - len(material.prefix) - sum(map(len, pieces))
    if room < 0:
        raise ConfigError(f"the key=value lines and the question do not fit in a context of {length} tokens")
    return room


def _scattered(
    material: Material, lines: Sequence[Sequence[int]], places: Sequence[int], room: int, rng: np.random.Generator
) -> tuple[int, ...]:
    """`room` tokens of text with each line at its place."""
    text = random_code(material.tokens, room, rng, material.end_token).tolist()
    found, last = list(material.prefix), 0
    for index in np.argsort(places, kind="stable"):
        found += text[last : places[index]] + list(lines[index])
        last = places[index]
    return (*found, *text[last:])
