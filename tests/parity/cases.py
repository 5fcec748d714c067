"""Small random float32 models of transformers, one per architecture and setting that kvjax reads.

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_something(case, load_case):
        theirs, ours = load_case(case)

torch and transformers are imported by the factories, not by this module, so that it can be collected without them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

VOCAB = 101
LENGTH = 40  # longer than every window below, and than the original contexts that rope scaling starts from
BATCH = 2

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    # A small theta turns every pair noticeably within LENGTH.
    return {"rope_type": kind, "rope_theta": 100.0, **fields}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A name, transformers' model class, and the config fields that differ from the common small shape."""

    name: str
    model_class: str
    fields: Mapping[str, Any]

    def __str__(self) -> str:
        return self.name

    def model(self, seed: int = 0) -> Any:
        """A transformers model in eval mode with eager attention and random float32 weights.

        Every weight is drawn, biases and norms too (transformers starts them at 0 and 1, which would hide their loss),
        with spreads that keep logits of order one.
        """
        import torch
        import transformers

        kind = getattr(transformers, self.model_class)
        fields = {"rope_parameters": _rope("default"), **_SHAPE, **self.fields}
        model = kind(kind.config_class(**fields, attn_implementation="eager")).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                noise = torch.randn(weight.shape, generator=generator)
                if "norm" in name:
                    weight.copy_(1 + 0.2 * noise)
                elif name.endswith("bias"):
                    weight.copy_(0.3 * noise)
                elif "embed" in name:
                    weight.copy_(0.5 * noise)
                else:
                    weight.copy_(noise * weight.shape[-1] ** -0.5)
        return model


LLAMA, QWEN2, QWEN3, MISTRAL = (f"{name}ForCausalLM" for name in ("Llama", "Qwen2", "Qwen3", "Mistral"))
_LLAMA3 = _rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=32)

CASES = (
    Case("llama-mha", LLAMA, {"num_key_value_heads": 4}),
    Case("llama-gqa", LLAMA, {}),
    Case("llama-mqa", LLAMA, {"num_key_value_heads": 1}),
    Case("llama-tied", LLAMA, {"tie_word_embeddings": True}),
    Case("llama-biases", LLAMA, {"attention_bias": True, "mlp_bias": True}),
    Case("llama-head-dim", LLAMA, {"head_dim": 12}),
    Case("llama-rope-linear", LLAMA, {"rope_parameters": _rope("linear", factor=2.5)}),
    Case("llama-rope-llama3", LLAMA, {"rope_parameters": _LLAMA3}),
    Case("llama-rope-yarn", LLAMA, {"rope_parameters": _YARN}),
    Case(
        "llama-rope-yarn-tuned",
        LLAMA,
        {
            "rope_parameters": {
                **_YARN,
                "attention_factor": 1.3,
                "beta_fast": 4.0,
                "beta_slow": 0.5,
                "truncate": False,
            }
        },
    ),
    Case("llama-rope-yarn-mscale", LLAMA, {"rope_parameters": {**_YARN, "mscale": 0.7, "mscale_all_dim": 1.4}}),
    Case("qwen2", QWEN2, {}),
    Case(
        "qwen2-windows",
        QWEN2,
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    Case("qwen3", QWEN3, {"head_dim": 16}),
    Case("qwen3-bias", QWEN3, {"head_dim": 8, "attention_bias": True}),
    Case(
        "qwen3-layer-types",
        QWEN3,
        {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    Case("mistral-window", MISTRAL, {"sliding_window": 9}),
    Case("mistral-full", MISTRAL, {"sliding_window": None, "head_dim": 16}),
)
