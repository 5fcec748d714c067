"""Which files train, which are held out, and what is drawn from them."""

from __future__ import annotations

import numpy as np
import pytest

from kvjax.errors import ConfigError
from kvjax.train.data import is_held_out, library_files, random_lines, read_bytes, split_files
from kvjax.train.mixture import Mixture, Phase

END = 256


@pytest.fixture(scope="module")
def code() -> np.ndarray:
    lines = "".join(f"line_{i} = compute({i}, {i * i})\n" for i in range(400))
    return np.append(np.frombuffer(lines.encode(), np.uint8).astype(np.int32), END).astype(np.int32)


def mixture(code: np.ndarray, **changes: object) -> Mixture:
    phases = (Phase(0, 8, 64, 0.5, 0.25), Phase(10, 4, 128, 0.25, 0.25))
    return Mixture(code, END, **{"phases": phases, "filler_from": 4, "filler_until": 8, **changes})


def test_every_library_file_is_on_one_side_and_never_on_both():
    files = library_files()
    train, held_out = split_files(files)
    assert not set(train) & set(held_out)
    assert sorted([*train, *held_out]) == sorted(files)
    # About one file in twenty, by hash: far from none and far from half.
    assert 0.01 < len(held_out) / len(files) < 0.12


def test_a_files_side_does_not_depend_on_the_other_files(tmp_path):
    for i in range(60):
        (tmp_path / f"module_{i}.py").write_text("x = 1\n")
    alone = {f"module_{i}.py": is_held_out(f"module_{i}.py") for i in range(60)}
    _, before = split_files(library_files(tmp_path), tmp_path)
    for i in range(0, 60, 2):
        (tmp_path / f"module_{i}.py").unlink()
    _, after = split_files(library_files(tmp_path), tmp_path)
    assert {path.name for path in before} == {name for name, held in alone.items() if held}
    assert {path.name for path in after} <= {path.name for path in before}
    assert before


def test_held_out_text_never_reaches_a_batch(tmp_path):
    for i in range(60):
        held = is_held_out(f"module_{i}.py")
        (tmp_path / f"module_{i}.py").write_text(("HELDOUT = 1\n" if held else "trained = 1\n") * 40)
    train, held_out = split_files(library_files(tmp_path), tmp_path)
    assert held_out
    drawn = mixture(read_bytes(train, END))
    for step in range(20):
        for row in drawn.batch(step)[0]:
            assert b"HELD" not in bytes(row[row < 256].astype(np.uint8).tobytes())


def test_no_source_is_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(ConfigError, match=str(tmp_path)):
        library_files(tmp_path)


def test_reading_keeps_every_byte_and_ends_every_file(tmp_path):
    (tmp_path / "a.py").write_bytes("é = 1\n".encode())
    (tmp_path / "b.py").write_bytes(b"b\n")
    tokens = read_bytes(library_files(tmp_path), END)
    assert tokens.tolist() == [*"é = 1\n".encode(), END, *b"b\n", END]


def test_random_lines_are_whole_lines_of_the_source_without_file_ends(code):
    source = bytes(code[code != END].astype(np.uint8)).decode().splitlines(keepends=True)
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(50):
        lines = bytes(random_lines(code, 100, rng, END).astype(np.uint8)).decode()
        assert len(lines) <= 100
        assert set(lines.splitlines(keepends=True)) <= set(source)
        seen += len(lines)
    assert seen > 0


def test_a_batch_depends_on_seed_and_step_alone(code):
    first, again, other = mixture(code), mixture(code), mixture(code, seed=1)
    first.batch(3)  # drawing others in between changes nothing
    for step in (0, 5, 12):
        for a, b in zip(first.batch(step), again.batch(step), strict=True):
            np.testing.assert_array_equal(a, b)
        assert (first.batch(step)[0] != other.batch(step)[0]).any()
    assert (first.batch(0)[0] != first.batch(1)[0]).any()


def test_batches_have_the_shape_of_their_phase_and_something_to_learn_in_every_row(code):
    drawn = mixture(code)
    for step, shape in ((0, (8, 64)), (9, (8, 64)), (10, (4, 128))):
        tokens, weights = drawn.batch(step)
        assert tokens.shape == weights.shape == shape
        assert tokens.dtype == np.int32
        assert weights.dtype == np.float32
        assert (tokens >= 0).all()
        assert (tokens <= END).all()
        assert (weights[:, 1:].sum(axis=1) > 0).all()


@pytest.mark.parametrize("firsts", [(), (1,), (0, 5, 5), (0, 7, 3)])
def test_phases_must_cover_every_step_once(code, firsts):
    with pytest.raises(ConfigError, match="step 0"):
        mixture(code, phases=tuple(Phase(first, 8, 64, 0.5, 0.25) for first in firsts))
