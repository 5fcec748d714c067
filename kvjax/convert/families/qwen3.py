"""Qwen3 (Yang et al. 2025, 2505.09388): q and k are normalised per head."""

from kvjax.convert.families.base import Family
from kvjax.convert.hf_windows import Windows

QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    biases="config",
    windows=Windows("by_layer"),
    kv_heads=32,
    head_dim=128,
    values={"qk_norm": True},
)
