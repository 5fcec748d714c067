"""Mistral (Jiang et al. 2023, 2310.06825): one window for every layer."""

from kvjax.convert.families.base import Family
from kvjax.convert.hf_windows import Windows

MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    windows=Windows("every"),
    kv_heads=8,
    max_position_embeddings=131072,
    bos_token_id=1,
    eos_token_id=2,
)
