"""Decoding and prefill of an 8B-shaped random model on a GPU, as shares of what the GPU was measured to do.

    python scripts/benchmark.py gpu --out docs/results
    python scripts/benchmark.py gpu --tiny --out results   # a small model on any device: proves that it runs

The memory limit of decoding is what must move for a token, all weights but the embedding table and all keys and values,
over the copy rate of the same run. `transformers`, with a static cache and torch.compile, runs in a process of its own.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console

import kvjax
from kvjax.cache.codecs import Encoded
from kvjax.cache.size import power_of_two, size_groups
from kvjax.cache.state import with_victims
from kvjax.generate.prefill import reserve_pages
from kvjax.generate.state import layouts_of, make_cache
from pallas_kernels.checks import timing
from pallas_kernels.checks.arrays import random_array
from pallas_kernels.checks.files import write_results
from pallas_kernels.checks.report import versions
from pallas_kernels.device import device_kind
from pallas_kernels.tuning import device_name

ROOT = Path(__file__).resolve().parent.parent
TINY = kvjax.ModelConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16
)


@dataclasses.dataclass
class Arguments:
    """What is measured."""

    config: Path = ROOT / "configs" / "llama-3.1-8b.toml"
    batches: tuple[int, ...] = (1, 8, 64)
    contexts: tuple[int, ...] = (1024, 8192, 32768)
    """Tokens held when decoding ends; whatever does not fit in memory says so."""
    prompts: tuple[int, ...] = (2048, 8192, 32768)
    """Tokens of the prefills that are timed, one sequence each."""
    steps: int = 64
    """Tokens decoded in a measurement."""
    repeats: int = 3
    """Measurements, after one that compiles; the median is reported."""
    page: int = 64
    """Slots per page."""
    real: int = 16384
    """Most tokens, over the batch, that a real prefill puts in the cache; beyond that random keys and values do."""
    backend: str | None = None
    peer: bool = True
    """Measures transformers too."""
    limit_seconds: float = 450.0
    """No measurement starts later than this."""
    tiny: bool = False
    """A model of two layers, short contexts."""
    out: Path | None = None
    """Writes benchmark_MODEL_DEVICE.json and .md to this folder after every measurement."""


def shape_of(arguments: Arguments) -> kvjax.ModelConfig:
    """The model, which never ends a text."""
    config = TINY if arguments.tiny else kvjax.ModelConfig.from_toml(arguments.config)
    return dataclasses.replace(config, eos_token_ids=())


def moved(model: kvjax.Model, held: int, bytes_per_token: int) -> tuple[int, int]:
    """Bytes that a step must read: of weights, and of keys and values of `held` tokens."""
    # A tied table is the output's weights too.
    unread = timing.bytes_of(model.params["embed"]) if "head" in model.params else 0
    return timing.bytes_of(model.params) - unread, held * bytes_per_token


def random_state(model: kvjax.Model, cache_config: kvjax.CacheConfig, batch: int, context: int, room: int) -> Any:
    """A state whose cache holds random keys and values, as if `context` tokens of each sequence had gone through."""
    layouts = layouts_of(model, cache_config)
    size = power_of_two(batch)
    held = jnp.where(jnp.arange(size) < batch, context, 0)
    cache, _ = reserve_pages(make_cache(layouts, size, size_groups(layouts, size, context + room, None)), held)
    groups = []
    for number, group in enumerate(cache.groups):
        pools = []
        for i, pool in enumerate((group.k, group.v)):
            shape, dtype = pool.values.shape, pool.values.dtype
            pool.values.delete()  # two pools of this size may not fit beside each other
            pools.append(Encoded(random_array(2 * number + i, shape, dtype)))
        order = jnp.arange(group.position.shape[2])
        groups.append(
            dataclasses.replace(
                group,
                k=pools[0],
                v=pools[1],
                length=jnp.broadcast_to(held, group.length.shape).astype(jnp.int32),
                position=jnp.broadcast_to(jnp.where(order < held[:, None], order, -1), group.position.shape),
            )
        )
    cache = with_victims(dataclasses.replace(cache, groups=tuple(groups), seen=held.astype(jnp.int32)))
    # The newest token is pending: not yet in the cache.
    return kvjax.State(cache, cache_config, ((1,) * (context + 1),) * batch, None, 1)


def decode(model: kvjax.Model, batch: int, context: int, arguments: Arguments, ceilings: timing.Ceilings) -> Any:
    """Tokens per second of one batch, and the share of the memory limit."""
    cache = kvjax.CacheConfig(page_size=arguments.page)
    room = (arguments.repeats + 1) * arguments.steps + 1
    # Pools round up to powers of two: what is generated must not double them.
    context -= room
    real = batch * context <= arguments.real
    if real:
        state = kvjax.prefill(model, [[1 + i] * context for i in range(batch)], cache, room=room)
        _, state = kvjax.extend(model, state, max_new_tokens=1)
    else:
        state = random_state(model, cache, batch, context, room)
    per_token = sum(group.layout.bytes_per_token for group in state.cache.groups)
    seconds = []
    for _ in range(arguments.repeats + 1):
        out, state = kvjax.extend(model, state, max_new_tokens=arguments.steps, backend=arguments.backend)
        seconds.append(out.stats.decode_seconds / arguments.steps)
    step = statistics.median(seconds[1:])
    # The median measurement begins at about this many tokens.
    held = batch * (context + arguments.steps * (arguments.repeats + 2) // 2)
    weights, kept = moved(model, held, per_token)
    limit = (weights + kept) / ceilings.copy
    return {
        "batch": batch,
        "context": context + room,
        "tokens_held": held // batch,
        "filled_by": "a real prefill" if real else "random keys and values",
        "step_ms": 1e3 * step,
        "tokens_per_second": batch / step,
        "weight_bytes": weights,
        "cache_bytes": kept,
        "share_of_limit": limit / step,
    }


def prefill(model: kvjax.Model, tokens: int, arguments: Arguments, ceilings: timing.Ceilings) -> dict[str, Any]:
    """FLOP/s of one prompt: two for each weight a token passes, and four for each channel of each pair in attention."""
    config, seconds = model.config, []
    cache = kvjax.CacheConfig(page_size=arguments.page)
    for _ in range(arguments.repeats + 1):
        begun = time.perf_counter()
        jax.block_until_ready(kvjax.prefill(model, [[1] * tokens], cache, backend=arguments.backend).last)
        seconds.append(time.perf_counter() - begun)
    taken = statistics.median(seconds[1:])
    parts = (part for name, part in model.params.items() if name.startswith("layers_"))
    layers = sum(leaf.size for part in parts for leaf in jax.tree.leaves(part))
    width = config.head_dim or config.hidden_size // config.num_heads
    rate = (2 * layers * tokens + 2 * config.num_layers * config.num_heads * width * tokens**2) / taken
    return {
        "tokens": tokens,
        "ms": 1e3 * taken,
        "tokens_per_second": tokens / taken,
        "flops": rate,
        "share": rate / ceilings.product,
    }


def measure(arguments: Arguments, path: str | None, deadline: float) -> dict[str, Any]:
    """All of kvjax's own figures. Runs in a process of its own, so that its memory is free again for the peer."""
    console = Console(highlight=False, soft_wrap=True)
    ceilings = timing.ceilings(16, 256) if arguments.tiny else timing.ceilings()
    results: dict[str, Any] = {
        "device": device_kind(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": versions(("jax", "jaxlib", "flax", "torch", "transformers")),
        "model": arguments.config.stem if not arguments.tiny else "tiny",
        "ceilings": dataclasses.asdict(ceilings),
        "decode": [],
        "prefill": [],
    }
    model = kvjax.init(shape_of(arguments))
    jax.block_until_ready(model.params)
    work = [("decode", batch, context) for context in arguments.contexts for batch in arguments.batches]
    work += [("prefill", 1, tokens) for tokens in arguments.prompts]
    for kind, batch, tokens in work:
        row: dict[str, Any] = {"batch": batch, "context": tokens} if kind == "decode" else {"tokens": tokens}
        try:
            if time.time() > deadline:
                row["reason"] = "out of time"
            elif kind == "decode":
                row = decode(model, batch, tokens, arguments, ceilings)
            else:
                row = prefill(model, tokens, arguments, ceilings)
        except Exception as error:
            row["reason"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        results[kind].append(row)
        console.print(kind, json.dumps(row))
        write(results, path)
    return results


def peer(arguments: Arguments, results: dict[str, Any], path: str | None, deadline: float) -> None:
    """The same decoding in transformers, row by row as its process reports it."""
    wanted = [(row["batch"], row["context"]) for row in results["decode"] if "step_ms" in row]
    command = [sys.executable, str(Path(__file__).with_name("benchmark_gpu_peer.py")), json.dumps(wanted)]
    shape = dataclasses.asdict(shape_of(arguments))
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
    given = {key: shape[key] for key in keys} | {"steps": arguments.steps}
    process = subprocess.Popen([*command, json.dumps(given)], stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(max(deadline - time.time(), 0), process.kill)
    timer.start()
    assert process.stdout is not None
    results["transformers"] = []
    for line in process.stdout:
        if line.startswith("{"):
            results["transformers"].append(json.loads(line))
            print(line, end="", flush=True)
            write(results, path)
    if process.wait():
        results["transformers"].append({"reason": "out of time" if time.time() >= deadline else "its process failed"})
        write(results, path)
    timer.cancel()


def write(results: dict[str, Any], path: str | None) -> None:
    """JSON and a page; PATH without a suffix, None: nothing."""
    if path is not None:
        file = Path(path) / f"benchmark_{device_name(results['model'])}_{device_name(results['device'])}"
        write_results(file, results, markdown(results))


def markdown(results: dict[str, Any]) -> str:
    """The results as a page."""
    named = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    ceilings = results["ceilings"]
    theirs = {(row.get("batch"), row.get("context")): row for row in results.get("transformers", [])}
    lines = [
        f"# Decoding and prefill of a random {results['model']} model",
        "",
        f"{results['date']}, {results['device']}. {named}. Measured: copy {ceilings['copy'] / 1e9:.0f} GB/s, "
        f"product {ceilings['product'] / 1e12:.1f} TFLOP/s.",
        "",
        "The limit is the time to move all weights but the embedding table, and all keys and values, at the copy rate.",
        "",
        "| batch | context | step, ms | tokens/s | of the limit | cache filled by | transformers, ms | ratio |",
        "|--:|--:|--:|--:|--:|---|--:|--:|",
    ]
    for row in results["decode"]:
        other = theirs.get((row["batch"], row["context"]), {})
        peer_ms, reason = other.get("step_ms"), other.get("reason", "not run")
        begin = f"| {row['batch']} | {row['context']} |"
        if "step_ms" not in row:
            lines.append(f"{begin} not run: {row['reason']} | | | | | |")
            continue
        ratio = "-" if peer_ms is None else f"{peer_ms / row['step_ms']:.2f}"
        lines.append(
            f"{begin} {row['step_ms']:.3f} | {row['tokens_per_second']:.1f} | {row['share_of_limit']:.1%} "
            f"| {row['filled_by']} | {reason if peer_ms is None else f'{peer_ms:.3f}'} | {ratio} |"
        )
    lines += ["", "| prompt | ms | tokens/s | TFLOP/s | of the product rate |", "|--:|--:|--:|--:|--:|"]
    for row in results["prefill"]:
        if "ms" not in row:
            lines.append(f"| {row['tokens']} | not run: {row['reason']} | | | |")
            continue
        rate = f"{row['flops'] / 1e12:.2f} | {row['share']:.1%}"
        lines.append(f"| {row['tokens']} | {row['ms']:.2f} | {row['tokens_per_second']:.0f} | {rate} |")
    return "\n".join([*lines, "", "Made by `python scripts/benchmark.py gpu --out docs/results`.", ""])


def main(arguments: Arguments) -> None:
    """Measures kvjax, then the peer, each in a process of its own."""
    begun = time.time()
    if arguments.tiny:
        arguments = dataclasses.replace(
            arguments, batches=(1, 2), contexts=(32, 64), prompts=(64,), steps=4, page=16, real=64
        )
    path = None if arguments.out is None else str(arguments.out)
    # Two thirds of the time, so that the peer has some.
    deadline = begun + arguments.limit_seconds * (2 / 3 if arguments.peer else 1)
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        results = pool.submit(measure, arguments, path, deadline).result()
    if arguments.peer:
        peer(arguments, results, path, begun + arguments.limit_seconds)
    Console(highlight=False, soft_wrap=True).print(markdown(results))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
