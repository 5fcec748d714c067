"""The memory contract: after warm-up nothing compiles, pools stay where they are, and a smaller cache is smaller.

Programs are lowered for pools of thousands of pages that are never made, and asked for their memory: the pools given
must be those returned, and no temporary may be anywhere near a pool's size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import CacheConfig, Sampling
from kvjax.attention.paged import PagedAttend
from kvjax.cache.codecs import FP8, Dense
from kvjax.cache.policies import Full, KVMerger
from kvjax.cache.policies.optional import drops_hidden
from kvjax.cache.size import context_bucket
from kvjax.cache.state import Cache, empty_cache
from kvjax.generate.decode import Loop, decode_block, take_sequences
from kvjax.generate.prefill import Place, Prompt, feed_tokens, prefill_chunk, prefill_segment, reserve_pages
from kvjax.generate.sampling import kind_of, make_state
from kvjax.generate.state import layouts_of
from kvjax.model import parameter_shapes
from kvjax.models import Decoder
from kvjax.models.transformer import stack_layers
from tests.cache.tiny import (
    BATCH,
    CHUNK,
    DENSE,
    HEAVY,
    INT8,
    LOOK,
    MODEL,
    STEPS,
    STREAM,
    VOCAB,
    WINDOW,
    Choice,
    cache_of,
    model_of,
    random_tokens,
)

# Pools

PAGES = 16384
CONFIG = kvjax.ModelConfig(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,  # as in real models, so that a page outweighs its four bytes of metadata
)
SMALL = 0.03
"""Temporaries allowed, as a share of the pools, of which the keys of one layer and head are an eighth.

One layer's prompt, which prefill layer by layer holds beside the pools, takes a hundredth of pools of this size.
"""

MERGER = KVMerger(2, 2, 0.1)

Shape = jax.ShapeDtypeStruct


def abstract_cache(choice: Choice, pages: int | None = None) -> Cache:
    """A cache of `BATCH` sequences and so many pages, None: `PAGES`, that takes no memory."""
    layouts = layouts_of(model_of(CONFIG), cache_of((choice, choice)))
    sizes = [(layout.pages_per_row(context_bucket(1)), pages or PAGES) for layout in layouts]
    return jax.eval_shape(functools.partial(empty_cache, layouts, BATCH, sizes))


def lower(program: str, cache: Cache) -> Any:
    """A program of prefill or decoding, lowered for this cache."""
    params = parameter_shapes(CONFIG)
    last, count = Shape((BATCH, CONFIG.hidden_size), jnp.float32), Shape((BATCH,), jnp.int32)
    tokens = Shape((BATCH, CHUNK), jnp.int32)
    static = {"config": CONFIG, "attend": PagedAttend()}
    match program:
        case "reserve_pages":
            return reserve_pages.lower(cache, count)
        case "prefill_chunk":
            return prefill_chunk.lower(params, cache, last, tokens, count, **static)
        case "feed_tokens":
            return feed_tokens.lower(params, cache, last, tokens, count, **static)
        case "prefill_segment":
            hidden = Shape((BATCH, 19 * CHUNK, CONFIG.hidden_size), jnp.float32)
            index = Shape((1,), jnp.int32)
            order = Shape(hidden.shape[:2], jnp.int32)
            positions = order if drops_hidden(cache.groups[0].layout.policy) else None
            layers, places = (params["layers_0"],), (Place(CONFIG.kind(0), 0, 0),)
            return prefill_segment.lower(
                layers,
                cache,
                Prompt(hidden, order, positions),
                count,
                index,
                config=CONFIG,
                places=places,
                chunk=CHUNK,
                backend=None,
            )
        case "decode_block":
            sampling = Sampling()
            numbers = make_state(sampling, [0] * BATCH, [[0]] * BATCH, VOCAB, BATCH)
            loop = Loop(token=count, done=Shape((BATCH,), bool), count=count, limit=count, sampling=numbers)
            halt, stop, allowed = Shape((BATCH,), bool), Shape((8,), jnp.int32), Shape((), jnp.int32)
            return decode_block.lower(
                params, cache, loop, halt, stop, allowed, kind=kind_of(sampling), steps=STEPS, **static
            )
    raise ValueError(program)


def check_memory(lowered: Any, cache: Cache, small: float = SMALL) -> None:
    """The pools are aliased, and temporaries are small beside them."""
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache.pool_bytes
    assert memory.temp_size_in_bytes < small * cache.pool_bytes, (
        f"{memory.temp_size_in_bytes / cache.pool_bytes:.3f} of the pools"
    )


def every_program() -> list[Any]:
    """(program, policy, codec): every program under every kind of row and both codecs; a part of them is not slow."""
    fast = {
        ("decode_block", Full(), DENSE),
        ("decode_block", WINDOW, DENSE),
        ("decode_block", LOOK, DENSE),
        ("decode_block", HEAVY, INT8),
        ("prefill_chunk", WINDOW, INT8),
        ("prefill_segment", LOOK, INT8),
        ("prefill_segment", HEAVY, DENSE),
        ("prefill_segment", MERGER, DENSE),
        ("reserve_pages", HEAVY, INT8),
    }
    cases = []
    for policy in (Full(), WINDOW, STREAM, LOOK, HEAVY, MERGER):
        prefill = ("prefill_segment", "feed_tokens") if policy.observes else ("prefill_chunk",)
        for program in ("reserve_pages", *prefill, "decode_block"):
            for codec in (DENSE, INT8):
                marks = () if (program, policy, codec) in fast else pytest.mark.slow
                name = f"{program}-{policy!r}-{codec!r}"
                cases.append(pytest.param(program, policy, codec, marks=marks, id=name))
    return cases


@pytest.mark.parametrize(("program", "policy", "codec"), every_program())
def test_pools_are_updated_in_place_and_never_copied(program, policy, codec):
    cache = abstract_cache(Choice(policy, codec, 16))
    # A layer's prompt merges in float32, of which each copy is a hundredth of pools of bytes; no pool is so little.
    check_memory(lower(program, cache), cache, 2 * SMALL if (policy, codec) == (MERGER, INT8) else SMALL)


@pytest.mark.parametrize("codec", [Dense("bfloat16"), pytest.param(FP8(), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("program", ["decode_block", pytest.param("prefill_chunk", marks=pytest.mark.slow)])
def test_pools_of_short_floats_which_cpus_cannot_scatter_are_updated_in_place_too(program, codec):
    cache = abstract_cache(Choice(Full(), codec, 16))
    check_memory(lower(program, cache), cache)


@functools.partial(jax.jit, donate_argnums=1)
def scanned_steps(params: Any, cache: Cache, tokens: jax.Array) -> tuple[Cache, jax.Array]:
    """Tokens int32[steps, B] through a decoder whose layers are scanned over: stacked weights, one body."""

    def step(cache: Cache, token: jax.Array) -> tuple[Cache, jax.Array]:
        decoder = Decoder(CONFIG, PagedAttend(), scan=True)
        hidden, cache = decoder.apply({"params": params}, token[:, None], cache.seen[:, None], cache)
        return cache, hidden[:, 0]

    return jax.lax.scan(step, cache, tokens)


@pytest.mark.parametrize("policy", [Full(), HEAVY], ids=str)
def test_pools_are_updated_in_place_when_layers_are_scanned_over(policy):
    cache = abstract_cache(Choice(policy, DENSE, 16))
    params = jax.eval_shape(stack_layers, parameter_shapes(CONFIG))
    check_memory(scanned_steps.lower(params, cache, Shape((STEPS, BATCH), jnp.int32)), cache)


def test_a_turn_leaves_the_pool_where_it_is_and_a_fork_moves_nothing():
    state = kvjax.prefill(MODEL, random_tokens(0, BATCH, 9).tolist(), CacheConfig(page_size=4), prefill_chunk=CHUNK)
    pool = state.cache.groups[0].k.values
    address = pool.unsafe_buffer_pointer()
    _, after = kvjax.extend(MODEL, state, max_new_tokens=20)
    assert pool.is_deleted()
    assert after.cache.groups[0].k.values.unsafe_buffer_pointer() == address
    shuffled = take_sequences(after.cache, np.array([1, 1, 0, 3], np.int32))
    assert shuffled.groups[0].k.values.unsafe_buffer_pointer() == address


@pytest.mark.parametrize("codec", [DENSE, INT8], ids=str)
def test_a_window_of_a_tenth_takes_a_tenth_of_the_memory(codec):
    def pool_bytes(policy: Any) -> int:
        config = CacheConfig(page_size=4, policy=policy, codec=codec)
        return kvjax.plan(MODEL.config, config, context=1024, batch=BATCH).pool_bytes

    # 102 slots are 25.5 pages of the 256.
    assert pool_bytes(kvjax.policies.SlidingWindow(102)) / pool_bytes(Full()) == pytest.approx(26 / 256)
    assert pool_bytes(kvjax.policies.TOVA(101)) / pool_bytes(Full()) == pytest.approx(26 / 256)
    assert pool_bytes(kvjax.policies.H2O(61, 40)) / pool_bytes(Full()) == pytest.approx(26 / 256)


# Compilations


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """A name for every program that XLA compiles, or fetches from the compilation cache, during the test."""
    found: list[str] = []

    def listen(event: str, duration: float, **details: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(str(details.get("fun_name", event)))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
    ("policy", "batch", "context", "sampling"),
    [
        (Full(), 2, 128, Sampling()),
        (HEAVY, 1, 256, Sampling(temperature=0.5, top_k=5)),
        pytest.param(STREAM, 1, 256, Sampling(), marks=pytest.mark.slow),
        pytest.param(Full(), 4, 256, Sampling(n=2, temperature=1.0), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_nothing_compiles_after_warm_up(compilations, policy, batch, context, sampling):
    # One layer, which no other test has: these programs are new to this process, and quickly compiled.
    model = model_of(dataclasses.replace(MODEL.config, num_layers=1, windows=()))
    cache = CacheConfig(page_size=4, policy=policy)
    compiled = kvjax.warmup(model, cache, batch=batch, context=context, sampling=sampling, prefill_chunk=CHUNK)
    assert 0 < compiled <= len(compilations)
    compilations.clear()
    tokens = random_tokens(1, context).tolist()
    other = (
        sampling if sampling == Sampling() else Sampling(n=sampling.n, temperature=1.3, top_k=3 * bool(sampling.top_k))
    )
    for lengths, new in (((3,), 1), ((70,), 40), ((context - 28,), 28), ((1, 90), 17), ((5, 2, 64), 33)):
        if len(lengths) <= batch:
            prompts = [tokens[:length] for length in lengths]
            out = kvjax.generate(model, prompts, new, cache, other, seed=new, prefill_chunk=CHUNK)
            assert all(len(generated) == new for generated in out.tokens)
            assert out.stats.compiles == 0
    assert compilations == []
