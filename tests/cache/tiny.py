"""A model small enough to compile in a second or two, and ways to look into its live cache.

Everything that runs it uses batches padded to `BATCH` and contexts within one bucket, so that few programs are compiled
and test processes find one another's in the compilation cache.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from kvjax.attention.paged import PagedAttend
from kvjax.cache.state import Cache
from kvjax.generate.decode import forced_block
from kvjax.generate.forward import head
from tests.oracles import codecs as oracle_codecs
from tests.oracles import decoder
from tests.oracles import policies as oracle_policies
from tests.oracles.weights import random_params

VOCAB = 64
CONFIG = kvjax.ModelConfig(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    rope_theta=100.0,  # within these few positions every pair turns noticeably
)
BATCH = 4
CHUNK = 7
"""Tokens per prefill chunk: no multiple of a page or a window, and most prompts take several."""

STEPS = 16
"""Width of a block of forced tokens, the one `kvjax.score` compiles."""

LOGITS = 3e-4
"""Absolute tolerance on logits of up to 5 against the float64 oracle.

Two layers in float32 were seen to be off by 5e-6. What must be noticed, a token too many or too few in the attention,
moves logits by 1e-2 and more.
"""

MARGIN = 5e-5
"""Scores this far apart are ordered alike in float32.

A score sums at most 24 rows of two heads, each weight off by less than 1e-6.
"""


def model_of(config: kvjax.ModelConfig = CONFIG, seed: int = 1) -> kvjax.Model:
    """A model whose attention is far from uniform, so that it matters which tokens are kept."""
    return kvjax.Model(config, jax.tree.map(jnp.asarray, random_params(config, seed)))


MODEL = model_of()


def random_tokens(seed: int, *shape: int) -> np.ndarray:
    """int[*shape] token ids."""
    return np.random.default_rng(seed).integers(0, VOCAB, shape)


def held(cache: Cache, sequence: int, layer: int, head: int) -> tuple[int, ...]:
    """Ascending positions of what a KV head holds of a sequence: what the next token overwrites is gone already.

    Raises:
      AssertionError: a position is held twice, or beyond the row's length.
    """
    number, index = cache.locate(layer)
    group = cache.groups[number]
    rows = {"shared": 0, "layer": index, "head": index * group.layout.spec.kv_heads + head}
    row = rows[group.layout.policy.rows]
    length, victim = int(group.length[row, sequence]), int(group.victim[row, sequence])
    position = np.asarray(group.position[row, sequence])
    assert np.all(position[length:] == -1)
    slots = [slot for slot in range(length) if slot != victim and position[slot] >= 0]
    positions = sorted(int(position[slot]) for slot in slots)
    assert len(set(positions)) == len(positions), f"sequence {sequence}, layer {layer}, head {head}: {positions}"
    return tuple(positions)


def held_everywhere(cache: Cache, sequence: int, config: kvjax.ModelConfig = CONFIG) -> decoder.Positions:
    """`held` of every layer and KV head, in the form of the oracle's `kept`."""
    host = dataclasses.replace(
        cache,
        groups=tuple(
            dataclasses.replace(
                group, **jax.device_get(dict(length=group.length, victim=group.victim, position=group.position))
            )
            for group in cache.groups
        ),
    )
    return [
        [held(host, sequence, layer, head) for head in range(config.num_kv_heads)] for layer in range(config.num_layers)
    ]


def feed(model: kvjax.Model, cache: Cache, tokens: Sequence[Sequence[int]]) -> tuple[Cache, np.ndarray]:
    """Feeds each sequence its own tokens, at most `STEPS`, through the step of the decode loop. Consumes the cache.

    Returns:
      The cache, and float32[B, STEPS, V] logits, those behind a sequence's last token meaningless.
    """
    padded, count = np.zeros((cache.batch, STEPS), np.int32), np.zeros(cache.batch, np.int32)
    for row, piece in enumerate(tokens):
        padded[row, : len(piece)] = piece
        count[row] = len(piece)
    cache, logits, shortage = forced_block(
        model.params, cache, padded, count, config=model.config, attend=PagedAttend()
    )
    assert not bool(shortage.any)
    return cache, np.asarray(logits)


def logits_after(model: kvjax.Model, state: kvjax.State) -> np.ndarray:
    """float32[B, V]: what follows the prompts of a fresh state."""
    assert state.last is not None
    return np.asarray(head(model.params, state.last, config=model.config))


@functools.lru_cache(maxsize=512)
def oracle(
    prompt: tuple[int, ...],
    forced: tuple[int, ...],
    policy: Any,
    codec: Any,
    config: kvjax.ModelConfig = CONFIG,
) -> decoder.Result:
    """The NumPy model's run of one sequence, under the counterparts of a policy and a codec."""
    return decoder.run(
        random_params(config, 1),
        config,
        prompt,
        forced,
        oracle_policies.counterpart(policy),
        oracle_codecs.counterpart(codec),
    )
