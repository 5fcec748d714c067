"""The directions that hold most of a second moment."""

from __future__ import annotations

import numpy as np


def principal(moment: np.ndarray, rank: int | None = None) -> np.ndarray:
    """The `rank` (None: all) orthonormal directions of greatest energy of moment [n, n], greatest first: [n, rank].

    Those of a matrix of samples X are its top right singular vectors, where the moment is X^T X.
    """
    _, vectors = np.linalg.eigh((moment + moment.T) / 2)
    return np.ascontiguousarray(vectors[:, ::-1][:, :rank])


def share_within(moment: np.ndarray, basis: np.ndarray) -> float:
    """The share of the energy of moment [n, n] that lies within the span of an orthonormal basis [n, rank], 0 to 1."""
    whole = float(np.trace(moment))
    if whole <= 0:
        return 1.0
    return min(1.0, max(0.0, float(np.einsum("ir,ij,jr->", basis, moment, basis, optimize=True)) / whole))


def share_of_groups(moments: np.ndarray, bases: np.ndarray) -> float:
    """`share_within` of several groups together: moments [groups, n, n], bases [groups, n, rank] or one for all."""
    whole = np.trace(moments, axis1=1, axis2=2)
    bases = np.broadcast_to(bases, (len(moments), *bases.shape[-2:]))
    kept = sum(share_within(*pair) * energy for *pair, energy in zip(moments, bases, whole, strict=True))
    return float(kept / whole.sum()) if whole.sum() > 0 else 1.0
