"""GoldFinch against its float64 oracle: every path, early exit, what its cache holds and weighs, and that it learns."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kvjax
from kvjax.attention.dense import DenseAttend
from kvjax.attention.paged import PagedAttend
from kvjax.cache.codecs import Int8
from kvjax.cache.pages import take
from kvjax.cache.policies import H2O, TOVA, SlidingWindow, StreamingLLM
from kvjax.cache.size import context_bucket
from kvjax.cache.state import empty_cache
from kvjax.config import GoldFinch, Latent, ModelConfig
from kvjax.distributed import partition_specs
from kvjax.errors import CheckpointError, ConfigError
from kvjax.generate.decode import forced_block
from kvjax.generate.forward import apply, head
from kvjax.generate.prefill import prefill_above, prefill_below
from kvjax.generate.state import layouts_of
from kvjax.model import Model, parameter_shapes
from kvjax.models.finch import remember
from kvjax.models.goldfinch import newest, predecessors
from kvjax.train.step import forward, make_train_step, start
from kvjax.typing import Held
from tests.oracles import goldfinch as oracle

VOCAB, HIDDEN = 61, 32
CLOSE = 2e-4
"""Absolute tolerance on logits of up to 5: five layers in float32 were seen to be off by 2e-6 at most.

A misplaced predecessor or a token too few in the upper layers moves logits by 1e-2 and more.
"""
EXACT = 1e-5
"""On numbers of order one that a layer or two compute in float32."""

CACHE = kvjax.CacheConfig(page_size=4)
CHUNK = 5
"""Prompts end within a chunk and within a page."""

PROMPTS = (1, 3, 23, 12)
"""Lengths of a ragged batch: shorter than the upper layers reach, longer than a chunk, neither."""


def config_of(layers: int = 3, rope: bool = False, **changes: Any) -> ModelConfig:
    parts = GoldFinch(2 * layers // 3, mix_rank=4, decay_rank=4, value_rank=4, rope=rope)
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_heads": 4, "num_kv_heads": 4}
    settings = {"num_layers": layers, "rope_theta": 100.0, "rope_interleaved": rope, "goldfinch": parts}
    return ModelConfig(**(sizes | settings | changes))


@functools.cache
def pair(layers: int = 3, rope: bool = False) -> tuple[Model, dict[str, Any], oracle.Shape]:
    """The model, and the oracle's weights and shape."""
    shape = oracle.Shape(layers, HIDDEN // 4, 100.0 if rope else None)
    weights = oracle.random_params(shape, VOCAB, HIDDEN, 48)
    return Model(config_of(layers, rope), jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), weights)), weights, shape


def texts(seed: int, *lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length).tolist() for length in lengths]


def follows_the_oracle(weights: Any, shape: oracle.Shape, text: list[int], tokens: list[int], logprobs: Any) -> None:
    """Each token is the likeliest after the text so far, and as likely as said."""
    logits = oracle.forward(weights, shape, [*text, *tokens])[len(text) - 1 : -1]
    assert logits.argmax(axis=-1).tolist() == tokens
    expected = logits[np.arange(len(tokens)), tokens] - np.logaddexp.reduce(logits, axis=-1)
    np.testing.assert_allclose(logprobs, expected, rtol=0, atol=CLOSE)


# The network


@pytest.mark.parametrize("layers, rope", [(3, False), pytest.param(5, True, marks=pytest.mark.slow)])
def test_every_path_equals_the_oracle(layers, rope):
    model, weights, shape = pair(layers, rope)
    tokens = np.array(texts(0, 23, 23), np.int32)
    expected = np.stack([oracle.forward(weights, shape, row) for row in tokens.tolist()])
    results = {
        "forward": kvjax.score(model, tokens, CACHE, "forward"),
        "training": forward(model.config, scan=False)(model.params, jnp.asarray(tokens)),
        "decode": kvjax.score(model, tokens, CACHE, "decode", prompt_length=6, prefill_chunk=CHUNK),
    }
    for chunk in (1, CHUNK, 32):
        results[f"prefill by {chunk}"] = kvjax.score(model, tokens, CACHE, "prefill", prefill_chunk=chunk)
    for name, logits in results.items():
        np.testing.assert_allclose(logits, expected, rtol=0, atol=CLOSE, err_msg=name)


@pytest.mark.parametrize("chunk", [1, CHUNK, 32])
def test_a_ragged_prompt_needs_few_tokens_in_the_upper_layers(chunk):
    """What follows shows that the states of the upper layers are as if all tokens had passed."""
    model, weights, shape = pair(5, True)
    prompts = texts(1, *PROMPTS)
    assert model.config.reach == 5 < max(PROMPTS)
    state = kvjax.prefill(model, prompts, CACHE, prefill_chunk=chunk)
    logits = head(model.params, state.last, config=model.config)[: len(prompts)]
    expected = [oracle.forward(weights, shape, prompt)[-1] for prompt in prompts]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=CLOSE)
    out, _ = kvjax.extend(model, state, max_new_tokens=5)
    for prompt, tokens, logprobs in zip(prompts, out.tokens, out.logprobs, strict=True):
        follows_the_oracle(weights, shape, prompt, tokens, logprobs)


def test_a_second_turn_shorter_or_longer_than_the_reach_continues_the_first():
    model, weights, shape = pair(5, True)
    state = kvjax.prefill(model, texts(2, *PROMPTS), CACHE, prefill_chunk=CHUNK)
    _, state = kvjax.extend(model, state, max_new_tokens=2)
    whole = [[*held, *more] for held, more in zip(state.tokens, texts(3, 2, 9, 1, 4), strict=True)]
    more = [text[len(held) :] for held, text in zip(state.tokens, whole, strict=True)]
    out, _ = kvjax.extend(model, state, more, max_new_tokens=4, prefill_chunk=CHUNK)
    for text, tokens, logprobs in zip(whole, out.tokens, out.logprobs, strict=True):
        follows_the_oracle(weights, shape, text, tokens, logprobs)


@pytest.mark.slow
def test_forks_diverge_like_separate_runs():
    model, weights, shape = pair()
    first, second, third = texts(4, 10, 7, 3)
    state = kvjax.prefill(model, [first], CACHE, room=16, prefill_chunk=CHUNK)
    used = int(state.cache.groups[0].used)
    forked = kvjax.fork(state, 2)
    assert int(forked.cache.groups[0].used) == used
    out, forked = kvjax.extend(model, forked, [second, third], max_new_tokens=4, prefill_chunk=CHUNK)
    for more, tokens, logprobs in zip((second, third), out.tokens, out.logprobs, strict=True):
        follows_the_oracle(weights, shape, first + more, tokens, logprobs)
    assert int(forked.cache.groups[0].copied) == 1  # the page that was open
    emptied = take(forked.cache, jnp.array([-1, 1]))
    for before, after in zip(jax.tree.leaves(forked.cache.recurrent), jax.tree.leaves(emptied.recurrent), strict=True):
        assert before[0].any()
        assert not after[0].any()
        np.testing.assert_array_equal(after[1], before[1])


@pytest.mark.slow
def test_beams_take_their_states_along():
    model, weights, shape = pair()
    (prompt,) = texts(5, 9)
    out = kvjax.generate(model, [prompt], 5, CACHE, kvjax.Sampling(beams=3, n=3), prefill_chunk=CHUNK)
    assert len({tuple(tokens) for tokens in out.tokens}) == 3
    for tokens, logprobs in zip(out.tokens, out.logprobs, strict=True):
        logits = oracle.forward(weights, shape, [*prompt, *tokens])[len(prompt) - 1 : -1]
        expected = logits[np.arange(len(tokens)), tokens] - np.logaddexp.reduce(logits, axis=-1)
        np.testing.assert_allclose(logprobs, expected, rtol=0, atol=CLOSE)


# Its parts


@pytest.mark.parametrize("tokens", [1, 16, 37])
def test_the_memory_by_blocks_is_the_recurrence(tokens):
    """Decays from none to one that no float can tell from zero, padding at the end of a row, a memory to start from."""
    rng = np.random.default_rng(6)
    r, k, v = rng.standard_normal((3, 2, tokens, 3, 4))
    log_decay = -np.exp(rng.uniform(-8, 8, (2, tokens, 3, 4)))
    memory = rng.standard_normal((2, 3, 4, 4))
    real = np.arange(tokens) < np.array([[tokens], [tokens - tokens // 3]])
    out, after = remember(*(jnp.asarray(x, jnp.float32) for x in (r, k, v, log_decay)), real, jnp.float32(memory))
    for row in range(2):
        given = oracle.Memory(r[row], k[row], v[row], log_decay[row])
        expected, last = oracle.memory_recurrent(given, memory[row], real[row])
        # Exponents are differences of sums of up to 16 * 30, which float32 holds to 3e-5; outputs are of order ten.
        np.testing.assert_allclose(out[row][real[row]], expected[real[row]], rtol=0, atol=3e-4)
        np.testing.assert_allclose(after[row], last, rtol=0, atol=3e-4)


def test_gradients_of_the_memory_are_finite_however_strong_the_decay():
    parts = jnp.asarray(np.random.default_rng(7).standard_normal((3, 1, 20, 2, 4)), jnp.float32)

    def total(speed: jax.Array) -> jax.Array:
        log_decay = -jnp.exp(jnp.broadcast_to(speed, parts.shape[1:]))
        return jnp.sum(remember(*parts, log_decay, jnp.ones((1, 20), bool), jnp.zeros((1, 2, 4, 4)))[0] ** 2)

    for speed in (-20.0, 0.0, 5.0, 20.0):
        assert jnp.isfinite(jax.grad(total)(jnp.float32(speed)))


def test_a_predecessor_is_never_padding():
    x = jnp.arange(1.0, 9.0).reshape(2, 4, 1)
    last = jnp.array([[-1.0], [-2.0]])
    behind = jnp.array([[True, True, False, False], [False] * 4])
    before = jnp.array([[False, False, True, True], [False, True, True, True]])
    assert predecessors(x, behind, last)[0, :2, 0].tolist() == [-1.0, 1.0]
    assert predecessors(x, before, last)[0, 2:, 0].tolist() == [-1.0, 3.0]
    assert predecessors(x, before, None)[1, 1:, 0].tolist() == [0.0, 6.0, 7.0]
    assert newest(x, behind, last)[:, 0].tolist() == [2.0, -2.0]
    assert newest(x, before, last)[:, 0].tolist() == [4.0, 8.0]


# The cache


@pytest.mark.slow
def test_recomputed_keys_are_the_stored_ones():
    """From compressed vectors and ids in pages, after a chunked prompt and some steps; stored as each token came."""
    model, weights, shape = pair()
    prompts = texts(8, 13, 6)
    state = kvjax.prefill(model, prompts, CACHE, room=8, prefill_chunk=CHUNK)
    _, state = kvjax.extend(model, state, max_new_tokens=4)
    attend = PagedAttend()
    held = attend.held(attend.resume(state.cache, jnp.full((2, 1), -1)), 0)
    source = apply(model.config, None, model.params, held, method="source")
    for row, text in enumerate(state.tokens):
        inside = list(text[: len(text) - state.pending])
        assert held.v[row, : len(inside), 0, 0].tolist() == inside
        assert held.positions[row].tolist() == [*range(len(inside)), *[-1] * (held.k.shape[1] - len(inside))]
        _, stored = oracle.prefill(weights, shape, inside, 1, oracle.empty_state(weights, shape, store_keys=True))
        np.testing.assert_allclose(held.k[row, : len(inside), 0], stored.compressed, rtol=0, atol=EXACT)
        np.testing.assert_allclose(source.keys[row, : len(inside)], stored.keys, rtol=0, atol=EXACT)


@pytest.mark.parametrize(
    "codec, vector",
    [(kvjax.codecs.Dense(), 4 * HIDDEN // 16), pytest.param(Int8(), HIDDEN // 16 + 4, marks=pytest.mark.slow)],
)
def test_a_token_weighs_its_id_and_a_sixteenth_whatever_the_layers(codec, vector):
    cache = dataclasses.replace(CACHE, codec=codec)
    for layers in (3, 6):
        model = Model(config_of(layers), pair(layers)[0].params)
        state = kvjax.prefill(model, [[1, 2, 3, 4, 5]], cache, prefill_chunk=CHUNK)
        (group,) = state.cache.groups
        assert group.pool_bytes == group.num_pages * group.layout.page_size * (vector + 4)
        assert group.v.values.dtype == jnp.int32
        for context in (64, 512):
            plan = kvjax.plan(model.config, cache, context)
            assert plan.bytes_per_token == vector + 4
            assert plan.total_bytes == context * plan.bytes_per_token
            lower = model.config.goldfinch.lower_layers
            assert plan.recurrent_bytes == 4 * (lower * 4 * 8 * 8 + layers * 2 * HIDDEN)
        assert state.cache.recurrent_bytes == plan.recurrent_bytes * state.cache.batch


@pytest.mark.parametrize("layers, hidden, published", [(24, 2048, 756), (80, 8192, 2550)])
def test_the_cache_is_as_much_smaller_as_the_paper_says(layers, hidden, published):
    sizes = {"hidden_size": hidden, "intermediate_size": 64, "num_heads": hidden // 64, "num_kv_heads": hidden // 64}
    ours = config_of(layers, dtype="bfloat16", **sizes)
    plain = dataclasses.replace(ours, goldfinch=None, owners=())
    assert kvjax.plan(plain).bytes_per_token // kvjax.plan(ours).bytes_per_token == published


@pytest.mark.slow
def test_a_codec_changes_compressed_vectors_and_never_ids():
    """Coded alike on both paths, so equal to rounding; unlike the uncoded ones."""
    model, _, _ = pair()
    tokens = np.array(texts(9, 20, 20), np.int32)
    cache = dataclasses.replace(CACHE, codec=Int8())
    plain = kvjax.score(model, tokens, CACHE, "prefill", prefill_chunk=CHUNK)
    whole = kvjax.score(model, tokens, cache, "prefill", prefill_chunk=CHUNK)
    stepped = kvjax.score(model, tokens, cache, "decode", prompt_length=6, prefill_chunk=CHUNK)
    np.testing.assert_allclose(whole, stepped, rtol=0, atol=CLOSE)
    # A code is off by 1/254 of a vector's largest element at most; a wrong id would move logits by 1.
    assert CLOSE < np.abs(whole - plain).max() < 0.2


@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_the_pool_stays_where_it_is(program):
    """Lowered for a pool that is never made: it is given back in place, and all of temporaries is a hundredth of it."""
    config = config_of(goldfinch=GoldFinch(2, compression=1, mix_rank=4, decay_rank=4, value_rank=4))
    params, batch, shape = parameter_shapes(config), 4, jax.ShapeDtypeStruct
    layouts = layouts_of(Model(config, params), kvjax.CacheConfig())
    pages = [(layouts[0].pages_per_row(context_bucket(1)), 16384)]
    cache = jax.eval_shape(functools.partial(empty_cache, layouts, batch, pages, config.recurrent_shapes))
    static = {"config": config, "attend": PagedAttend()}
    tokens, count = shape((batch, CHUNK), jnp.int32), shape((batch,), jnp.int32)
    if program == "prefill":
        lowered = [
            prefill_below.lower(params, cache, shape((batch, 3, HIDDEN), jnp.float32), tokens, count, **static),
            prefill_above.lower(params, cache, shape((batch, 3, HIDDEN), jnp.float32), count, **static),
        ]
    else:
        lowered = [forced_block.lower(params, cache, tokens, count, **static)]
    for one in lowered:
        memory = one.compile().memory_analysis()
        assert memory.alias_size_in_bytes >= cache.pool_bytes
        assert memory.temp_size_in_bytes < 0.02 * cache.pool_bytes


# Training


@pytest.mark.slow
def test_a_fresh_model_changes_nothing_of_a_token():
    """As published: what leaves a layer starts at zero, so that each token's logits are its own embedding's."""
    model = kvjax.init(config_of(3))
    logits = kvjax.score(model, np.array([[3, 4, 5], [9, 4, 1]]))
    np.testing.assert_allclose(logits[0, 1], logits[1, 1], rtol=0, atol=1e-7)
    assert np.abs(logits[0, 0] - logits[1, 0]).max() > 1e-5
    mix = model.params["layers_1"]["time_mix"]
    np.testing.assert_allclose(mix["decay"][jnp.array([0, -1])], [-6, -1], atol=1e-6)
    # Layer 1 of 3: predecessors count by 1 - z^(2/3), for values 0.3 * 1/2 less.
    z = np.arange(HIDDEN) / HIDDEN
    np.testing.assert_allclose(mix["shift"][1], 1 - z ** (2 / 3), atol=1e-6)
    np.testing.assert_allclose(mix["shift"][2], 1 - z ** (2 / 3) - 0.15, atol=1e-6)
    np.testing.assert_allclose(mix["norm"]["scale"], (2 / 3) ** 0.7, atol=1e-6)


@pytest.mark.slow
def test_a_few_steps_teach_it_to_copy():
    """The second half repeats the first: what follows is known only to who looks back six tokens."""
    model = kvjax.init(config_of(3, vocab_size=12))
    logits = forward(model.config, scan=False)
    optimizer = optax.adam(1e-2)
    step = make_train_step(logits, optimizer)
    rng = np.random.default_rng(10)
    # A step consumes its state, which would take the model's own weights with it.
    state = start(jax.tree.map(jnp.copy, model.params), optimizer)
    losses = []
    for _ in range(150):
        half = rng.integers(0, 12, (32, 6))
        tokens = jnp.asarray(np.concatenate([half, half], axis=1), jnp.int32)
        state, told = step(state, tokens, jnp.asarray(np.arange(12) >= 6, jnp.float32)[None].repeat(32, axis=0))
        losses.append(float(told["loss"]))
        assert np.isfinite(told["gradient_norm"])
    # Guessing among 12 costs log 12 = 2.48 nats; steps 30 and 150 were seen to cost 2.0 and 0.35.
    assert losses[0] > 2.3
    assert np.mean(losses[-5:]) < 1.0
    unmoved = [
        jax.tree_util.keystr(path)
        for (path, before), after in zip(
            jax.tree_util.tree_leaves_with_path(model.params), jax.tree.leaves(state.params), strict=True
        )
        if np.array_equal(before, after)
    ]
    assert not unmoved, "parameters that no gradient reaches"


# What it is made of, kept as, and refuses


def test_parameters_are_the_oracles_and_all_have_a_place_on_a_mesh():
    model, _, _ = pair(5, True)
    expected = parameter_shapes(model.config)
    assert jax.tree.map(jnp.shape, model.params) == jax.tree.map(lambda leaf: leaf.shape, expected)
    specs = partition_specs(model.config, {"data": 1, "tensor": 2})
    assert specs["layers_0"]["time_mix"]["o"]["weight"][1] == "tensor"
    assert specs["layers_4"]["channel_mix"]["key"]["weight"][0] == "tensor"


def test_a_saved_model_is_read_back(tmp_path):
    model, _, _ = pair(5, True)
    kvjax.save(model, tmp_path / "model")
    again = kvjax.load(tmp_path / "model")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    with pytest.raises(CheckpointError, match="orbax"):
        kvjax.save(model, tmp_path / "other", format="safetensors")


def test_a_table_of_a_file_makes_the_same_config(tmp_path):
    path = tmp_path / "goldfinch.toml"
    sizes = f"vocab_size = {VOCAB}\nhidden_size = {HIDDEN}\nintermediate_size = 48\nnum_heads = 4\nnum_kv_heads = 4\n"
    ranks = "lower_layers = 2\nmix_rank = 4\ndecay_rank = 4\nvalue_rank = 4\n"
    path.write_text(f"[model]\nnum_layers = 3\nrope_theta = 100.0\n{sizes}[model.goldfinch]\n{ranks}")
    assert ModelConfig.from_toml(path) == config_of(3)
    path.write_text(f"[model]\nnum_layers = 3\n{sizes}[model.goldfinch]\nupper_layers = 1\n")
    with pytest.raises(ConfigError, match="goldfinch: unknown key 'upper_layers'"):
        ModelConfig.from_toml(path)


@pytest.mark.parametrize("policy", [SlidingWindow(8), StreamingLLM(2, 8), TOVA(8), H2O(4, 4)], ids=repr)
def test_policies_that_drop_tokens_are_refused(policy):
    model, _, _ = pair()
    for cache in (
        kvjax.CacheConfig(policy=policy),
        kvjax.CacheConfig(overrides=(((0,), kvjax.CacheConfig(policy=policy)),)),
    ):
        with pytest.raises(ConfigError, match="rebuilt from each token and the one before"):
            kvjax.plan(model.config, cache)
        with pytest.raises(ConfigError, match="rebuilt from each token and the one before"):
            kvjax.generate(model, [[1, 2]], 2, cache)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"windows": (None, None, 4)}, "takes no windows"),
        ({"num_kv_heads": 2}, "num_kv_heads equal to num_heads"),
        ({"head_dim": 4}, "make up hidden_size"),
        ({"goldfinch": GoldFinch(3)}, "lower_layers must be 1 to 2"),
        ({"goldfinch": GoldFinch(2, compression=5)}, "must divide hidden_size"),
        ({"goldfinch": GoldFinch(2, rope=True)}, "rope_interleaved=True"),
        ({"cross_from": 2}, "takes no cross_from"),
        ({"retention_layers": (0,)}, "takes no retention_layers"),
        ({"latent": Latent(8, 8, 8, 8)}, "takes no latent"),
        ({"qk_norm": True}, "takes no qk_norm"),
        ({"attention_sinks": True}, "takes no attention_sinks"),
        ({"owners": (0, 0, 2)}, "contradicts goldfinch"),
    ],
)
def test_what_a_goldfinch_has_not_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config_of(3, **changes)


@pytest.mark.parametrize("name", ["lower_layers", "compression", "mix_rank", "decay_rank", "value_rank"])
def test_sizes_must_be_positive(name):
    with pytest.raises(ConfigError, match=f"{name} must be a positive integer"):
        GoldFinch(**{"lower_layers": 2, name: 0})


def test_what_training_holds_is_what_it_is_given():
    k, v, positions = jnp.ones((1, 3, 1, 2)), jnp.ones((1, 3, 1, 1), jnp.int32), jnp.arange(3)[None]
    held, cache = DenseAttend().hold(None, 0, k, v, positions)
    assert isinstance(held, Held)
    assert cache is None
    assert held.k is k
    assert held.v is v
