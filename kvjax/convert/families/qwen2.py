"""Qwen2 and Qwen2.5 (Yang et al. 2024, 2407.10671): biases on q, k and v; windows from some layer on."""

from kvjax.convert.families.base import Family
from kvjax.convert.hf_windows import Windows

QWEN2 = Family("qwen2", "Qwen2ForCausalLM", biases="qkv", windows=Windows("by_layer"), kv_heads=32)
