"""The safetensors container: an 8-byte length, a JSON header, the tensors' bytes one after another.

Tensors are read with plain file reads, some rows at a time: a memory map would count every page it touched as resident,
and the container is simple enough that a damaged file can be told apart from a valid one before any weight is read.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from kvjax.errors import CheckpointError

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Weight dtypes that kvjax reads and writes, by their name in the file."""

BLOCK_BYTES = 2**20
"""Rows are read about this many bytes at a time, few enough to be turned within a core's cache."""

MAX_HEADER_BYTES = 100 * 2**20

_CORRUPT = "the file is corrupt; copy or download it again"


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `nbytes` bytes at `offset` of `file`; `dtype` is the file's name for it, e.g. "BF16"."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def numpy_dtype(self) -> np.dtype:
        """The NumPy dtype; `CheckpointError` where kvjax does not read weights of this kind."""
        if self.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.file}: tensor {self.name} has dtype {self.dtype}; kvjax reads {', '.join(DTYPES)}: "
                "convert the checkpoint to one of these (quantised weights: dequantise them)"
            )
        return DTYPES[self.dtype]

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> list[tuple[int, int]]:
        """Ranges of rows (of axis 0) that together are the tensor, about `block_bytes` each."""
        rows = self.shape[0] if self.shape else 0
        row_bytes = self.nbytes // max(1, rows)
        step = max(1, block_bytes // max(1, row_bytes))
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop; may be called from several threads at once."""
        block = np.empty((stop - start, *self.shape[1:]), self.numpy_dtype)
        row_bytes = self.nbytes // self.shape[0]
        with open_checked(self.file) as file:
            file.seek(self.offset + start * row_bytes)
            if file.readinto(block.reshape(-1).view(np.uint8)) != block.nbytes:
                raise CheckpointError(f"{self.file}: ends inside tensor {self.name}; {_CORRUPT}")
        return block


def open_checked(path: Path) -> Any:
    """Opens a file for reading, unbuffered, with `CheckpointError` for what can go wrong."""
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, in file order.

    Raises:
      CheckpointError: the file cannot be read, is shorter or longer than its header says, or its header means nothing.
    """
    with open_checked(path) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
            raise CheckpointError(
                f"{path}: not a whole safetensors file ({size} bytes, header of {length} bytes promised); {_CORRUPT}"
            )
        try:
            header = json.loads(file.read(length).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: its safetensors header is not valid JSON ({error}); {_CORRUPT}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its safetensors header is not a table of tensors; {_CORRUPT}")
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: _entry(path, name, entry, start) for name, entry in header.items()}
    end = start
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != end:
            raise CheckpointError(f"{path}: the bytes of tensor {tensor.name} overlap or leave a gap; {_CORRUPT}")
        end += tensor.nbytes
    if end != size:
        kind = "truncated" if size < end else "longer than its header says"
        raise CheckpointError(f"{path}: {kind}: {size} bytes, expected {end}; copy or download it again")
    return tensors


def _entry(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    """One header entry, checked."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        ok = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and begin <= end
    except (KeyError, TypeError, ValueError):
        ok = False
    if not ok:
        raise CheckpointError(f"{path}: the header entry of tensor {name} means nothing: {entry!r}; {_CORRUPT}")
    nbytes = end - begin
    if dtype in DTYPES and nbytes != math.prod(shape) * DTYPES[dtype].itemsize:
        raise CheckpointError(
            f"{path}: tensor {name} of dtype {dtype} and shape {list(shape)} cannot take {nbytes} bytes; {_CORRUPT}"
        )
    return StoredTensor(name, path, dtype, shape, start + begin, nbytes)


@dataclasses.dataclass(frozen=True)
class TensorToWrite:
    """A tensor and how to get it: `produce()` returns it, C-contiguous or not, only when it is its turn."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    produce: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, tensors: Sequence[TensorToWrite], done: Callable[[int], None] = lambda n: None) -> None:
    """Writes a safetensors file, one tensor in memory at a time; `done(nbytes)` is called after each."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        header[tensor.name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            # NumPy offers no buffer of a bfloat16 array, so its bytes are viewed as integers.
            value = np.ascontiguousarray(tensor.produce())
            file.write(value.reshape(-1).view(np.uint8).data)
            done(tensor.nbytes)
        file.flush()
        os.fsync(file.fileno())
