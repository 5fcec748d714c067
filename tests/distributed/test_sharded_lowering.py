"""Training steps and decoding lowered for a mesh of H100s that is only described: kernels get a device's share."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

import pallas_kernels
from kvjax import CacheConfig
from kvjax.attention import sharded
from kvjax.attention.paged import PagedAttend
from kvjax.cache.layout import group_layers
from kvjax.cache.placement import pinned
from kvjax.cache.state import empty_cache
from kvjax.config import ModelConfig
from kvjax.distributed import partition_specs
from kvjax.generate.forward import forward_token
from kvjax.model import parameter_shapes
from kvjax.train.attend import PackedAttend
from kvjax.train.batch import Batch
from kvjax.train.objective import next_token, reader
from pallas_kernels import triton_call
from pallas_kernels.checks.lowering import H100

MESH = AbstractMesh(
    (2, 4),
    ("data", "tensor"),
    axis_types=(AxisType.Auto,) * 2,
    abstract_device=AbstractDevice(H100, num_cores=None, platform="gpu"),
)
CONFIG = ModelConfig(
    vocab_size=64, hidden_size=128, intermediate_size=128, num_layers=1, num_heads=8, num_kv_heads=4, head_dim=64
)
BATCH, TOKENS, PAGES = 4, 128, 37
BACKENDS = [
    "mosaic_gpu",
    pytest.param(
        "triton", marks=pytest.mark.skipif(triton_call.absent() is not None, reason=str(triton_call.absent()))
    ),
]


def on_mesh(shape: Any, spec: PartitionSpec = PartitionSpec()) -> jax.ShapeDtypeStruct:
    """An array of the mesh that is not there."""
    dtype = jnp.bfloat16 if shape.dtype == jnp.float32 else shape.dtype
    return jax.ShapeDtypeStruct(shape.shape, dtype, sharding=NamedSharding(MESH, spec))


def weights() -> Any:
    """The model's parameters where they lie."""
    return jax.tree.map(on_mesh, parameter_shapes(CONFIG), partition_specs(CONFIG, MESH.shape))


def kernels(traced: Any) -> list[list[tuple[int, ...]]]:
    """The shapes of the arrays that each kernel is called with and gives, lowered for CUDA."""
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if re.search(r"custom_call @(mosaic_gpu|triton)", line)]
    found = [re.findall(r"tensor<([0-9x]+)x(?:bf16|f32)>", line.rsplit(" : ", 1)[-1]) for line in calls]
    return [[tuple(map(int, shape.split("x"))) for shape in shapes] for shapes in found]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_that_is_not_partitioned_would_be_given_everything(backend: str) -> None:
    q, k = (on_mesh(np.zeros((BATCH, TOKENS, heads, 64), np.float32)) for heads in (8, 4))
    for attention, rows, heads, kv_heads in ((pallas_kernels.attention, 4, 8, 4), (sharded.attention, 2, 2, 1)):
        traced = jax.jit(functools.partial(attention, backend=backend)).trace(q, k, k)
        ((*given,),) = kernels(traced)
        assert given[:3] == [(rows, TOKENS, heads, 64), *[(rows, TOKENS, kv_heads, 64)] * 2]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_training_step_attends_forward_and_backward_on_its_share(backend: str) -> None:
    loss = next_token(reader(CONFIG, attend=PackedAttend(backend=backend)))
    tokens = on_mesh(np.zeros((BATCH, TOKENS), np.int32), PartitionSpec("data"))

    def step(params: Any, tokens: jax.Array) -> Any:
        return jax.grad(lambda params: loss(params, None, Batch(tokens), jax.random.key(0))["loss"])(params)

    found = kernels(jax.jit(step).trace(weights(), tokens))
    assert len(found) == 3  # forward, dQ, and dK with dV
    for shapes in found:
        assert (2, TOKENS, 2, 64) in shapes
        assert (2, TOKENS, 1, 64) in shapes
        assert not {shape for shape in shapes if len(shape) == 4 and (shape[0] > 2 or shape[2] > 2)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_reads_its_share_of_the_pool(backend: str) -> None:
    config = CacheConfig(page_size=64)
    layouts = group_layers(CONFIG.kv_spec, CONFIG.cache_windows, config, "bfloat16")
    cache = jax.tree.map(on_mesh, jax.eval_shape(lambda: empty_cache(layouts, BATCH, ((4, PAGES),))))
    token, active = on_mesh(np.zeros(BATCH, np.int32)), on_mesh(np.zeros(BATCH, bool))

    def step(params: Any, cache: Any, token: jax.Array, active: jax.Array) -> Any:
        attend = PagedAttend(backend)
        return forward_token(params, pinned(cache), token, active, config=CONFIG, attend=attend)

    (shapes,) = kernels(jax.jit(step).trace(weights(), cache, token, active))
    assert shapes.count((PAGES, 1, 1, 64, 64)) == 2
    assert not {shape for shape in shapes if shape[0] == BATCH}
