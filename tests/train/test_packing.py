"""Text files and the rows made of them: nothing lost, order by the seed alone, a place that can be gone back to."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from kvjax.errors import ConfigError
from kvjax.train.packing import packed_batches
from kvjax.train.text_files import TextFiles, matching

WORDS = ["a", "bb", "c" * 30, "dddd", "e" * 9]
END = 256


@pytest.fixture
def corpus(tmp_path):
    lines = [json.dumps({"text": word, "id": i}) for i, word in enumerate(WORDS)]
    (tmp_path / "some.jsonl").write_text("\n".join([*lines[:2], "", *lines[2:]]) + "\n")
    (tmp_path / "other.txt").write_text("ünï")
    return tmp_path


def encode(text: str) -> list[int]:
    return list(text.encode())


def batches(folder, **options):
    documents = TextFiles(matching(["*.jsonl", "other.txt"], folder))
    return packed_batches(documents, encode, **{"length": 8, "batch_size": 2, "seed": 3, "end_token": END, **options})


def test_lines_and_files_are_documents(corpus):
    assert list(TextFiles(matching(["*.jsonl", "other.txt"], corpus))) == [*WORDS, "ünï"]


def test_an_epoch_of_rows_holds_every_document_once(corpus):
    rows = list(batches(corpus, batch_size=1, epochs=1))
    stream = np.concatenate([row["tokens"][0] for row in rows]).tolist()
    whole = sum((len(encode(text)) + 1 for text in [*WORDS, "ünï"]), 0)
    # Only a last row that is not full is left out.
    assert len(stream) == whole // 8 * 8
    texts = bytes(token if token != END else 0 for token in stream).split(b"\0")
    assert set(texts[:-1]) < {text.encode() for text in [*WORDS, "ünï"]}


def test_segments_and_positions_begin_anew_with_each_document_and_row(corpus):
    for batch in itertools.islice(batches(corpus), 12):
        for tokens, segments, positions in zip(*(batch[x] for x in ("tokens", "segments", "positions")), strict=True):
            assert segments[0] == 1
            assert positions[0] == 0
            begins = np.flatnonzero(tokens[:-1] == END) + 1
            assert np.array_equal(np.flatnonzero(np.diff(segments)) + 1, begins)
            assert np.array_equal(np.flatnonzero(positions == 0)[1:], begins)


def test_batches_are_a_function_of_the_seed_and_go_on_from_any_place(corpus):
    first = list(itertools.islice(batches(corpus), 9))
    for place in (0, 1, 4, 7):
        source = batches(corpus)
        for _ in range(place):
            next(source)
        # As a checkpoint keeps it.
        state = json.loads(json.dumps(source.get_state()))
        again = batches(corpus)
        again.set_state(state)
        for expected, found in zip(first[place:], itertools.islice(again, 9 - place), strict=True):
            for name in expected:
                np.testing.assert_array_equal(expected[name], found[name])
    other = list(itertools.islice(batches(corpus, seed=4), 9))
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    "name, content, match",
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a\.jsonl, line 3: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n["y"]\n', r"a\.jsonl, line 2: .*got a list"),
        ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl, line 1: .*'text'.*\['body'\]"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl, line 1: not UTF-8"),
        ("a.jsonl", b"\n", r"a\.jsonl is empty"),
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.txt", b"ab\xff", r"a\.txt, byte 2: not UTF-8"),
        ("a.txt", None, r"cannot read .*a\.txt: No such file"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, name, content, match):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=match):
        TextFiles([tmp_path / name])


def test_a_file_that_is_damaged_while_it_is_trained_on_is_named(corpus):
    source, path = batches(corpus), corpus / "some.jsonl"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(ConfigError, match=r"some\.jsonl, line \d: not UTF-8"):
        list(itertools.islice(source, 12))


def test_a_pattern_that_names_nothing_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"no file matches '\*\.jsonl'"):
        matching(["*.jsonl"], tmp_path)
