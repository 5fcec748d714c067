"""Merging: several tokens become one entry. KVMerger blends runs of a prompt, DMC each token as it comes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from tests.oracles.policies import Decision, Entry, Full, Moment, top


@dataclasses.dataclass(frozen=True)
class KVMerger(Full):
    """Prompt tokens neither heavy nor recent merge with neighbours of like key (Wang et al. 2024, 2407.08454).

    Per KV head, `recent` newest and of the others the `heavy` of most summed weight stay as they are. The rest falls
    into maximal runs of consecutive tokens whose keys, as stored, have a cosine above `threshold` with the next one's.
    A run becomes one entry at its token of most summed weight, the pivot: the mean of keys and of values under a
    Gaussian of the distance from the pivot's key, its variance the mean squared distance of the others. Generated
    tokens all stay. The first two layers and the last are left alone.
    """

    heavy: int
    recent: int
    threshold: float = 0.75

    def decide(self, moment: Moment) -> Decision:
        """Merges after the prompt."""
        if not moment.prompt or moment.layer < 2 or moment.layer == moment.layers - 1:
            return moment.everything()
        kept, merged, margins = [], [], []
        for entries in moment.held:
            positions, blends, margin = self.merge(entries)
            kept.append(positions)
            merged.append(blends)
            margins.append(margin)
        return Decision(kept, min(margins), merged)

    def merge(self, entries: Sequence[Entry]) -> tuple[set[int], dict[int, tuple[np.ndarray, np.ndarray]], float]:
        """One head's entries -> the positions that stay, what takes their place, and the margin."""
        by_age = sorted(entries, key=lambda e: e.position)
        split = max(0, len(by_age) - self.recent)
        heavy, margin = top({e.position: e.score for e in by_age[:split]}, self.heavy)
        kept = heavy | {e.position for e in by_age[split:]}
        runs, distance = self.runs([e for e in by_age[:split] if e.position not in heavy])
        margin, blends = min(margin, distance), {}
        for run in runs:
            (pivot,), distance = top({e.position: e.score for e in run}, 1)
            kept.add(pivot)
            if len(run) > 1:
                blends[pivot] = blend(run, pivot)
                margin = min(margin, distance)
        return kept, blends, margin

    def runs(self, entries: Sequence[Entry]) -> tuple[list[list[Entry]], float]:
        """Entries in token order, cut where positions or keys part; and the least distance of a cosine from the cut."""
        runs: list[list[Entry]] = []
        margin = math.inf
        for entry in entries:
            if runs and runs[-1][-1].position == entry.position - 1:
                likeness = cosine(runs[-1][-1].key, entry.key)
                margin = min(margin, abs(likeness - self.threshold))
                if likeness > self.threshold:
                    runs[-1].append(entry)
                    continue
            runs.append([entry])
        return runs, margin


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of the angle between two vectors."""
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def blend(run: Sequence[Entry], pivot: int) -> tuple[np.ndarray, np.ndarray]:
    """Key and value of a run; where all keys equal the pivot's, their weights are equal."""
    (center,) = (e.key for e in run if e.position == pivot)
    squares = np.array([np.sum((e.key - center) ** 2) for e in run])
    variance = squares.sum() / (len(run) - 1)
    weights = np.ones(len(run)) if variance == 0 else np.exp(-squares / (2 * variance))
    weights /= weights.sum()
    return weights @ np.stack([e.key for e in run]), weights @ np.stack([e.value for e in run])


@dataclasses.dataclass(frozen=True)
class DMC(Full):
    """Each KV head appends a token or blends it into its newest entry (Nawrot et al. 2024, 2403.09636).

    Before RoPE a key's last channel k decides, alpha = round(sigmoid(k - 5)), the last channels of its group's queries
    weigh, omega = sigmoid(mean + 5), and both are then 0. alpha = 1: key and value of the newest entry become its mean
    with the token's under weights z and omega, and z grows by omega. alpha = 0, or nothing held: append, z = omega.
    Blending comes before the token's own attention, and of unrotated keys; the blend stands at the token's position,
    which is the entry's from then on.
    """

    append_only: ClassVar[bool] = False
    merges_on_write: ClassVar[bool] = True


def sigmoid(x: np.ndarray) -> np.ndarray:
    """The logistic function."""
    return 1 / (1 + np.exp(-x))


def decisions(key: np.ndarray, query: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """One KV head's unrotated keys [T, D] and its group's queries [T, G, D] -> alpha bool[T], omega [T], the margin."""
    gate = key[:, -1] - 5.0
    # A sigmoid of exactly one half rounds to the even 0: append.
    return gate > 0, sigmoid(query[:, :, -1].mean(axis=1) + 5.0), float(np.abs(gate).min())


def partial_sums(alpha: np.ndarray, omega: np.ndarray, x: np.ndarray) -> list[list[tuple[int, np.ndarray]]]:
    """What each of T tokens finds held, by sums over runs, not by recursion: per token, (latest position, blend) pairs.

    x [T, D] unrotated keys, or values. A run begins at the first token and wherever alpha is 0.
    """
    starts = [t for t in range(len(x)) if t == 0 or not alpha[t]]
    seen = []
    for t in range(len(x)):
        begins = [s for s in starts if s <= t]
        ends = [*begins[1:], t + 1]
        seen.append(
            [
                (end - 1, omega[begin:end] @ x[begin:end] / omega[begin:end].sum())
                for begin, end in zip(begins, ends, strict=True)
            ]
        )
    return seen
