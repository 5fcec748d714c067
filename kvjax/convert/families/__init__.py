"""The Hugging Face model types that kvjax reads and writes, a module each; docs/adding_a_family.md: how to add one."""

from kvjax.convert.families.base import Family
from kvjax.convert.families.deepseek_v2 import DEEPSEEK_V2
from kvjax.convert.families.deepseek_v3 import DEEPSEEK_V3
from kvjax.convert.families.gemma2 import GEMMA2
from kvjax.convert.families.gemma3 import GEMMA3
from kvjax.convert.families.gpt_oss import GPT_OSS
from kvjax.convert.families.llama import LLAMA
from kvjax.convert.families.mistral import MISTRAL
from kvjax.convert.families.mixtral import MIXTRAL
from kvjax.convert.families.olmo2 import OLMO2
from kvjax.convert.families.phi3 import PHI3
from kvjax.convert.families.qwen2 import QWEN2
from kvjax.convert.families.qwen3 import QWEN3
from kvjax.convert.families.qwen3_moe import QWEN3_MOE
from kvjax.errors import CheckpointError

__all__ = ["FAMILIES", "Family", "family_of"]

FAMILIES = {
    family.model_type: family
    for family in (
        LLAMA,
        QWEN2,
        QWEN3,
        QWEN3_MOE,
        MISTRAL,
        MIXTRAL,
        GEMMA2,
        GEMMA3,
        PHI3,
        OLMO2,
        DEEPSEEK_V2,
        DEEPSEEK_V3,
        GPT_OSS,
    )
}
"""By `model_type`."""


def family_of(model_type: object, source: str) -> Family:
    """The family named `model_type`; `CheckpointError` lists those there are."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"{source}: model_type {model_type!r} is not an architecture kvjax knows; allowed: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]
