"""How long a call takes on a GPU, and what the GPU can do at most, measured the same way in the same run.

A program holds several calls on different arguments, so that kernels follow one another without the host between
them; together the arguments are larger than the second-level cache, so that every call reads from memory.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

REPEATS = 20
"""Times that each measurement is taken; the median is reported."""
SHORTEST = 5e-3
"""Seconds that one measurement takes at least: programs are repeated until waiting for the device no longer counts."""
WORKING_SET = 200 * 2**20
"""Bytes that the arguments of a program make at least: four times the second-level cache of an H100 (50 MB)."""
MOST_SETS = 16


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of `repeats`, and the extremes."""

    seconds: float
    low: float
    high: float
    repeats: int


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the device was measured to do at most.

    Attributes:
      copy: bytes a second, read plus written, of the faster of a plain copy and an addition.
      product: operations a second of a bfloat16 product of two random matrices of 8192 by 8192.
    """

    copy: float
    product: float


def bytes_of(arguments: Any) -> int:
    """Bytes of all arrays, or descriptions of arrays, in a pytree."""
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(arguments))


def rotations(arguments: Any) -> int:
    """How many sets of such arguments a program needs to be larger than the cache."""
    return min(max(-(-WORKING_SET // max(bytes_of(arguments), 1)), 1), MOST_SETS)


def program(call: Callable[..., Any]) -> Callable[..., list[Any]]:
    """A function of several sets of arguments: `call` of each."""
    return lambda sets: [call(*arguments) for arguments in sets]


def compiled(call: Callable[..., Any], shapes: Sequence[Any]) -> Any:
    """The compiled program of `call` for arguments of these shapes, and as many sets of them as `rotations` says."""
    sets = tuple(tuple(shapes) for _ in range(rotations(shapes)))
    return jax.jit(program(call)).lower(sets).compile()


def time_program(ready: Callable[..., Any], sets: Sequence[Any], repeats: int = REPEATS) -> Timing:
    """Times a program on its sets of arguments. Dispatch is asynchronous: the host waits once per measurement."""
    begun = time.perf_counter()
    for _ in range(2):  # the first call loads the module
        begun = time.perf_counter()
        jax.block_until_ready(ready(sets))
    runs = max(round(SHORTEST / max(time.perf_counter() - begun, 1e-6)), 1)
    taken = []
    for _ in range(repeats):
        begun = time.perf_counter()
        for _ in range(runs):
            result = ready(sets)
        jax.block_until_ready(result)
        taken.append((time.perf_counter() - begun) / runs / len(sets))
    return Timing(statistics.median(taken), min(taken), max(taken), repeats)


def time_call(call: Callable[..., Any], inputs: Callable[[int], tuple[Any, ...]], repeats: int = REPEATS) -> Timing:
    """Compiles and times a call on fresh arguments: `inputs` takes a seed."""
    first = inputs(0)
    sets = (first, *(inputs(seed) for seed in range(1, rotations(first))))
    return time_program(jax.jit(program(call)).lower(sets).compile(), sets, repeats)


def ceilings(megabytes: int = 1024, width: int = 8192) -> Ceilings:
    """Measures the device's copy rate and product rate."""

    def block(seed: int) -> tuple[jax.Array]:
        return (jax.random.normal(jax.random.key(seed), (megabytes * 2**18,)),)

    def square(seed: int) -> tuple[jax.Array, jax.Array]:
        left, right = jax.random.normal(jax.random.key(seed), (2, width, width), jnp.bfloat16)
        return left, right

    def multiply(left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.dot(left, right)

    moved = 2 * megabytes * 2**20
    copies = [time_call(call, block).seconds for call in (jnp.copy, lambda x: x + 1)]
    return Ceilings(moved / min(copies), 2 * width**3 / time_call(multiply, square).seconds)
