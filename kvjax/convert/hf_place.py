"""Where a parameter lies in a checkpoint: in one tensor, in one per expert, or in a part of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.convert.tensor_file import DTYPES, StoredTensor, TensorToWrite
from kvjax.convert.weight_dtypes import all_finite
from kvjax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Part:
    """Entries start, start + step, ..., `count` of them, along `axis` of a tensor that is `size` long there.

    The query's rows of a fused projection: Part(axis=0, start=0, count=queries, size=queries + keys + values). The gate
    of a tensor that alternates gate and up: Part(axis=2, start=0, count=width, size=2 * width, step=2).
    """

    axis: int
    start: int
    count: int
    size: int
    step: int = 1

    def index(self, ndim: int) -> tuple[slice, ...]:
        """What selects the part of a tensor of `ndim` axes."""
        along = slice(self.start, self.start + (self.count - 1) * self.step + 1, self.step)
        return tuple(along if axis == self.axis else slice(None) for axis in range(ndim))

    def rows(self, first: int, last: int) -> tuple[slice, slice]:
        """Of rows first to last: those that belong to a part along axis 0, and where in the part they belong."""
        begin, end = (-(-(row - self.start) // self.step) for row in (first, last))
        begin, end = max(begin, 0), min(end, self.count)
        if begin >= end:
            return slice(0, 0), slice(0, 0)
        offset = self.start - first
        return slice(offset + begin * self.step, offset + (end - 1) * self.step + 1, self.step), slice(begin, end)


def rows_of(sizes: Mapping[str, int]) -> dict[str, Part]:
    """Parts that lie one after another along axis 0, by name."""
    parts, start = {}, 0
    for name, count in sizes.items():
        parts[name] = Part(0, start, count, sum(sizes.values()))
        start += count
    return parts


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one parameter lies.

    Attributes:
      names: the tensor's name; with `stacked` one name per expert, which the parameter counts on its first axis.
      transposed: the tensor is [out, in], the parameter [in, out].
      part: which part of the tensor it is; None: all of it.
    """

    names: tuple[str, ...]
    stacked: bool = False
    transposed: bool = False
    part: Part | None = None

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of each tensor that a parameter of `shape` lies in."""
        stored = list(shape[1:] if self.stacked else shape)
        if self.transposed:
            stored[-2:] = stored[:-3:-1]
        if self.part is not None:
            stored[self.part.axis] = self.part.size
        return tuple(stored)

    def nbytes(self, stored: Mapping[str, StoredTensor]) -> int:
        """Bytes of the checkpoint that are this parameter's."""
        whole = sum(stored[name].nbytes for name in self.names)
        return whole if self.part is None else whole * self.part.count // self.part.size

    def as_stored(self, value: Any, number: int) -> Any:
        """The parameter (a NumPy or jax array) as it lies in its tensor of this number, a view where it can be."""
        value = value[number] if self.stacked else value
        return value.swapaxes(-1, -2) if self.transposed else value


def read_parameter(
    place: Place,
    stored: Mapping[str, StoredTensor],
    shape: tuple[int, ...],
    dtype: np.dtype,
    pool: ThreadPoolExecutor,
) -> np.ndarray:
    """One parameter in `shape` and `dtype`, checked to be finite; blocks are read straight to where they belong."""
    out = np.empty(shape, dtype)

    def copy(job: tuple[int, StoredTensor, int, int]) -> None:
        number, tensor, first, last = job
        target, part = place.as_stored(out, number), place.part
        taken, given = slice(None), slice(first, last)
        if part is not None and part.axis == 0:
            taken, given = part.rows(first, last)
            if given.start == given.stop:
                return
        block = tensor.read(first, last)[taken]
        if part is not None and part.axis:
            block = block[part.index(block.ndim)]
        with np.errstate(over="ignore"):  # an overflow is reported below, with the tensor's name
            block = block.astype(dtype, copy=False)
        if not all_finite(block):
            hint = ", or too large for float16: load them as bfloat16 or float32" if dtype == np.float16 else ""
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name} holds NaN or infinite values as {dtype.name} (stored as "
                f"{tensor.numpy_dtype.name}); the weights are damaged{hint}"
            )
        target[given] = block

    def jobs() -> Iterator[tuple[int, StoredTensor, int, int]]:
        for number, name in enumerate(place.names):
            for first, last in stored[name].blocks():
                yield number, stored[name], first, last

    for _ in pool.map(copy, jobs()):
        pass
    return out


def tensors_to_write(
    params: Mapping[tuple[str, ...], jax.Array], place_of: Callable[[tuple[str, ...]], Place]
) -> list[TensorToWrite]:
    """The tensors that parameters become, in the parameters' order; each is put together only when it is written."""
    sources: dict[str, list[tuple[Place, int, jax.Array]]] = {}
    for path, value in params.items():
        if value.dtype not in DTYPES.values():
            raise CheckpointError(f"{'/'.join(path)} has dtype {value.dtype}; weights are saved as {', '.join(DTYPES)}")
        place = place_of(path)
        for number, name in enumerate(place.names):
            sources.setdefault(name, []).append((place, number, value))
    return [_to_write(name, parts) for name, parts in sources.items()]


def _to_write(name: str, sources: list[tuple[Place, int, jax.Array]]) -> TensorToWrite:
    """A tensor, given the parameters it holds and its number among the tensors of each."""
    place, _, value = sources[0]
    shape, dtype = place.stored_shape(value.shape), value.dtype
    held = sum(other.part.count if other.part else shape[0] for other, _, _ in sources)
    whole = place.part.size if place.part else shape[0]
    alike = {(other.stored_shape(one.shape), one.dtype) for other, _, one in sources}
    if len(alike) > 1 or held != whole:
        raise CheckpointError(
            f"the parameters in {name} do not fit together: shapes and dtypes {sorted(map(str, alike))}, {held} of "
            f"{whole} entries"
        )

    def produce() -> np.ndarray:
        if place.part is None:
            return _to_host(*sources[0])
        out = np.empty(shape, dtype)
        for other, number, one in sources:
            assert other.part is not None
            out[other.part.index(out.ndim)] = _to_host(other, number, one)
        return out

    return TensorToWrite(name, shape, dtype, produce)


def _to_host(place: Place, number: int, value: jax.Array) -> np.ndarray:
    """What of its tensor the parameter is, in host memory.

    A copy is fetched, because an array keeps what was fetched of it for its lifetime; of a stack just the one entry.
    """
    host = np.asarray(value[number] if place.stacked else jnp.copy(value))
    return host.swapaxes(-1, -2) if place.transposed else host
