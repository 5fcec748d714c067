"""A backend asked for by name: it serves a whole generation or says why it cannot, and never falls back in silence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import CacheConfig
from kvjax.attention.scratch import ScratchAttend, empty_scratch
from kvjax.cache.codecs import Dense
from kvjax.cache.layout import GroupLayout, KVSpec
from kvjax.cache.policies import H2O, Full
from pallas_kernels.checks.lowering import abstract_h100
from tests.cache.tiny import CHUNK, MODEL, random_tokens

PROMPTS = [random_tokens(7, length).tolist() for length in (10, 3)]
# H2O scores its prompt by the second pass of dense attention, and its steps by that of paged attention.
CACHES = {
    "full": CacheConfig(policy=Full(), page_size=4),
    "h2o": CacheConfig(policy=H2O(heavy=4, recent=4), page_size=4),
}


def tokens(cache: CacheConfig, backend: str | None) -> list[np.ndarray]:
    """Greedy continuations."""
    return list(kvjax.generate(MODEL, PROMPTS, 5, cache=cache, prefill_chunk=CHUNK, backend=backend).tokens)


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        pytest.param("xla", CACHES["full"], marks=pytest.mark.slow, id="xla full"),
        pytest.param("xla", CACHES["h2o"], id="xla h2o"),
        pytest.param("tpu", CACHES["full"], marks=pytest.mark.slow, id="tpu full"),
    ],
)
def test_what_reads_pages_by_xla_generates_what_the_default_does(name: str, cache: CacheConfig) -> None:
    for one, other in zip(tokens(cache, name), tokens(cache, None), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("backend, error, reason", [
    ("mosaic_gpu", NotImplementedError, "mosaic_gpu: .*bfloat16.*float32"),
    ("nonsense", ValueError, "no backend 'nonsense'"),
])  # fmt: skip
def test_a_name_that_cannot_serve_gives_its_reason(backend: str, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        tokens(CACHES["h2o"], backend)


def test_a_named_kernel_attends_to_the_prompt_of_a_policy_that_observes_it() -> None:
    spec = KVSpec(layers=1, kv_heads=2, key_dim=64, value_dim=64)
    layout = GroupLayout((0,), spec, H2O(heavy=4, recent=4), Dense(), 16, None, None, "bfloat16")

    def prompt(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
        scratch = empty_scratch(layout, jnp.full(1, 128), 128)
        attend = ScratchAttend(layout, "mosaic_gpu")
        return attend(scratch, 0, q, k, v, positions, lambda x, _: x)[1].weights

    shapes = [jax.ShapeDtypeStruct((1, 128, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]
    with jax.sharding.use_abstract_mesh(abstract_h100()):
        traced = jax.jit(prompt).trace(*shapes, jax.ShapeDtypeStruct((1, 128), jnp.int32))
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
