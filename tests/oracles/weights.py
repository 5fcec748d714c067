"""Random weights in kvjax's parameter tree whose attention is far from uniform, so that a policy's choices matter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from kvjax.config import ModelConfig


def random_params(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """float32 NumPy leaves: unit-variance embeddings, query weights thrice the usual size, no trivial norm or bias."""
    rng = np.random.default_rng(seed)
    hidden, width = config.hidden_size, config.width

    def normal(*shape: int, spread: float = 1.0, mean: float = 0.0) -> np.ndarray:
        return (mean + spread * rng.standard_normal(shape)).astype(np.float32)

    def dense(rows: int, columns: int, bias: bool = False, gain: float = 1.0) -> dict[str, np.ndarray]:
        weights = {"weight": normal(rows, columns, spread=gain * rows**-0.5).T}
        return {**weights, "bias": normal(columns, spread=0.3)} if bias else weights

    def norm(size: int) -> dict[str, np.ndarray]:
        return {"scale": normal(size, spread=0.2, mean=1.0)}

    def layer() -> dict[str, Any]:
        heads, kv_heads = config.num_heads * width, config.num_kv_heads * width
        attention = {
            "q": dense(hidden, heads, config.qkv_bias, gain=3.0),
            "k": dense(hidden, kv_heads, config.qkv_bias),
            "v": dense(hidden, kv_heads, config.qkv_bias),
            "o": dense(heads, hidden, config.o_bias),
        }
        if config.qk_norm:
            attention |= {"q_norm": norm(width), "k_norm": norm(width)}
        mlp = {
            "gate": dense(hidden, config.intermediate_size, config.mlp_bias),
            "up": dense(hidden, config.intermediate_size, config.mlp_bias),
            "down": dense(config.intermediate_size, hidden, config.mlp_bias),
        }
        return {"attention_norm": norm(hidden), "attention": attention, "mlp_norm": norm(hidden), "mlp": mlp}

    params = {"embed": {"embedding": normal(config.vocab_size, hidden)}, "norm": norm(hidden)}
    if not config.tie_word_embeddings:
        params["head"] = dense(hidden, config.vocab_size)
    return params | {f"layers_{i}": layer() for i in range(config.num_layers)}
