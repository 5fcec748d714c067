"""Codecs that know more of a vector than itself: KIVI waits for whole groups of tokens, KVQuant was calibrated."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from tests.oracles.codecs import OracleCodec, affine
from tests.oracles.policies import ceiling

if TYPE_CHECKING:
    from tests.oracles.policies import Entry


@dataclasses.dataclass(frozen=True)
class KIVI(OracleCodec):
    """Keys by channel over `group` tokens, values by token over `group` channels (Liu et al. 2024, 2402.02750).

    With n tokens held after a step, n - n mod residual keys and max(0, n - residual) values, the oldest, are coded,
    with an fp16 scale and minimum per group; the others are exact. A token is coded once, after the attention of its
    step; a prompt's attention is exact.
    """

    waits: ClassVar[bool] = True
    bits: int = 2
    group: int = 32
    residual: int = 128

    def roundtrip(self, x: np.ndarray) -> np.ndarray:
        """What is new is exact."""
        return np.asarray(x, np.float64)

    def settle(self, entries: list[Entry], rank: int | None) -> None:
        """Codes what is due."""
        count = len(entries)
        for start in range(0, count - count % self.residual, self.group):
            members = entries[start : start + self.group]
            if not members[0].coded[0]:
                coded = affine(np.stack([e.key for e in members]).T, self.bits).T
                for entry, key in zip(members, coded, strict=True):
                    entry.key, entry.coded = key, (True, entry.coded[1])
                    if rank is not None:
                        # What serves as the value is the key as it was coded.
                        entry.value, entry.coded = key[:rank], (True, True)
        if rank is None:
            for entry in entries[: max(0, count - self.residual)]:
                if not entry.coded[1]:
                    entry.value = affine(entry.value.reshape(-1, self.group), self.bits).reshape(-1)
                    entry.coded = (entry.coded[0], True)


@dataclasses.dataclass(frozen=True, eq=False)
class KVQuant(OracleCodec):
    """Keys before RoPE on calibrated ranges, values on their own, uneven levels (Hooper et al. 2024, 2401.18079).

    x' = (x - (max + min) / 2) / ((max - min) / 2) goes to the nearest level, ranges per channel for keys, per vector
    for values. Of each vector, ceil(outliers D) channels are kept in fp16 apart: the greatest |x'| of a key, the
    greatest |x| of a value, whose range is that of the others. The first tokens are kept in fp16 whole.

    Attributes:
      key_least, key_greatest: [layers, K, D], ranges of unrotated keys, layers counted among owners.
      key_levels, value_levels: [layers, 2^bits], within [-1, 1].
      outliers: share of a vector's channels. first: number of tokens.
    """

    before_rotation: ClassVar[bool] = True
    key_least: np.ndarray
    key_greatest: np.ndarray
    key_levels: np.ndarray
    value_levels: np.ndarray
    outliers: float = 0.01
    first: int = 1

    def roundtrip(self, x: np.ndarray) -> np.ndarray:
        """Never: a vector needs its layer, head and part."""
        raise NotImplementedError("KVQuant codes keys and values differently in each layer")

    def write(self, layer: int, head: int, part: str, x: np.ndarray, positions: Sequence[int]) -> np.ndarray:
        """What is read back, still unrotated."""
        out = []
        for vector, position in zip(x, positions, strict=True):
            if position < self.first:
                out.append(vector.astype(np.float16).astype(np.float64))
            elif part == "key":
                least, greatest = self.key_least[layer, head], self.key_greatest[layer, head]
                out.append(self.code(vector, least, greatest, self.far(normal(vector, least, greatest)), layer, part))
            else:
                apart = self.far(vector)
                least, greatest = vector[~apart].min(), vector[~apart].max()
                out.append(self.code(vector, least, greatest, apart, layer, part))
        return np.stack(out)

    def far(self, x: np.ndarray) -> np.ndarray:
        """Marks the outliers of a vector."""
        marked = np.zeros(len(x), bool)
        marked[np.argsort(-np.abs(x), kind="stable")[: ceiling(self.outliers, len(x))]] = True
        return marked

    def code(
        self,
        x: np.ndarray,
        least: np.ndarray | float,
        greatest: np.ndarray | float,
        apart: np.ndarray,
        layer: int,
        part: str,
    ) -> np.ndarray:
        """One vector on the layer's levels, but for what is kept apart."""
        levels = self.key_levels[layer] if part == "key" else self.value_levels[layer]
        center, half = (greatest + least) / 2, (greatest - least) / 2
        codes = nearest(normal(x, least, greatest), levels)
        return np.where(apart, x.astype(np.float16).astype(np.float64), levels[codes] * half + center)


def normal(x: np.ndarray, least: np.ndarray | float, greatest: np.ndarray | float) -> np.ndarray:
    """Moves [least, greatest] to [-1, 1]; a range of one point goes to 0."""
    half = np.asarray((greatest - least) / 2)
    return np.where(half == 0, 0.0, (x - (greatest + least) / 2) / np.where(half == 0, 1.0, half))


def nearest(x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Index of the nearest level, the lower one of two: [...] -> int[...]."""
    return np.abs(x[..., None] - levels).argmin(axis=-1)


def levels_of(samples: np.ndarray, sensitivity: np.ndarray, count: int, rounds: int = 100) -> np.ndarray:
    """Weighted k-means in one dimension (Lloyd), from even quantiles on: samples [n] in [-1, 1], Fisher weights [n].

    Returns:
      float64[count] ascending, a stationary point: each level the weighted mean of the samples nearest to it.
    """
    levels = np.quantile(samples, (np.arange(count) + 0.5) / count)
    for _ in range(rounds):
        codes = nearest(samples, levels)
        mass = np.bincount(codes, sensitivity, count)
        means = np.bincount(codes, sensitivity * samples, count) / np.where(mass == 0, 1, mass)
        moved = np.where(mass == 0, levels, means)
        if np.array_equal(moved, levels):
            break
        levels = moved
    return np.sort(levels)
