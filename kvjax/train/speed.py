"""How much of a processor a run uses."""

from __future__ import annotations

import jax

from kvjax.config import ModelConfig
from kvjax.model import parameter_shapes

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
"""Dense bfloat16 FLOP/s at most of a device whose kind holds the name, from the vendor's data sheets."""


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Of a training step, forward and backward: 6 per weight in a product, and attention over half a row on average.

    As is usual (Chowdhery et al. 2022, 2204.02311, appendix B) recomputing layers is not counted, nor a teacher; of
    experts all are counted, so a sparse model's share comes out too high.
    """
    weights = sum(leaf.size for leaf in jax.tree.leaves(parameter_shapes(config)))
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    attention = 6 * config.num_layers * config.num_heads * config.width * length
    return 6.0 * (weights - looked_up) + attention


def share_of_peak(flops: float, seconds: float, devices: int = 1, kind: str | None = None) -> float | None:
    """The share of what the devices can do at most that `flops` in `seconds` are; None where that is not known.

    Args:
      kind: of device; None: the first's.
    """
    name = jax.devices()[0].device_kind if kind is None else kind
    peak = next((most for part, most in PEAK_FLOPS.items() if part in name), None)
    return None if peak is None else flops / seconds / (peak * devices)
