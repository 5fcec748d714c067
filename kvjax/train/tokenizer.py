"""A byte-level tokenizer: token id = byte value, then special tokens. Any text round-trips."""

from __future__ import annotations

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

END, PAD = "<|end|>", "<|pad|>"
END_ID, PAD_ID = 256, 257
VOCABULARY_SIZE = 260
"""256 bytes, end, pad, and two ids kept free, so that the vocabulary divides by 4."""


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (Radford et al. 2019, GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def byte_tokenizer() -> Tokenizer:
    """The tokenizer of the demo model: 256 bytes, `<|end|>` between texts, `<|pad|>`, two reserved ids."""
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [END, PAD, *(f"<|reserved_{i}|>" for i in range(VOCABULARY_SIZE - 258))]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    return tokenizer


def side_files(context: int) -> tuple[tuple[str, bytes], ...]:
    """`tokenizer_config.json` and `generation_config.json`, which transformers reads beside `tokenizer.json`."""
    tables = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
        },
        "generation_config.json": {"eos_token_id": END_ID, "pad_token_id": PAD_ID, "do_sample": False},
    }
    return tuple((name, json.dumps(table, indent=2).encode() + b"\n") for name, table in tables.items())
