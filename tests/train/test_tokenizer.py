"""The byte-level tokenizer and the demo model that is saved with it."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvjax
from kvjax.train.step import forward
from kvjax.train.tokenizer import END, END_ID, PAD, PAD_ID, VOCABULARY_SIZE, byte_tokenizer

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
TOKENIZER = byte_tokenizer()
SOURCE = "def total(items):\n    result = 0\n    for item in items:\n        result += item\n    return result\n"


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_any_text_becomes_its_bytes_and_comes_back(text):
    ids = TOKENIZER.encode(text).ids
    if "<|" not in text:
        assert ids == list(text.encode())
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_special_tokens_have_the_ids_after_the_bytes():
    assert TOKENIZER.get_vocab_size() == VOCABULARY_SIZE
    assert TOKENIZER.encode(f"a{END}{PAD}b").ids == [ord("a"), END_ID, PAD_ID, ord("b")]


def test_the_demo_model_is_small_and_has_the_byte_tokenizer():
    assert (DEMO / "model.safetensors").stat().st_size <= 10_000_000
    model = kvjax.load(DEMO)
    assert model.config.eos_token_ids == (END_ID,)
    assert model.config.vocab_size == VOCABULARY_SIZE
    assert model.tokenizer.to_str() == TOKENIZER.to_str()


def test_the_demo_model_predicts_code_better_than_byte_frequencies():
    model = kvjax.load(DEMO)
    tokens = jnp.asarray([list(SOURCE.encode())], jnp.int32)
    logits = np.asarray(forward(model.config, scan=False)(model.params, tokens), np.float64)
    wide = logits[0, :-1] - np.log(np.exp(logits[0, :-1]).sum(-1, keepdims=True))
    loss = -wide[np.arange(tokens.shape[1] - 1), np.asarray(tokens)[0, 1:]].mean()
    # A model that knows only how often each byte occurs needs about 3.1 nats per byte of code.
    assert loss < 2.3


def test_transformers_computes_the_same_logits_from_the_demo_model():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32, attn_implementation="eager")
    ids = list(SOURCE.encode())
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor([ids])).logits.numpy()
    model = kvjax.load(DEMO, dtype="float32")
    ours = forward(model.config, scan=False)(model.params, jnp.asarray([ids], jnp.int32))
    # float32 with logits up to about 30: transformers itself is 1e-4 from its float64 result on code.
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-4)
