"""Run by test_sharded_attention.py with eight virtual CPU devices: prints what it observed as JSON.

`eight_devices_attending.py NAME ...` observes what these names stand for, without a name everything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from kvjax import CacheConfig, codecs, policies, selects
from kvjax.attention.copies import LEAST_COPIES, LEAST_SLOTS
from kvjax.config import MeshConfig, ModelConfig
from kvjax.distributed import make_mesh, parameter_shardings
from kvjax.model import Model, init
from kvjax.models import stack_layers
from kvjax.train.attend import PackedAttend
from kvjax.train.batch import Batch
from kvjax.train.objective import next_token, reader
from kvjax.train.sharding import put_batch, rules_of
from kvjax.typing import Params

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=8, num_kv_heads=4, head_dim=12
)
PROGRAMS = [("score", "forced_block"), *(("prefill", name) for name in ("prefill_chunk", "prefill_segment"))]
TOKENS, WIDTH, PAGES = 19, 12, 83
ROWS = np.random.default_rng(0).integers(0, 32, (4, TOKENS)).astype(np.int32)
MESHES = {
    "data": MeshConfig(("data",), (4,)),
    "tensor": MeshConfig(("tensor",), (4,)),
    "both": MeshConfig(("data", "tensor"), (2, 4)),
    "all": MeshConfig(("data", "fsdp", "tensor"), (2, 2, 2)),
}
PAGED: dict[str, Any] = dict(page_size=4, num_pages=PAGES)
CACHES = {
    "full": CacheConfig(**PAGED),
    "streaming int8": CacheConfig(policy=policies.StreamingLLM(2, 6), codec=codecs.Int8(), **PAGED),
    "a row per head": CacheConfig(policy=policies.H2O(heavy=4, recent=4), **PAGED),
    "kivi": CacheConfig(codec=codecs.KIVI(bits=2, group=4, residual=8), num_pages=PAGES),
    "quest": CacheConfig(select=selects.Quest(pages=2, dense_layers=0), **PAGED),
    "dmc": CacheConfig(policy=policies.DMC(), **PAGED),
}


def moved(text: str, kinds: str = "all-gather|all-to-all|collective-permute") -> list[list[int]]:
    """The shapes of what a compiled program's devices give one another."""
    results = re.findall(rf" = (.*) (?:{kinds})(?:-start)?\(", text)
    found = re.findall(r"\w+\[([0-9,]+)\]", " ".join(results))
    return [[int(size) for size in shape.split(",")] for shape in found]


def on(model: Model, mesh: MeshConfig | None) -> Model:
    """The model as it would be loaded with `mesh=`."""
    if mesh is None:
        return model
    return dataclasses.replace(
        model, params=jax.device_put(model.params, parameter_shardings(model.config, make_mesh(mesh)))
    )


def trained(model: Model, mesh: MeshConfig | None, rows: np.ndarray, scan: bool) -> tuple[float, Params, str, bool]:
    """The loss, its gradients, the compiled program, and whether devices attend apart."""
    objective = next_token(reader(model.config, attend=PackedAttend(), scan=scan, remat=scan))
    params, batch = stack_layers(model.params) if scan else model.params, Batch(jnp.asarray(rows))
    if mesh is not None:
        made = make_mesh(mesh)
        params = jax.device_put(params, parameter_shardings(model.config, made, rules_of(made), scan))
        # Rows that do not divide come from the host, whole.
        batch = Batch(rows) if rows.shape[0] % 2 else put_batch(Batch(rows), made)

    def loss(params: Params, batch: Batch) -> jax.Array:
        return objective(params, None, batch, jax.random.key(0))["loss"]

    traced = jax.jit(jax.value_and_grad(loss)).trace(params, batch)
    compiled = traced.lower().compile()
    value, gradients = compiled(params, batch)
    return float(value), gradients, compiled.as_text(), "shard_map" in str(traced.jaxpr)


def training(config: ModelConfig, mesh: str, rows: np.ndarray = ROWS, scan: bool = False) -> dict[str, Any]:
    """How far a mesh is from one device, as shares, and which keys or values its devices hand round."""
    model = init(config, dtype=jnp.float32)
    value, gradients, _, alone = trained(model, None, rows, scan)
    ours, found, text, parted = trained(model, MESHES[mesh], rows, scan)
    apart = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), gradients, found)
    size = max(float(np.abs(np.asarray(leaf)).max()) for leaf in jax.tree.leaves(gradients))
    return {
        "loss": abs(value - ours) / value,
        "gradients": max(jax.tree.leaves(apart)) / size,
        "apart": parted and not alone,
        "moved": [shape for shape in moved(text) if {TOKENS, WIDTH} <= set(shape)],
    }


def scored(model: Model, cache: CacheConfig) -> tuple[np.ndarray, list[str], bool]:
    """Logits of ROWS decoded behind a prompt of 9, the compiled programs, and whether devices attend apart in all."""
    texts: list[str] = []
    parted: list[bool] = []

    def spied(real: Any) -> Any:
        def called(*arguments: Any, **static: Any) -> Any:
            traced = real.trace(*arguments, **static)
            compiled = traced.lower().compile()
            texts.append(compiled.as_text())
            parted.append("shard_map" in str(traced.jaxpr))
            return compiled(*arguments)

        return called

    with contextlib.ExitStack() as stack:
        for module, name in PROGRAMS:
            where = f"kvjax.generate.{module}"
            real = getattr(sys.modules[where], name)
            stack.enter_context(mock.patch(f"{where}.{name}", spied(real)))
        return np.asarray(kvjax.score(model, ROWS, cache, "decode", 9, prefill_chunk=4)), texts, all(parted)


def generation(config: ModelConfig, mesh: str, cache: CacheConfig) -> dict[str, Any]:
    """How far a mesh is from one device, and which pools its devices hand round."""
    model = init(config, dtype=jnp.float32)
    expected, _, alone = scored(model, cache)
    found, texts, parted = scored(on(model, MESHES[mesh]), cache)
    given = moved("\n".join(texts), "all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter")
    return {
        "logits": float(np.abs(expected - found).max()),
        "size": float(np.abs(expected).max()),
        # What is counted of pages has one dimension.
        "pools moved": [shape for shape in given if PAGES in shape and len(shape) > 2],
        "apart": parted and not alone,
    }


def calibrated_generation(mesh: str) -> dict[str, Any]:
    """The same over a cache of KVQuant, calibrated on tokens that ROWS have none of.

    A vector that was calibrated on may hold the ends of several channels' ranges: which of them is kept apart, rounding
    decides, and devices round otherwise where they multiply fewer rows.
    """
    config = dataclasses.replace(CONFIG, vocab_size=256)
    text = np.random.default_rng(1).integers(CONFIG.vocab_size, 256, (8, 40)).astype(np.int32)
    told = kvjax.calibrate(init(config, dtype=jnp.float32), text)
    return generation(config, mesh, CacheConfig(codec=codecs.KVQuant(bits=4, calibration=told), **PAGED))


def lives(mesh: str) -> dict[str, Any]:
    """A state that is forked, extended and generated from twice on a mesh."""
    model = init(CONFIG, dtype=jnp.float32)
    prompts = [row[:n].tolist() for row, n in zip(ROWS, (7, 3, 5), strict=False)]

    def whole(model: Model) -> tuple[Any, Any, Any, int]:
        settings: dict[str, Any] = dict(cache=CACHES["full"], prefill_chunk=4)
        # So many, in tables so wide, that copies read their common pages together.
        sampling = kvjax.Sampling(n=LEAST_COPIES, temperature=1.0)
        out = kvjax.generate(model, prompts, 6, sampling=sampling, context=LEAST_SLOTS, **settings)
        again = kvjax.generate(model, prompts, 6, sampling=sampling, context=LEAST_SLOTS, **settings)
        state = kvjax.fork(kvjax.prefill(model, prompts, room=LEAST_SLOTS - 10, **settings), LEAST_COPIES)
        more, state = kvjax.extend(model, state, max_new_tokens=4)
        return out.tokens, more.tokens, state.cache.groups[0].k.values.sharding, again.stats.compiles

    plain, ours = whole(model), whole(on(model, MESHES[mesh]))
    return {
        "tokens": [plain[0] == ours[0], plain[1] == ours[1]],
        "pool": ours[2].shard_shape((PAGES, 1, 4, 4, WIDTH)),
        "compiled again": ours[3],
    }


FEW, ONE = (dataclasses.replace(CONFIG, num_kv_heads=heads) for heads in (2, 1))
OBSERVATIONS: dict[str, Callable[[], dict[str, Any]]] = {
    **{f"training {mesh}": functools.partial(training, CONFIG, mesh) for mesh in MESHES},
    "training scanned": functools.partial(training, CONFIG, "all", scan=True),
    "training few KV heads": functools.partial(training, FEW, "tensor"),
    "training one KV head": functools.partial(training, ONE, "both"),
    "training odd rows": functools.partial(training, CONFIG, "both", ROWS[:3]),
    **{f"generation {mesh}": functools.partial(generation, CONFIG, mesh, CACHES["full"]) for mesh in MESHES},
    "generation few KV heads": functools.partial(generation, FEW, "tensor", CACHES["full"]),
    "generation one KV head": functools.partial(generation, ONE, "both", CACHES["full"]),
    **{f"generation {name}": functools.partial(generation, CONFIG, "both", cache) for name, cache in CACHES.items()},
    **{f"generation kvquant {mesh}": functools.partial(calibrated_generation, mesh) for mesh in ("data", "both")},
    "lives": functools.partial(lives, "both"),
}


if __name__ == "__main__":
    print(json.dumps({name: OBSERVATIONS[name]() for name in sys.argv[1:] or OBSERVATIONS}))
