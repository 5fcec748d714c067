"""CEPE, parallel context encoding: every path against the paper in float64, what the context costs and never changes.

Unless said, two sides are the same float32 network summed in another order: logits of up to 4 were seen to differ by
1e-5 at most.
"""

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
from kvjax import CacheConfig, ModelConfig, Sampling
from kvjax.attention.paged import PagedAttend
from kvjax.cache import pages
from kvjax.cache.codecs import Int8
from kvjax.cache.policies import TOVA
from kvjax.cache.state import empty_cache, empty_group
from kvjax.distributed.rules import partition_specs
from kvjax.errors import CheckpointError, ConfigError, RequestError
from kvjax.generate import contexts as contexts_module
from kvjax.generate.contexts import padded_contexts
from kvjax.generate.decode import forced_block
from kvjax.generate.prefill import Place, Prompt, prefill_segment
from kvjax.generate.state import layouts_of
from kvjax.model import parameter_shapes
from kvjax.models import stack_layers
from kvjax.train.step import adamw, context_only, forward, make_train_step, start
from tests.oracles import cepe

VOCAB, HIDDEN, ENCODED, CHUNK = 61, 32, 24, 8
SHAPE, ENCODER_SHAPE = (cepe.Shape(layers, heads, rope_theta=100.0) for layers, heads in ((3, 4), (2, 2)))
ENCODER = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=ENCODED,
    intermediate_size=48,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    rope_theta=100.0,
    norm_eps=1e-5,
)
BASE = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    rope_theta=100.0,
    norm_eps=1e-5,
)
CONFIG = dataclasses.replace(BASE, encoder=ENCODER, context_chunk=CHUNK)
CACHE = CacheConfig(page_size=4)
CLOSE = 2e-4
"""Against float64, on logits of up to 4: float32 was seen to be off by 4e-6, a token of context too few moves 0.1."""
NOISE = 3e-5

RANDOM = np.random.default_rng(0)
TOKENS = RANDOM.integers(0, VOCAB, (2, 11))
# More chunks than the encoder takes at once, full ones and short ones, which end within pages.
CONTEXTS: list[list[list[int]]] = [
    [RANDOM.integers(0, VOCAB, n).tolist() for n in lengths] for lengths in ((8, 3, 5, 8, 1), (2, 7))
]


@functools.lru_cache
def weights(crossed: int | None = None) -> Any:
    """Of the oracle, float64."""
    sizes = dict(vocab=VOCAB, hidden=HIDDEN, wide=48, kv_heads=2, encoder_hidden=ENCODED)
    return cepe.random_params(SHAPE, ENCODER_SHAPE, **sizes, crossed=crossed)


@functools.lru_cache
def model(crossed: int | None = None) -> kvjax.Model:
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), weights(crossed))
    return kvjax.Model(dataclasses.replace(CONFIG, cross_layers=crossed), params)


@functools.lru_cache
def base() -> kvjax.Model:
    """The same decoder without encoder and cross-attention."""
    params = {name: part for name, part in model().params.items() if name != "encoder"}
    for name in [name for name in params if name.startswith("layers_")]:
        params[name] = {part: value for part, value in params[name].items() if not part.startswith("cross")}
    return kvjax.Model(BASE, params)


@functools.lru_cache
def paper(crossed: int | None = None) -> np.ndarray:
    """What the oracle makes of TOKENS over CONTEXTS."""
    params = weights(crossed)
    rows = []
    for tokens, chunks in zip(TOKENS, CONTEXTS, strict=True):
        encoded = np.concatenate([cepe.encode(params["encoder"], ENCODER_SHAPE, chunk) for chunk in chunks])
        rows.append(cepe.forward(params, SHAPE, tokens.tolist(), encoded))
    return np.stack(rows)


def logits(
    of: kvjax.Model, contexts: Any = None, path: Any = "decode", tokens: np.ndarray = TOKENS, cache: CacheConfig = CACHE
) -> np.ndarray:
    """float32[B, T, V]."""
    options = dict(prompt_length=5, prefill_chunk=3, contexts=contexts)
    return np.asarray(kvjax.score(of, tokens, cache, path, **options))


def close(ours: Any, theirs: Any, tolerance: float = NOISE) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


def differ(ours: Any, theirs: Any) -> None:
    """By far more than rounding: what tells that an equality beside it is not empty."""
    assert np.abs(ours - theirs).max() > 1e-2


def test_parameters_are_those_of_the_paper():
    expected = jax.tree.map(lambda leaf: leaf.shape, weights(2))
    assert (
        jax.tree.map(lambda leaf: leaf.shape, parameter_shapes(dataclasses.replace(CONFIG, cross_layers=2))) == expected
    )


@pytest.mark.parametrize("crossed", [None, 1])
@pytest.mark.parametrize("path", ["forward", "prefill", "decode"])
def test_every_path_equals_the_paper(path, crossed):
    close(logits(model(crossed), CONTEXTS, path), paper(crossed), CLOSE)


def test_layer_by_layer_prefill_equals_the_paper():
    # TOVA weighs a prompt's tokens by attention; with room for all it drops none.
    close(logits(model(), CONTEXTS, cache=CacheConfig(page_size=4, policy=TOVA(32))), paper(), CLOSE)


@pytest.mark.parametrize("scan", [True, False])
def test_the_training_pass_equals_the_paper(scan):
    params = stack_layers(model().params) if scan else model().params
    ours = jax.jit(forward(CONFIG, scan=scan))(params, TOKENS.astype(np.int32), padded_contexts(CONTEXTS, CHUNK))
    close(ours, paper(), CLOSE)


def test_generated_tokens_follow_the_context():
    prompts = [row[:5].tolist() for row in TOKENS]
    out = kvjax.generate(model(), prompts, 6, CACHE, prefill_chunk=3, contexts=CONTEXTS)
    texts = np.array([prompt + tokens for prompt, tokens in zip(prompts, out.tokens, strict=True)])
    expected = logits(model(), CONTEXTS, "forward", texts)[:, 4:-1]
    assert out.tokens == expected.argmax(-1).tolist()
    assert out.tokens != kvjax.generate(model(), prompts, 6, CACHE, prefill_chunk=3).tokens


@pytest.mark.slow
def test_a_stream_reads_its_context():
    prompt, chunks = TOKENS[0, :5].tolist(), CONTEXTS[:1]
    expected = kvjax.generate(model(), [prompt], 6, CACHE, prefill_chunk=3, contexts=chunks).tokens[0]
    assert list(kvjax.stream(model(), prompt, 6, CACHE, prefill_chunk=3, contexts=chunks)) == expected


@pytest.mark.slow
def test_beams_read_their_prompts_context():
    prompts = [row[:5].tolist() for row in TOKENS]
    out = kvjax.generate(model(), prompts, 5, CACHE, Sampling(beams=2), prefill_chunk=3, contexts=CONTEXTS)
    texts = np.array([prompt + tokens for prompt, tokens in zip(prompts, out.tokens, strict=True)])
    expected = jax.nn.log_softmax(logits(model(), CONTEXTS, "forward", texts)[:, 4:-1])
    close(out.logprobs, np.take_along_axis(expected, np.array(out.tokens)[..., None], -1)[..., 0])


def test_chunks_encoded_one_at_a_time_equal_all_at_once(monkeypatch):
    together = logits(model(), CONTEXTS)
    for name in ("CPU_CHUNKS", "ACCELERATOR_CHUNKS"):
        monkeypatch.setattr(contexts_module, name, 1)
    close(logits(model(), CONTEXTS), together)


@pytest.mark.parametrize("path", ["forward", "decode"])
def test_the_order_of_whole_chunks_is_free(path):
    given = logits(model(), CONTEXTS, path)
    turned = [[chunks[i] for i in np.random.default_rng(1).permutation(len(chunks))] for chunks in CONTEXTS]
    assert turned != CONTEXTS
    close(logits(model(), turned, path), given)
    # What is within a chunk has an order, and where chunks part matters.
    reversed_within = [[chunk[::-1] for chunk in chunks] for chunks in CONTEXTS]
    differ(logits(model(), reversed_within, path), given)
    moved = [[[*chunks[0], *chunks[1][:1]][-CHUNK:], *chunks[1:]] for chunks in CONTEXTS]
    differ(logits(model(), moved, path), given)


@pytest.mark.slow
def test_a_fresh_encoder_leaves_the_model_as_it_was():
    fresh = kvjax.with_encoder(base(), ENCODER, context_chunk=CHUNK, cross_layers=2)
    for path in ("forward", "decode"):
        close(logits(fresh, CONTEXTS, path), logits(base(), path=path))
    assert fresh.config == dataclasses.replace(CONFIG, cross_layers=2)
    initial = kvjax.init(CONFIG).params
    assert all(not np.any(initial[f"layers_{i}"]["cross_attention"]["o"]["weight"]) for i in range(3))
    assert all(np.any(initial[f"layers_{i}"]["cross_attention"]["v"]["weight"]) for i in range(3))
    differ(logits(model(), CONTEXTS), logits(base()))


def test_zeroed_outputs_equal_the_base_model():
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if "cross_attention']['o" in jax.tree_util.keystr(path) else leaf,
        model().params,
    )
    close(logits(kvjax.Model(CONFIG, params), CONTEXTS), logits(base()))


@pytest.mark.parametrize("path", ["forward", "decode"])
def test_a_sequence_without_context_is_the_base_models_whatever_lies_beside_it(path):
    plain = logits(base(), path=path)
    beside = logits(model(), [CONTEXTS[0], None], path)
    close(beside[1], plain[1])
    close(beside[0], paper()[0], CLOSE)
    close(logits(model(), None, path), plain)
    close(logits(model(), [[], None], path), plain)


@pytest.mark.parametrize("crossed", [None, 1])
def test_a_context_takes_one_encoded_vector_per_token_whatever_the_layers(crossed):
    prompts = [row.tolist() for row in TOKENS]
    state = kvjax.prefill(model(crossed), prompts, CACHE, prefill_chunk=3, contexts=CONTEXTS)
    without = kvjax.prefill(model(crossed), prompts, CACHE, prefill_chunk=3)
    (group,) = state.cache.context
    assert without.cache.context == ()
    # What lies in memory: one pool of keys that are values too, 4 bytes an element.
    slots = group.num_pages * 4
    live = sum(leaf.nbytes for leaf in jax.tree.leaves((group.k, group.v)))
    assert live == slots * ENCODED * 4 == state.cache.pool_bytes - without.cache.pool_bytes
    totals = [sum(map(len, chunks)) for chunks in CONTEXTS]
    assert int(group.used) == sum(-(-total // 4) for total in totals)
    assert group.length[0, :2].tolist() == totals
    per_token = kvjax.plan(model(crossed).config, CACHE).context_bytes_per_token
    assert per_token == ENCODED * 4 == group.layout.bytes_per_token
    assert kvjax.plan(BASE, CACHE).context_bytes_per_token == 0
    # As many tokens' keys and values of the decoder take far more, and more with every layer.
    assert kvjax.plan(model(crossed).config, CACHE).bytes_per_token == 3 * 2 * 2 * 8 * 4


def test_the_published_sizes():
    """Llama-2-7B: 2 KiB per token of context, as against 512 KiB of keys and values, by an encoder of 435M weights."""
    encoder = ModelConfig(32000, 1024, 4096, 24, 16, 16)
    llama = ModelConfig(32000, 4096, 11008, 32, 32, 32, dtype="bfloat16", encoder=encoder)
    planned = kvjax.plan(llama)
    assert planned.context_bytes_per_token == 2 * 1024
    assert planned.bytes_per_token == 512 * 1024
    # Of the encoder in full and of a decoder that is as small as may be.
    shapes = parameter_shapes(dataclasses.replace(BASE, encoder=encoder))["encoder"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) // 10**6 == 435


@pytest.mark.parametrize("program", ["forced_block", "prefill_segment", "store"])
def test_the_pool_of_a_context_is_never_copied(program):
    cache_config, batch, many = CacheConfig(policy=TOVA(32)), 2, 16384
    of, params, shape = model(), parameter_shapes(CONFIG), jax.ShapeDtypeStruct
    layouts, layout = layouts_of(of, cache_config), contexts_module.layout_of(of, cache_config)
    context = jax.eval_shape(lambda: empty_group(layout, batch, 8, many))
    cache = jax.eval_shape(lambda: empty_cache(layouts, batch, [(2, 4)] * len(layouts)))
    cache = dataclasses.replace(cache, context=(context,))
    count = shape((batch,), jnp.int32)
    if program == "forced_block":
        tokens = shape((batch, 4), jnp.int32)
        lowered = forced_block.lower(params, cache, tokens, count, config=CONFIG, attend=PagedAttend())
    elif program == "prefill_segment":
        hidden, index = shape((batch, 8, HIDDEN), jnp.float32), shape((1,), jnp.int32)
        layers, places = (params["layers_0"],), (Place(CONFIG.kind(0), 0, 0),)
        lowered = prefill_segment.lower(
            layers, cache, Prompt(hidden), count, index, config=CONFIG, places=places, chunk=4, backend=None
        )
    else:
        chunks = shape((4, CHUNK), jnp.int32)
        four = shape((4,), jnp.int32)
        lowered = contexts_module._store.lower(params, context, chunks, four, four, config=CONFIG, backend=None)
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= context.pool_bytes
    # 25 MB of pool; what a step of so small a model works on takes a hundredth of that.
    assert memory.temp_size_in_bytes < 0.03 * context.pool_bytes


@pytest.mark.slow
def test_a_codec_holds_the_context_too():
    cache = CacheConfig(page_size=4, codec=Int8())
    state = kvjax.prefill(model(), [TOKENS[0].tolist()], cache, contexts=CONTEXTS[:1])
    (group,) = state.cache.context
    assert group.k.values.dtype == jnp.int8
    assert group.layout.bytes_per_token == ENCODED + 4 == kvjax.plan(CONFIG, cache).context_bytes_per_token
    # 8 bits code a vector to 1 part in 254 of its largest element; over three layers logits were seen to move by 0.05.
    coded = logits(model(), CONTEXTS, cache=cache)
    close(coded, paper(), 0.25)
    assert np.abs(coded - paper()).max() > CLOSE


@pytest.mark.slow
def test_forks_share_the_context_and_the_last_one_returns_it():
    prompts = [row[:5].tolist() for row in TOKENS]
    expected = kvjax.generate(model(), prompts, 6, CACHE, prefill_chunk=3, contexts=CONTEXTS).tokens
    state = kvjax.prefill(model(), prompts, CACHE, prefill_chunk=3, contexts=CONTEXTS)
    used = int(state.cache.context[0].used)
    state = kvjax.fork(state, 2)
    (group,) = state.cache.context
    assert int(group.used) == used
    assert int(jnp.max(group.refs)) == 2
    out, state = kvjax.extend(model(), state, None, 4)
    # A second turn still reads it, behind tables that have grown.
    wider = [(2 * g.table.shape[2], 2 * g.num_pages) for g in (*state.cache.groups, *state.cache.context)]
    state = dataclasses.replace(state, cache=pages.resize(state.cache, tuple(wider)))
    more, state = kvjax.extend(model(), state, None, 2)
    tokens = [first + then for first, then in zip(out.tokens, more.tokens, strict=True)]
    assert tokens == [expected[0], expected[0], expected[1], expected[1]]
    half = pages.release(state.cache, jnp.array([True, False, True, False]))
    assert int(half.context[0].used) == used
    assert int(pages.release(half, jnp.ones(4, bool)).context[0].used) == 0


@pytest.mark.slow
def test_the_number_of_chunks_compiles_nothing():
    prompt, chunks = [TOKENS[0, :5].tolist()], CONTEXTS[0]
    kvjax.generate(model(), prompt, 2, CACHE, prefill_chunk=3, contexts=[chunks])
    for some in (chunks[:1], chunks[1:], chunks + chunks[:2]):
        out = kvjax.generate(model(), prompt, 2, CACHE, prefill_chunk=3, contexts=[some])
        assert out.stats.compiles == 0
    assert out.stats.context_bytes_per_token == ENCODED * 4


@pytest.mark.parametrize(
    ("contexts", "message"),
    [
        ([[[1, 2]]], "for each of the 2 prompts"),
        ("text", "for each of the 2 prompts"),
        ([[1, 2], None], "list of chunks"),
        (["text", None], "list of chunks"),
        ([None, [[1], []]], "context of prompt 1, chunk as prompt 1 is empty"),
        ([[[1] * (CHUNK + 1)], None], f"has {CHUNK + 1} tokens, the model reads at most {CHUNK}"),
        ([[[VOCAB]], None], f"ids 0 to {VOCAB - 1}"),
        ([[["a"]], None], "flat list of integer"),
        ([["a"], None], "no tokenizer"),
    ],
)
def test_contexts_that_cannot_be_read_are_refused(contexts, message):
    with pytest.raises(RequestError, match=message):
        kvjax.generate(model(), [[1], [2]], 1, contexts=contexts)


def test_a_model_without_encoder_refuses_contexts():
    for call in (kvjax.generate, kvjax.prefill):
        with pytest.raises(RequestError, match="need a model with an encoder"):
            call(base(), [[1]], contexts=[[[1]]])


def test_memory_is_shared_with_the_context():
    # 32 pages of context, 4 slots of 24 float32 each, and a few pages of 4 tokens of 384 bytes.
    context = 32 * 4 * ENCODED * 4
    prompts = [TOKENS[0].tolist()]
    state = kvjax.prefill(
        model(), prompts, CacheConfig(page_size=4, memory_bytes=context + 5 * 4 * 384), contexts=CONTEXTS[:1]
    )
    assert state.cache.pool_bytes <= context + 5 * 4 * 384
    with pytest.raises(ConfigError, match="the context alone takes"):
        kvjax.prefill(model(), prompts, CacheConfig(page_size=4, memory_bytes=context), contexts=CONTEXTS[:1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(encoder=None, cross_layers=1), "needs an encoder"),
        (dict(encoder="small"), "must be a ModelConfig"),
        (dict(cross_layers=4), "cross_layers must be an integer from 1 to 3"),
        (dict(context_chunk=0), "context_chunk must be an integer from 1 to 4096"),
        (dict(encoder=dataclasses.replace(ENCODER, max_position_embeddings=4)), "context_chunk must be .* 1 to 4"),
        (dict(encoder=dataclasses.replace(ENCODER, windows=(4, 4))), "see the whole chunk"),
        (dict(encoder=CONFIG), "drop its own encoder"),
        (dict(norm_placement="post"), "norm_placement must be 'pre'"),
        (dict(cross_from=2), "not implemented beside it"),
        (dict(latent=kvjax.config.Latent(16, 8, 8, 8)), "not implemented beside it"),
    ],
)
def test_combinations_that_are_not_served_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    kvjax.save(model(1), tmp_path / "model")
    again = kvjax.load(tmp_path / "model")
    assert again.config == model(1).config
    jax.tree.map(np.testing.assert_array_equal, again.params, model(1).params)
    with pytest.raises(CheckpointError, match="encoder"):
        kvjax.save(model(1), tmp_path / "hf", format="safetensors")


def test_every_parameter_has_a_place_on_a_mesh():
    specs = partition_specs(CONFIG, {"tensor": 2})
    assert specs["layers_0"]["cross_attention"]["q"]["weight"] == jax.sharding.PartitionSpec("tensor", None)
    assert specs["layers_0"]["cross_attention"]["o"]["weight"] == jax.sharding.PartitionSpec(None, "tensor")
    assert not any(any(spec) for spec in jax.tree.leaves(specs["encoder"]))
    ranks = jax.tree.map(lambda shape, spec: len(shape.shape) == len(spec), parameter_shapes(CONFIG), specs)
    assert all(jax.tree.leaves(ranks))


@pytest.mark.slow
def test_training_teaches_to_read_the_context_and_leaves_the_decoder_alone():
    """The second token is the one that the context names; one row has no context and counts for nothing."""
    encoder = dataclasses.replace(ENCODER, vocab_size=16, num_layers=1, windows=())
    config = dataclasses.replace(CONFIG, vocab_size=16, num_layers=2, windows=(), encoder=encoder, context_chunk=2)
    untrained = kvjax.init(config)
    optimizer = context_only(adamw(optax.constant_schedule(1e-2), weight_decay=0.0))
    step = make_train_step(forward(config), optimizer, parts=2)
    state = start(stack_layers(jax.tree.map(jnp.copy, untrained.params)), optimizer)
    answers = np.arange(1, 9, dtype=np.int32)
    tokens = np.stack([np.zeros_like(answers), answers], axis=1)
    contexts = np.stack([answers, np.zeros_like(answers)], axis=1)[:, None]
    contexts[-1] = -1
    mask = np.ones(tokens.shape, np.float32)
    mask[-1] = 0
    losses = []
    for _ in range(40):
        state, report = step(state, tokens, mask, contexts)
        assert np.isfinite(report["gradient_norm"])
        losses.append(float(report["loss"]))
    # Without the context nothing tells the seven answers apart: the best is log 7 = 1.95.
    assert losses[0] > 2.0
    assert losses[-1] < 1.0
    before, after = stack_layers(untrained.params), state.params
    for name in ("attention", "mlp", "attention_norm", "mlp_norm"):
        jax.tree.map(np.testing.assert_array_equal, after["layers"][name], before["layers"][name])
    for name in ("embed", "head", "norm"):
        jax.tree.map(np.testing.assert_array_equal, after[name], before[name])
    trained = kvjax.Model(config, kvjax.models.unstack_layers(after))
    out = kvjax.generate(trained, [[0]] * 7, 1, CACHE, contexts=[[[int(answer), 0]] for answer in answers[:7]])
    assert [tokens[0] for tokens in out.tokens] == answers[:7].tolist()
