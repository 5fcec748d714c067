"""Prefill and decode against `transformers` on the same weights, and decode time against the size of the pool.

    python scripts/benchmark.py cpu --out docs/results/benchmark_cpu

Both libraries run in one process and take turns, so that whatever else the machine does meets both alike; ratios are
taken turn by turn, and the medians reported.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
import tyro
from rich.console import Console

import kvjax
from kvjax.errors import KvjaxError
from pallas_kernels.checks.files import write_results


@dataclasses.dataclass
class Arguments:
    """What is measured."""

    hidden: int = 512
    """Width of the model."""
    layers: int = 8
    heads: int = 8
    """Query heads."""
    kv_heads: int = 4
    vocab: int = 4096
    prompt: int = 256
    """Tokens of each prompt."""
    new: int = 65
    """Tokens generated for each prompt; the first comes from the prompt itself."""
    batches: tuple[int, ...] = (1, 8)
    rounds: int = 7
    """Turns of each library, after one that is not counted."""
    pools: tuple[int, int] = (128, 4096)
    """Pages of the small and the large pool."""
    out: Path | None = None
    """Writes OUT.json and OUT.md."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """One generation: seconds for the prompts, seconds per decoding step, and the tokens."""

    prefill: float
    step: float
    tokens: list[list[int]]


def config_of(arguments: Arguments) -> kvjax.ModelConfig:
    """A Llama of the size asked for, that never ends a text."""
    return kvjax.ModelConfig(
        vocab_size=arguments.vocab,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 11 // 4,
        num_layers=arguments.layers,
        num_heads=arguments.heads,
        num_kv_heads=arguments.kv_heads,
        max_position_embeddings=8192,
    )


def ours(model: kvjax.Model, prompts: list[list[int]], new: int, cache: kvjax.CacheConfig) -> Turn:
    """One turn of kvjax."""
    out = kvjax.generate(model, prompts, max_new_tokens=new, cache=cache)
    return Turn(out.stats.prefill_seconds, out.stats.decode_seconds / (new - 1), out.tokens)


def theirs(model: Any, prompts: list[list[int]], new: int) -> Turn:
    """One turn of transformers: a call for one token is the prefill, what a longer one takes beyond it the decoding."""
    tokens = torch.tensor(prompts)

    def call(count: int) -> tuple[float, list[list[int]]]:
        begun = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False, pad_token_id=0
            )
        return time.perf_counter() - begun, out[:, tokens.shape[1] :].tolist()

    first, _ = call(1)
    whole, generated = call(new)
    return Turn(first, (whole - first) / (new - 1), generated)


def take_turns(one: Callable[[], Turn], other: Callable[[], Turn], rounds: int) -> tuple[list[Turn], list[Turn]]:
    """A B A B ..., after one uncounted turn of each, which compiles."""
    one(), other()
    pairs = [(one(), other()) for _ in range(rounds)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def compare(kind: str, one: list[Turn], other: list[Turn]) -> dict[str, float]:
    """Medians of both, in milliseconds, and of `one / other` turn by turn."""
    first, second = ([getattr(turn, kind) for turn in turns] for turns in (one, other))
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    return {
        "first_ms": 1e3 * statistics.median(first),
        "second_ms": 1e3 * statistics.median(second),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }


def against_transformers(arguments: Arguments, model: kvjax.Model, rng: np.random.Generator) -> list[dict[str, Any]]:
    """transformers over kvjax, in time, at each batch size."""
    with tempfile.TemporaryDirectory() as folder:
        kvjax.save(model, folder, format="safetensors")
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    peer.generation_config.eos_token_id = None
    rows = []
    for batch in arguments.batches:
        prompts = rng.integers(0, arguments.vocab, (batch, arguments.prompt)).tolist()
        slow, fast = take_turns(
            functools.partial(theirs, peer, prompts, arguments.new),
            functools.partial(ours, model, prompts, arguments.new, kvjax.CacheConfig()),
            arguments.rounds,
        )
        same = np.mean(np.array(slow[0].tokens) == np.array(fast[0].tokens))
        row = {"batch": batch, "equal_tokens": float(same)}
        rows.append({**row, **{kind: compare(kind, slow, fast) for kind in ("prefill", "step")}})
    return rows


def against_pool(arguments: Arguments, model: kvjax.Model, rng: np.random.Generator) -> dict[str, Any]:
    """A decoding step with the large pool over one with the small pool."""
    prompts = rng.integers(0, arguments.vocab, (1, arguments.prompt)).tolist()
    small, large = (
        functools.partial(ours, model, prompts, arguments.new, kvjax.CacheConfig(num_pages=pages))
        for pages in arguments.pools
    )
    wide, narrow = take_turns(large, small, arguments.rounds)
    return {"pages": list(arguments.pools), "step": compare("step", wide, narrow)}


def machine() -> dict[str, Any]:
    """What ran, on what, when."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    libraries = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "processor": names[0] if names else platform.machine(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": jax.devices()[0].device_kind,
        "load_before": os.getloadavg()[0],
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in libraries},
    }


def markdown(results: dict[str, Any]) -> str:
    """The results as a page."""
    about, shape = results["machine"], results["arguments"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        "# Against transformers, and against the size of the pool",
        "",
        f"float32, hidden {shape['hidden']}, {shape['layers']} layers, {shape['heads']} query and {shape['kv_heads']}"
        f" KV heads, vocabulary {shape['vocab']}; prompts of {shape['prompt']} tokens, {shape['new']} generated,"
        f" greedy, the same random weights in both. Medians of {shape['rounds']} alternating turns in one process;"
        " ratios turn by turn, lowest and highest in brackets.",
        "",
        f"{about['date']}, {about['processor']}, {about['cores']} cores, {about['platform']}, load before the run"
        f" {about['load_before']:.1f}. Python {about['python']}, {versions}.",
        "",
        "| batch | part | transformers | kvjax | transformers / kvjax |",
        "|--:|---|--:|--:|--:|",
    ]
    parts = {"prefill": "prefill, ms", "step": "decoding step, ms"}
    for row in results["transformers"]:
        for kind, label in parts.items():
            lines.append(f"| {row['batch']} | {label} | {columns(row[kind])} |")
    equal = min(row["equal_tokens"] for row in results["transformers"])
    small, large = results["pool"]["pages"]
    lines += [
        "",
        f"{equal:.1%} of the generated tokens are equal (random weights make near-ties, which rounding decides).",
        "",
        f"| batch | part | {large} pages | {small} pages | ratio |",
        "|--:|---|--:|--:|--:|",
        f"| 1 | decoding step, ms | {columns(results['pool']['step'])} |",
        "",
        "Made by `python scripts/benchmark.py --out docs/results/benchmark_cpu`.",
        "",
    ]
    return "\n".join(lines)


def columns(row: dict[str, float]) -> str:
    """Two times and their ratio, as cells of a table."""
    spread = f"{row['ratio']:.2f} ({row['ratio_low']:.2f}-{row['ratio_high']:.2f})"
    return f"{row['first_ms']:.2f} | {row['second_ms']:.2f} | {spread}"


def main(arguments: Arguments) -> None:
    """Measures, prints and writes."""
    rng = np.random.default_rng(0)
    about = machine()
    model = kvjax.init(config_of(arguments))
    results = {
        "machine": about,
        "arguments": {key: value for key, value in dataclasses.asdict(arguments).items() if key != "out"},
        "transformers": against_transformers(arguments, model, rng),
        "pool": against_pool(arguments, model, rng),
    }
    Console().print(markdown(results), highlight=False, soft_wrap=True)
    if arguments.out is not None:
        write_results(arguments.out, results, markdown(results))


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments))
    except KvjaxError as error:
        raise SystemExit(f"error: {error}") from None
