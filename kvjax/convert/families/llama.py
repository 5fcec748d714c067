"""Llama 2 and 3 (Touvron et al. 2023, 2307.09288; Llama team 2024, 2407.21783)."""

from kvjax.convert.families.base import Family

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    biases="config",
    mlp_bias=True,
    max_position_embeddings=2048,
    bos_token_id=1,
    eos_token_id=2,
)
