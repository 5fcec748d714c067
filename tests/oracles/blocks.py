"""What the architecture oracles share: norms, RoPE, and softmax attention as a partial result. float64, one sequence.

Axes: T query tokens, S key tokens, H query heads, K KV heads (query head h reads KV head h // (H / K)), D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.oracles.decoder import dense

Weights = dict[str, Any]
"""A nested dict of arrays, kvjax's names."""


def layer_norm(x: np.ndarray, weights: Weights, eps: float = 1e-5) -> np.ndarray:
    """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis (Ba et al. 2016, 1607.06450)."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + eps) * weights["scale"] + weights["bias"]


def silu(x: np.ndarray) -> np.ndarray:
    """x times the logistic function of x."""
    return x / (1.0 + np.exp(-x))


def swiglu(x: np.ndarray, weights: Weights) -> np.ndarray:
    """down(silu(gate x) * up x) (Shazeer 2020, 2002.05202)."""
    return dense(silu(dense(x, weights["gate"])) * dense(x, weights["up"]), weights["down"])


def heads_of(x: np.ndarray, width: int) -> np.ndarray:
    """[T, heads * width] -> [T, heads, width]."""
    return x.reshape(len(x), -1, width)


def rotate_neighbours(x: np.ndarray, positions: Sequence[int] | np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """RoPE of x [T, heads, D]: channels (2i, 2i + 1) turn by position * frequencies[i] (Su et al. 2021, 2104.09864)."""
    turn = np.exp(1j * np.asarray(positions, np.float64)[:, None, None] * frequencies)
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * turn
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def rotate_halves(x: np.ndarray, positions: Sequence[int] | np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """The same with channels (i, i + D/2), the pairing of Hugging Face's Llama."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(
        1j * np.asarray(positions, np.float64)[:, None, None] * frequencies
    )
    return np.concatenate([turned.real, turned.imag], axis=-1)


def frequencies(width: int, theta: float) -> np.ndarray:
    """theta^(-2i / D), radians per position of each of the D/2 pairs."""
    return theta ** (-np.arange(0, width, 2) / width)


def partial(q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Attention of q [T, H, D] to k, v [S, K, *] where visible bool[T, S], scores over sqrt(D).

    Returns out [T, H, Dv] and lse [T, H]; a row that sees nothing gives 0 and -inf.
    """
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(visible, scores, -np.inf)
    top = np.max(scores, axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0.0))
    total = weights.sum(axis=-1)
    out = np.einsum("hts,shd->htd", weights, v) / np.where(total > 0, total, 1.0)[..., None]
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, np.log(total) + top[..., 0], -np.inf)
    return np.swapaxes(out, 0, 1), lse.T


def merge(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Partial results over disjoint tokens as one: sum_s e^(lse_s - lse) out_s."""
    lse = np.logaddexp.reduce([part[1] for part in parts])
    safe = np.where(np.isfinite(lse), lse, 0.0)
    return np.sum([out * np.exp(part - safe)[..., None] for out, part in parts], axis=0)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """`partial` without its lse."""
    return partial(q, k, v, visible)[0]


class Random:
    """Weights whose attention is far from uniform and whose norms and biases are not trivial."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def normal(self, *shape: int, spread: float = 1.0, mean: float = 0.0) -> np.ndarray:
        """float64 [*shape]."""
        return mean + spread * self.rng.standard_normal(shape)

    def dense(self, rows: int, columns: int, gain: float = 1.0) -> Weights:
        """A projection that keeps the variance, times gain squared."""
        return {"weight": self.normal(rows, columns, spread=gain * rows**-0.5).T}

    def norm(self, size: int, bias: bool = False) -> Weights:
        """A norm's scale, and its bias."""
        scale = {"scale": self.normal(size, spread=0.2, mean=1.0)}
        return scale | {"bias": self.normal(size, spread=0.2)} if bias else scale

    def attention(self, hidden: int, heads: int, kv_heads: int, width: int, source: int | None = None) -> Weights:
        """q, k, v, o; keys and values come from vectors of width `source`."""
        source = hidden if source is None else source
        return {
            "q": self.dense(hidden, heads * width, gain=3.0),
            "k": self.dense(source, kv_heads * width),
            "v": self.dense(source, kv_heads * width),
            "o": self.dense(heads * width, hidden),
        }

    def mlp(self, hidden: int, wide: int) -> Weights:
        """A gated unit."""
        return {"gate": self.dense(hidden, wide), "up": self.dense(hidden, wide), "down": self.dense(wide, hidden)}
