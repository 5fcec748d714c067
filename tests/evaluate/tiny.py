"""A model of byte tokens that compiles in seconds, its questions, and caches to ask them under."""

from __future__ import annotations

import functools

import kvjax
from kvjax.evaluate.suite import Settings, Suite
from kvjax.evaluate.tasks import Material, material_of
from kvjax.train.tokenizer import END_ID, VOCABULARY_SIZE, byte_tokenizer

CONFIG = kvjax.ModelConfig(
    vocab_size=VOCABULARY_SIZE,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_position_embeddings=128,
    eos_token_ids=(END_ID,),
)
SETTINGS = Settings(
    context=128, batch=4, text_rows=4, depths=(0.0, 1.0), recall_count=3, hops=(2,), tracking_count=3, copy_count=2
)


@functools.cache
def model() -> kvjax.Model:
    """Random weights."""
    drawn = kvjax.init(CONFIG, seed=3)
    return kvjax.Model(drawn.config, drawn.params, byte_tokenizer())


@functools.cache
def material() -> Material:
    """The standard library's held-out files."""
    return material_of(model())


@functools.cache
def suite() -> Suite:
    """All tasks, a few questions each."""
    return Suite(model(), material(), SETTINGS)
