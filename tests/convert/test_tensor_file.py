"""The safetensors container: what the library writes is read, what is written the library reads, damage is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kvjax.convert.tensor_file import TensorToWrite, read_header, write_tensors
from kvjax.errors import CheckpointError

TENSORS = {
    "a": np.arange(35, dtype=np.float32).reshape(7, 5),
    "b": np.arange(6, dtype=np.float16),
    "c": np.arange(24).reshape(2, 3, 4).astype(ml_dtypes.bfloat16),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    return path


@pytest.mark.parametrize("block_bytes", [1, 45, 10**6])
def test_blocks_of_any_size_together_are_the_tensor(file: Path, block_bytes: int) -> None:
    for name, tensor in read_header(file).items():
        ranges = tensor.blocks(block_bytes)
        assert [stop for _, stop in ranges[:-1]] == [start for start, _ in ranges[1:]]
        joined = np.concatenate([tensor.read(*rows) for rows in ranges])
        assert joined.dtype == TENSORS[name].dtype
        np.testing.assert_array_equal(joined, TENSORS[name])
        assert block_bytes > 1 or len(ranges) == len(joined)


def test_the_library_reads_what_is_written_also_of_transposed_arrays(tmp_path: Path) -> None:
    path, done = tmp_path / "out.safetensors", []
    turned = {name: value.T for name, value in TENSORS.items()}
    tensors = [TensorToWrite(n, v.shape, v.dtype, lambda v=v: v) for n, v in turned.items()]
    write_tensors(path, tensors, done.append)
    read = load_file(path)
    assert read.keys() == turned.keys()
    for name, value in turned.items():
        assert read[name].dtype == value.dtype
        np.testing.assert_array_equal(read[name], value)
    assert done == [value.nbytes for value in turned.values()]


def _header(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    """Damage: the header's JSON changed, its length kept right."""

    def damage(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        replaced = change(header)
        text = json.dumps(header if replaced is None else replaced).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: b"", "not a whole safetensors file"),
        (lambda c: c[:5], "not a whole safetensors file"),
        (lambda c: c[:40], "not a whole safetensors file"),
        (lambda c: b"\xff" * 8 + c[8:], "not a whole safetensors file"),
        (lambda c: b"<!DOCTYPE html><html>not found</html>" * 10, "not a whole safetensors file"),
        (lambda c: c[:8] + b"\xff" + c[9:], "not valid JSON"),
        (lambda c: c[:8] + b"x" + c[9:], "not valid JSON"),
        (lambda c: c[:-1], "truncated"),
        (lambda c: c + b"\0", "longer than its header says"),
        (_header(lambda h: [h]), "not a table of tensors"),
        (_header(lambda h: h["a"].pop("dtype") and None), "header entry of tensor a"),
        (_header(lambda h: h["a"].update(shape=[-7, -5])), "header entry of tensor a"),
        (_header(lambda h: h["a"].update(shape=[7.0, 5.0])), "header entry of tensor a"),
        (_header(lambda h: h["a"].update(data_offsets=[3])), "header entry of tensor a"),
        (_header(lambda h: h["a"].update(shape=[7, 6])), "tensor a of dtype F32 and shape .* cannot take 140 bytes"),
        (_header(lambda h: h.update(d=h["a"])), "overlap or leave a gap"),
        (_header(lambda h: h.pop("b") and None), "overlap or leave a gap|truncated|longer"),
    ],
)
def test_a_damaged_file_is_refused_by_name(file: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as raised:
        read_header(file)
    assert str(file) in str(raised.value)


def test_a_file_cut_after_its_header_was_read_is_noticed(file: Path) -> None:
    tensor = max(read_header(file).values(), key=lambda t: t.offset)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"ends inside tensor {tensor.name}"):
        tensor.read(0, tensor.shape[0])


def test_other_dtypes_are_refused_only_when_the_tensor_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"q": np.ones((2, 2), np.int8)}, path)
    tensor = read_header(path)["q"]
    with pytest.raises(CheckpointError, match="tensor q has dtype I8; kvjax reads F32, F16, BF16"):
        tensor.read(0, 1)
