"""OLMo 2 (OLMo team 2025, 2501.00656): blocks are normalised where they give, q and k over all heads together."""

from kvjax.convert.families.base import Family
from kvjax.convert.hf_names import LLAMA_NAMES, SANDWICH_NAMES

OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    biases="config",
    max_position_embeddings=2048,
    norm_eps=1e-5,
    eos_token_id=50279,
    values={"norm_placement": "post", "qk_norm_whole": True},
    names={**LLAMA_NAMES, **SANDWICH_NAMES},
)
