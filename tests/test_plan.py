"""A plan's numbers: the published ones, the formulas, and those of the live pool."""

from __future__ import annotations

import math

import numpy as np
import pytest

import kvjax
from kvjax.errors import ConfigError
from kvjax.plan import attention_kinds, plan, read_shape

GB = 10**9
TINY = kvjax.ModelConfig(
    vocab_size=32, hidden_size=32, intermediate_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16
)
CACHES = {
    "full": kvjax.CacheConfig(),
    "page of 4": kvjax.CacheConfig(page_size=4),
    "int8": kvjax.CacheConfig(codec=kvjax.codecs.Int8()),
    "bfloat16": kvjax.CacheConfig(codec=kvjax.codecs.Dense("bfloat16")),
    "window": kvjax.CacheConfig(policy=kvjax.policies.SlidingWindow(24)),
    "sinks": kvjax.CacheConfig(policy=kvjax.policies.StreamingLLM(2, 21)),
    "row per layer": kvjax.CacheConfig(policy=kvjax.policies.TOVA(20)),
    "row per head": kvjax.CacheConfig(policy=kvjax.policies.H2O(9, 10), page_size=4),
    "mixed": kvjax.CacheConfig(overrides=(((1,), kvjax.CacheConfig(policy=kvjax.policies.H2O(9, 10))),)),
}


@pytest.mark.parametrize("context, gigabytes", [(10_000, 8.19), (100_000, 81.9), (500_000, 409.6), (1_000_000, 819.2)])
def test_llama_2_13b_costs_what_is_published(context: int, gigabytes: float) -> None:
    cost = plan("configs/llama-2-13b.toml", context=context)
    assert cost.bytes_per_token == 819_200
    assert cost.total_bytes == 819_200 * context
    # The published figures are rounded to their last digit.
    digits = len(str(gigabytes).partition(".")[2])
    assert round(cost.total_bytes / GB, digits) == gigabytes


def test_deepseek_v3_costs_what_is_published() -> None:
    assert plan("configs/deepseek-v3.toml").bytes_per_token == 70_272
    assert plan("configs/deepseek-v2-lite.toml").elements_per_token == 576 * 27


@pytest.mark.parametrize("layers, heads, groups, width", [(40, 40, 8, 128), (32, 32, 4, 64)])
def test_each_attention_kind_stores_its_formula(layers: int, heads: int, groups: int, width: int) -> None:
    kinds = attention_kinds(layers, heads, width, groups)
    elements = {name: spec.elements_per_token for name, spec in kinds.items()}
    assert elements == {
        "MHA": 2 * heads * width * layers,
        "GQA": 2 * groups * width * layers,
        "MQA": 2 * width * layers,
        "MLA": 9 * width * layers // 2,
    }
    assert attention_kinds(layers, heads, width, groups, 512, 64)["MLA"].elements_per_token == (512 + 64) * layers
    assert plan(kinds["MLA"], dtype="float16").bytes_per_token == 9 * width * layers


QUICK = {"page of 4", "int8", "row per layer", "mixed"}


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CACHES])
def test_pool_and_pages_are_those_of_a_live_cache(name: str) -> None:
    state = kvjax.prefill(kvjax.init(TINY), [[1, 2] * 15] * 3, cache=CACHES[name], room=200)
    # Of these prompts, policies that choose keep budgets that take as many pages as their budgets and one more slot.
    assert plan(TINY, CACHES[name], context=30, batch=3).pages == tuple(int(group.used) for group in state.cache.groups)
    assert plan(TINY, CACHES[name], context=230, batch=3).pool_bytes == state.cache.pool_bytes


@pytest.mark.parametrize("name", CACHES)
def test_bytes_per_layer_add_up_to_the_total(name: str) -> None:
    cost = plan(TINY, CACHES[name], context=77, batch=5)
    assert len(cost.bytes_per_layer) == TINY.num_layers
    assert sum(cost.bytes_per_layer) == cost.total_bytes == cost.bytes_at(77)


def test_the_last_page_counts_whole() -> None:
    cost = plan(TINY, kvjax.CacheConfig(page_size=16), context=17)
    assert cost.total_bytes == 32 * cost.bytes_per_token
    assert cost.bytes_per_token == 2 * 2 * (16 + 16) * 4


def test_int8_costs_one_byte_an_element_and_one_scale_a_vector() -> None:
    assert plan(TINY, CACHES["int8"]).bytes_per_token == 2 * 2 * 2 * (16 + 4)


def test_a_windowed_layer_stops_growing_at_its_window() -> None:
    windows = (None, 64)
    config = kvjax.ModelConfig(**{**vars(TINY), "windows": windows})
    short, long = plan(config, context=64), plan(config, context=640)
    growth = np.array(long.bytes_per_layer) / np.array(short.bytes_per_layer)
    np.testing.assert_array_equal(growth, [10, 1])
    # Mistral's window alone bounds the whole cache.
    assert (
        plan("configs/mistral-7b.toml", context=4096).total_bytes
        == plan("configs/mistral-7b.toml", context=10**6).total_bytes
    )


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("memory", [0, 9_999, 200_000, 3_000_001])
def test_tokens_that_fit_do_and_one_more_does_not(name: str, memory: int) -> None:
    cost = plan(TINY, CACHES[name], batch=2)
    tokens = cost.tokens_that_fit(memory)
    if math.isinf(tokens):
        assert cost.bytes_at(10**9) <= memory
    else:
        assert cost.bytes_at(int(tokens)) <= memory < cost.bytes_at(int(tokens) + 1)


def test_a_fixed_pool_is_planned_as_fixed() -> None:
    cost = plan(TINY, kvjax.CacheConfig(num_pages=7), context=1000)
    assert cost.pool_bytes == 7 * 16 * cost.bytes_per_token
    shared = plan(TINY, kvjax.CacheConfig(memory_bytes=1_000_000), context=1000)
    assert 1_000_000 - 16 * shared.bytes_per_token < shared.pool_bytes <= 1_000_000


@pytest.mark.parametrize("change", [{"context": 0}, {"batch": 0}])
def test_nothing_to_plan_is_refused(change: dict) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        plan(TINY, **change)
    with pytest.raises(ConfigError, match="negative"):
        plan(TINY).tokens_that_fit(-1)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("[kv]\nlayers = 2", "missing key 'kv_heads'"),
        ("[kv]\nlayers = 0\nkv_heads = 1\nkey_dim = 2\nvalue_dim = 2", "layers must be a positive integer"),
        ("[kv]\nlayers = 1\nheads = 1", "unknown key 'heads'"),
        ("[kv", "not valid TOML"),
    ],
)
def test_a_broken_shape_is_refused_by_name(tmp_path, text: str, reason: str) -> None:
    path = tmp_path / "shape.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        read_shape(path)
