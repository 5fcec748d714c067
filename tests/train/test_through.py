"""Training through a smaller cache: the numbers of decoding, gradients as of the values read, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import codecs, policies, selects
from kvjax.cache.config import CacheConfig
from kvjax.config import GoldFinch, Latent, ModelConfig
from kvjax.errors import ConfigError
from kvjax.generate.score import score
from kvjax.model import Model, init
from kvjax.train import Batch, Told, finetune
from kvjax.train.attend import PackedAttend, Segments
from kvjax.train.decode_loss import decode_loss
from kvjax.train.objective import reader
from kvjax.train.through import through_attend

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
)
LATENT = dataclasses.replace(
    CONFIG, num_kv_heads=4, latent=Latent(kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)
)
LENGTH = 22
ORDER = np.arange(LENGTH)[None]
TOKENS = np.random.default_rng(0).integers(0, 32, (2, LENGTH)).astype(np.int32)
KIVI = codecs.KIVI(bits=2, group=4, residual=8)
WINDOW, SINKS, INFINITE = policies.SlidingWindow(6), policies.StreamingLLM(2, 6), policies.LMInfinite(2, 6)
CACHES = {
    "window": CacheConfig(policy=WINDOW),
    "sinks": CacheConfig(policy=SINKS),
    "lm-infinite": CacheConfig(policy=INFINITE),
    "int8": CacheConfig(codec=codecs.Int8()),
    "fp8": CacheConfig(codec=codecs.FP8()),
    "int4": CacheConfig(codec=codecs.Int4(8)),
    "kivi": CacheConfig(codec=KIVI),
    "sinks of int4": CacheConfig(policy=SINKS, codec=codecs.Int4(8)),
    "by layer": CacheConfig(policy=WINDOW, overrides=(((1,), CacheConfig(codec=codecs.Int8())),)),
}


def plain(x: jax.Array, positions: jax.Array) -> jax.Array:
    """A `rotate` that turns nothing, so that keys given are keys read."""
    return x


def turning(x: jax.Array, positions: jax.Array) -> jax.Array:
    """A rotation of the first two channels, a tenth of a radian a position."""
    angle = 0.1 * positions[..., None].astype(jnp.float32)
    a, b = x[..., 0], x[..., 1]
    turned = (a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle))
    return jnp.concatenate([jnp.stack(turned, -1), x[..., 2:]], axis=-1)


@pytest.fixture(scope="module")
def model() -> Model:
    return init(CONFIG, seed=1, dtype=jnp.float32)


def drawn() -> tuple[jax.Array, ...]:
    """q, k, v of one row."""
    rng = np.random.default_rng(2)
    return tuple(jnp.asarray(rng.normal(size=(1, LENGTH, heads, 8)), jnp.float32) for heads in (4, 2, 2))


def attended(model: Model, cache: CacheConfig, rotate: Callable = plain) -> Callable[..., jax.Array]:
    """`(q, k, v, positions, ids) -> out` of the first layer."""
    attend = through_attend(model, cache)

    def out(q: jax.Array, k: jax.Array, v: jax.Array, positions: Any = ORDER, ids: Any = None) -> jax.Array:
        return attend(None if ids is None else Segments(ids), 0, q, k, v, positions, rotate)[0]

    return out


def learnt(out: Callable[..., jax.Array], *given: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The sum of the sines of what `out` gives, and its gradients."""
    every = tuple(range(len(given)))
    found: Any = jax.jit(jax.value_and_grad(lambda *given: jnp.sum(jnp.sin(out(*given))), every))(*given)
    return found


# What decoding computes


def test_the_loss_of_training_is_the_loss_of_decoding_with_the_cache(model):
    cache, told = CACHES["sinks of int4"], list[Told]()
    finetune(model, [TOKENS], 1, 2, 1e-3, through=cache, scan=True, remat=True, report=told.append)
    # The same float32 sums in another order, 1e-6 of a loss of 4; a key that they round to another code would show.
    assert told[0].numbers["loss"] == pytest.approx(decode_loss(model, TOKENS, cache, 1, batch=2), rel=2e-5)
    full: list[Told] = []
    finetune(model, [TOKENS], 1, 2, 1e-3, scan=True, report=full.append)
    assert abs(full[0].numbers["loss"] - told[0].numbers["loss"]) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", CACHES)
def test_logits_are_those_of_decoding_with_the_cache(model, name):
    cache = CACHES[name]
    wanted = score(model, TOKENS, cache, path="decode", prompt_length=1)
    found = jax.jit(reader(CONFIG, attend=through_attend(model, cache)))(model.params, Batch(jnp.asarray(TOKENS)))
    # Float32 sums in another order; logits are of size 4. A code that they round otherwise would be off by 1e-2.
    np.testing.assert_allclose(found.logits, wanted, atol=2e-5)
    assert np.abs(np.asarray(score(model, TOKENS) - wanted)).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("cache", [CACHES["sinks"], CACHES["int8"], CacheConfig(codec=codecs.KIVI(4, 4, 4))])
def test_latents_are_read_as_decoding_reads_them(cache):
    model = init(LATENT, seed=1, dtype=jnp.float32)
    wanted = score(model, TOKENS, cache, path="decode", prompt_length=1)
    found = jax.jit(reader(LATENT, attend=through_attend(model, cache)))(model.params, Batch(jnp.asarray(TOKENS)))
    # As above, the up-projection absorbed on one side and not on the other where no codec asks for it.
    np.testing.assert_allclose(found.logits, wanted, atol=1e-4)


@pytest.mark.parametrize("name", ["window", "sinks", "lm-infinite", "int4", "kivi"])
def test_packed_documents_are_read_as_if_each_were_alone(model, name):
    given, lengths = drawn(), (13, 9)
    ids = np.array([[1] * lengths[0] + [2] * lengths[1]])
    positions = np.array([[*range(lengths[0]), *range(lengths[1])]])
    out = jax.jit(attended(model, CACHES[name], turning))
    together = out(*given, positions, ids)
    # The second document at a row's beginning; what follows it there it does not see.
    alone = out(*(jnp.roll(x, -lengths[0], axis=1) for x in given), ORDER, np.ones_like(ids))
    # Float32 sums over other columns that weigh nothing.
    np.testing.assert_allclose(together[:, lengths[0] :], alone[:, : lengths[1]], atol=1e-6)
    whole = jax.jit(attended(model, CACHES[name], turning))(*given)
    np.testing.assert_allclose(together[:, : lengths[0]], whole[:, : lengths[0]], atol=1e-6)


# What is learnt


FP8 = pytest.param(codecs.FP8(), marks=pytest.mark.slow)


@pytest.mark.parametrize("codec", [codecs.Int8(), codecs.Int4(8), FP8], ids=lambda codec: type(codec).__name__)
def test_gradients_are_those_of_plain_attention_at_the_values_read(model, codec):
    q, k, v = drawn()
    read_k, read_v = (jax.jit(lambda x: codec.decode(codec.encode(x), jnp.float32))(x) for x in (k, v))
    attend = PackedAttend()
    out, gradients = learnt(attended(model, CacheConfig(codec=codec)), q, k, v)
    same, wanted = learnt(lambda *given: attend(None, 0, *given, ORDER, plain)[0], q, read_k, read_v)
    # The very same products; the compiler may fuse them otherwise.
    np.testing.assert_allclose(out, same, rtol=1e-5)
    for one, other in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
        assert np.abs(one).max() > 1e-2


def test_gradients_through_kivi_are_those_of_what_is_coded_and_what_is_exact_together(model):
    q, k, v = drawn()
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)
    # With i tokens held before: whole eights of keys are coded, and values more than eight back.
    old_keys, old_values = j < i - i % 8, j < i - 8

    @jax.jit
    def read(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        whole = LENGTH // 4 * 4
        pages = k[:, :whole].reshape(1, -1, 4, 2, 8).swapaxes(2, 3)
        coded = KIVI.read_keys(KIVI.code_keys(pages), jnp.float32).swapaxes(2, 3).reshape(1, -1, 2, 8)
        values = KIVI.read_values(KIVI.code_values(v), jnp.float32)
        return jnp.concatenate([coded, k[:, whole:]], axis=1), values

    def definition(*given: jax.Array) -> jax.Array:
        q, k, v, read_k, read_v = (jnp.repeat(x[0], 4 // x.shape[2], axis=1).swapaxes(0, 1) for x in given)
        scores = jnp.where(old_keys, q @ read_k.swapaxes(1, 2), q @ k.swapaxes(1, 2)) / 8**0.5
        weights = jax.nn.softmax(jnp.where(j <= i, scores, -jnp.inf), axis=-1)
        return jnp.where(old_values, weights, 0) @ read_v + jnp.where(old_values, 0, weights) @ v

    out, (dq, dk, dv) = learnt(attended(model, CacheConfig(codec=KIVI)), q, k, v)
    same, wanted = learnt(definition, q, k, v, *read(k, v))
    # Float32 sums in another order.
    np.testing.assert_allclose(out, same, rtol=1e-5)
    for one, other in ((dq, wanted[0]), (dk, wanted[1] + wanted[3]), (dv, wanted[2] + wanted[4])):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert np.abs(wanted[3]).max() > 1e-2


@pytest.mark.parametrize("policy", [SINKS, INFINITE], ids=lambda policy: type(policy).__name__)
def test_gradients_through_sinks_are_finite_where_a_part_sees_nothing(model, policy):
    out = attended(model, CacheConfig(policy=policy), turning)
    # Of the first token, which is a sink itself, and of the last.
    _, gradients = learnt(lambda *given: out(*given)[:, np.array([0, LENGTH - 1])], *drawn())
    assert all(bool(jnp.isfinite(one).all()) for one in gradients)
    # A sink is learnt from to the end; a token that has left the window is not.
    last = np.abs(np.asarray(gradients[2][0])).sum((1, 2))
    assert np.flatnonzero(last).tolist() == [0, 1, *range(LENGTH - 6, LENGTH)]


# What is refused


@pytest.mark.parametrize(
    "cache, match",
    [
        (CacheConfig(policy=policies.DMC()), r"loss of its own: give dmc=DMCSchedule"),
        (CacheConfig(overrides=(((1,), CacheConfig(policy=policies.DMC())),)), "in all layers or in none"),
        (CacheConfig(policy=policies.H2O(4, 4)), "keeps or merges tokens by more than their positions"),
        (CacheConfig(policy=policies.TOVA(8)), "take Full, SlidingWindow, StreamingLLM or LMInfinite"),
        (CacheConfig(select=selects.Quest(2, dense_layers=0)), r"through\.select=Quest.*take None"),
        (CacheConfig(codec=codecs.Int4(32)), "must divide the width"),
        (CacheConfig(overrides=(((5,), CacheConfig()),)), "names layer 5"),
    ],
)
def test_what_cannot_be_trained_through_is_refused_with_the_reason(model, cache, match):
    with pytest.raises(ConfigError, match=match):
        finetune(model, TOKENS, 1, 2, 1e-3, through=cache)


def test_a_cache_is_given_as_one(model):
    with pytest.raises(ConfigError, match="through must be None or a CacheConfig"):
        finetune(model, TOKENS, 1, 2, 1e-3, through="int8")
    rebuilt = dataclasses.replace(CONFIG, num_kv_heads=4, goldfinch=GoldFinch(lower_layers=1))
    with pytest.raises(ConfigError, match="through cannot serve GoldFinch"):
        through_attend(dataclasses.replace(model, config=rebuilt), CACHES["int8"])
