"""A second NumPy forward, one matrix per layer and RoPE by complex numbers: no arithmetic shared with the decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tests.oracles.decoder import to_float64

if TYPE_CHECKING:
    from kvjax.config import ModelConfig


def matrix_forward(
    params: dict[str, Any],
    config: ModelConfig,
    tokens: list[int],
    mask: np.ndarray | None = None,
    distance: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """All tokens at once: logits [T, V] and attention weights [L, H, T, T].

    mask bool[L, H, T, T] (None: causal and the layers' windows); distance [T, T] rotates key j against query i by that
    many positions (None: i - j). RoPE turns complex numbers here, and only ever by the difference of two positions.
    """
    params = to_float64(params)
    count, heads, width = len(tokens), config.num_heads, config.width
    i, j = np.arange(count)[:, None], np.arange(count)[None, :]
    if mask is None:
        layers = [(j <= i) & (j > i - (count if window is None else window)) for window in config.windows]
        mask = np.stack([np.broadcast_to(layer, (heads, count, count)) for layer in layers])
    distance = i - j if distance is None else distance
    turn = np.exp(1j * distance[..., None] * config.rope_theta ** (-np.arange(width // 2) / (width / 2)))

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return scale * x * (np.square(x).mean(-1, keepdims=True) + config.norm_eps) ** -0.5

    def linear(x: np.ndarray, part: dict[str, np.ndarray]) -> np.ndarray:
        return np.einsum("...i,oi->...o", x, part["weight"]) + part.get("bias", 0)

    def split(x: np.ndarray) -> np.ndarray:
        return x.reshape(count, -1, width)

    def pairs(x: np.ndarray) -> np.ndarray:
        return x[..., : width // 2] + 1j * x[..., width // 2 :]

    x, weights = params["embed"]["embedding"][np.array(tokens)], []
    for layer in range(config.num_layers):
        part = params[f"layers_{layer}"]
        normed, attention = norm(x, part["attention_norm"]["scale"]), part["attention"]
        q, k, v = (split(linear(normed, attention[name])) for name in "qkv")
        if config.qk_norm:
            q, k = norm(q, attention["q_norm"]["scale"]), norm(k, attention["k_norm"]["scale"])
        k, v = (np.repeat(part, heads // config.num_kv_heads, axis=1) for part in (k, v))
        scores = np.einsum("qhd,khd,qkd->hqk", pairs(q), pairs(k).conj(), turn).real * width**-0.5
        scores = np.where(mask[layer], scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        weights.append(scores / scores.sum(-1, keepdims=True))
        mixed = np.einsum("hqk,khd->qhd", weights[-1], v).reshape(count, -1)
        x = x + linear(mixed, attention["o"])
        normed, mlp = norm(x, part["mlp_norm"]["scale"]), part["mlp"]
        gate = linear(normed, mlp["gate"])
        x = x + linear(gate * 0.5 * (1 + np.tanh(gate / 2)) * linear(normed, mlp["up"]), mlp["down"])
    x = norm(x, params["norm"]["scale"])
    head = params["embed"]["embedding"] if config.tie_word_embeddings else params["head"]["weight"]
    return x @ head.T, np.stack(weights)
