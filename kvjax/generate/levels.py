"""Uneven levels for codes: weighted k-means in one dimension, over counts so that memory does not grow with samples."""

from __future__ import annotations

import numpy as np

ROUNDS = 200


def levels_of(mass: np.ndarray, counts: np.ndarray, centers: np.ndarray, count: int) -> np.ndarray:
    """`count` levels that a weighted k-means (Lloyd 1982) finds, from even quantiles on: the same for the same input.

    Args:
      mass: [n], how much the samples of each bin weigh together. counts: [n], how many they are. centers: [n],
        ascending, where they lie; bins without mass count for nothing.

    Returns:
      float32[count], ascending: each the weighted mean of what is nearest to it, or where it began if that is nothing.
    """
    mass, counts, centers = (np.asarray(x, np.float64) for x in (mass, counts, centers))
    if not counts.sum():
        return np.linspace(-1, 1, count).astype(np.float32)
    shares = np.cumsum(counts) / counts.sum()
    levels = centers[np.searchsorted(shares, (np.arange(count) + 0.5) / count)]
    weighted = np.concatenate([[0], np.cumsum(mass)])
    moments = np.concatenate([[0], np.cumsum(mass * centers)])
    for _ in range(ROUNDS):
        # Bins are ordered: what is nearest to a level lies between the middles to its neighbours.
        edges = np.searchsorted(centers, (levels[1:] + levels[:-1]) / 2, side="right")
        edges = np.concatenate([[0], edges, [len(centers)]])
        weight, moment = np.diff(weighted[edges]), np.diff(moments[edges])
        moved = np.sort(np.where(weight > 0, moment / np.where(weight > 0, weight, 1), levels))
        if np.array_equal(moved, levels):
            break
        levels = moved
    return levels.astype(np.float32)
