"""What each cache holds of a long prompt and ever after, and whether its steps stay as quick as they were.

    python scripts/benchmark_methods.py --out docs/results/methods_cpu

Random weights: bytes and times do not depend on what a model knows. Budgets are a tenth of the context.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

import kvjax
from kvjax import CacheConfig, codecs, policies
from kvjax.attention.paged import PagedAttend
from kvjax.cache.state import Cache
from kvjax.errors import KvjaxError
from kvjax.evaluate.machine import about_machine, machine_line
from kvjax.generate import prefill
from pallas_kernels.checks.files import write_results


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What is measured.

    Attributes:
      hidden, layers, heads, kv_heads: the model, a Llama of random weights.
      context: tokens that a sequence grows to.
      share: a policy's budget, of the context.
      steps: decoding steps in each stretch that is timed, rounds: pairs of stretches.
      speed: also time decoding; else only memory.
      out: writes OUT.json and OUT.md.
    """

    hidden: int = 512
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    context: int = 4096
    share: float = 0.1
    steps: int = 100
    rounds: int = 7
    speed: bool = True
    out: Path | None = None


def config_of(arguments: Arguments) -> kvjax.ModelConfig:
    """A Llama that never ends a text."""
    return kvjax.ModelConfig(
        vocab_size=512,
        hidden_size=arguments.hidden,
        intermediate_size=2 * arguments.hidden,
        num_layers=arguments.layers,
        num_heads=arguments.heads,
        num_kv_heads=arguments.kv_heads,
        max_position_embeddings=2 * arguments.context,
    )


def evicting(budget: int) -> dict[str, CacheConfig]:
    """Policies that hold `budget` tokens, by name."""
    half = budget // 2
    kinds: tuple[Any, ...] = (
        policies.SlidingWindow(budget),
        policies.StreamingLLM(4, budget - 4),
        policies.LMInfinite(4, budget - 4),
        policies.TOVA(budget),
        policies.H2O(half, half),
        policies.Scissorhands(budget, half),
    )
    return {type(kind).__name__: CacheConfig(policy=kind) for kind in kinds}


def choosing(budget: int) -> dict[str, CacheConfig]:
    """Policies that keep `budget` tokens of a prompt and all that follow."""
    kinds: tuple[Any, ...] = (policies.SnapKV(budget), policies.PyramidKV(budget))
    return {type(kind).__name__: CacheConfig(policy=kind) for kind in kinds}


def coding() -> dict[str, CacheConfig]:
    """Codecs, of a bfloat16 model."""
    kinds: dict[str, Any] = {
        "bfloat16": codecs.Dense(),
        "Int8": codecs.Int8(),
        "FP8": codecs.FP8(),
        "Int4": codecs.Int4(),
        "KIVI, 4 bits": codecs.KIVI(4),
        "KIVI, 2 bits": codecs.KIVI(2),
    }
    return {name: CacheConfig(codec=codec) for name, codec in kinds.items()}


def held_bytes(cache: Cache) -> int:
    """Bytes of the pages in use, and of what lies beside pages."""
    total = 0
    for group in cache.groups:
        beside = sum(leaf.nbytes for leaf in jax.tree.leaves(group.tail))
        total += beside + (group.pool_bytes - beside) * int(group.used) // group.num_pages
    return total


def scratch_bytes(model: kvjax.Model, cache: Cache, tokens: int) -> int:
    """What the program that takes in a prompt works on beside weights and pools, hidden states between layers included.

    As the compiler accounts for it: temporaries of one layer, or of one chunk through all layers.
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (model.params, cache))
    params, abstract = shapes
    chunk, batch = prefill.default_chunk(), cache.batch
    count = jax.ShapeDtypeStruct((batch,), np.int32)
    if not prefill.by_layer(cache):
        last = jax.ShapeDtypeStruct((batch, model.config.hidden_size), model.dtype)
        given = jax.ShapeDtypeStruct((batch, chunk), np.int32)
        attend = PagedAttend(prompt=True)
        lowered = prefill.prefill_chunk.lower(params, abstract, last, given, count, config=model.config, attend=attend)
        return temporaries_of(lowered)
    width = -(-tokens // chunk) * chunk
    hidden: Any = jax.ShapeDtypeStruct((batch, width, model.config.hidden_size), model.dtype)
    order: Any = jax.ShapeDtypeStruct((batch, width), np.int32)
    lowered = prefill.prefill_segment.lower(
        (params["layers_0"],),
        abstract,
        prefill.Prompt(hidden, order),
        count,
        jax.ShapeDtypeStruct((1,), np.int32),
        config=model.config,
        places=(prefill.Place(model.config.kind(0), 0, 0),),
        chunk=chunk,
        backend=None,
    )
    return temporaries_of(lowered) + int(np.prod(hidden.shape)) * model.dtype.itemsize


def temporaries_of(lowered: Any) -> int:
    """Bytes, as the compiler accounts for them."""
    return int(lowered.compile().memory_analysis().temp_size_in_bytes)


def memory_of(model: kvjax.Model, cache: CacheConfig, tokens: int) -> dict[str, Any]:
    """What is held after a prompt of `tokens` and after 64 more, and the most in between, all layers together."""
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, tokens - 64).tolist()
    state = kvjax.prefill(model, [prompt], cache, room=64)
    after_prompt = held_bytes(state.cache)
    scratch = scratch_bytes(model, state.cache, tokens)
    _, state = kvjax.extend(model, state, max_new_tokens=64)
    share = [int(group.peak) / max(int(group.used), 1) for group in state.cache.groups]
    return {
        "after_prompt": after_prompt,
        "after_64_more": held_bytes(state.cache),
        "most": round(held_bytes(state.cache) * max(share)),
        "scratch": scratch,
    }


def speed_of(model: kvjax.Model, cache: CacheConfig, budget: int, arguments: Arguments) -> dict[str, Any]:
    """Milliseconds a step just after the budget is full and at the end of the context, and programs compiled then.

    Two sequences take turns, so that whatever else the machine does slows both.
    """
    steps, rounds = arguments.steps, arguments.rounds
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, budget + 1).tolist()

    def begun() -> kvjax.State:
        state = kvjax.prefill(model, [prompt], cache, room=arguments.context)
        return kvjax.extend(model, state, max_new_tokens=steps)[1]

    states, compiles = {"early": begun(), "late": begun()}, 0
    times: dict[str, list[float]] = {"early": [], "late": []}
    left = arguments.context - len(states["late"].tokens[0]) - rounds * steps
    while left > 0:
        _, states["late"] = kvjax.extend(model, states["late"], max_new_tokens=min(left, steps))
        left -= steps
    for _ in range(rounds):
        for which in states:
            out, states[which] = kvjax.extend(model, states[which], max_new_tokens=steps)
            times[which].append(1e3 * out.stats.decode_seconds / steps)
            compiles += out.stats.compiles
    ratios = sorted(late / early for early, late in zip(times["early"], times["late"], strict=True))
    return {
        "early_ms": statistics.median(times["early"]),
        "late_ms": statistics.median(times["late"]),
        "ratio": statistics.median(ratios),
        "least_ratio": ratios[0],
        "greatest_ratio": ratios[-1],
        "compiles": compiles,
    }


def measure(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Everything, as plain values."""
    model = kvjax.init(config_of(arguments))
    tokens, budget = arguments.context, int(arguments.share * arguments.context)
    full = {"Full": CacheConfig()}

    def all_of(what: str, caches: dict[str, CacheConfig], one: Any) -> dict[str, Any]:
        return {name: one(cache) for name, cache in track(caches.items(), description=what, console=console)}

    half = kvjax.init(config_of(arguments), dtype="bfloat16")
    results: dict[str, Any] = {
        "budget": budget,
        "policies": all_of(
            "memory of policies",
            full | evicting(budget) | choosing(budget),
            lambda cache: memory_of(model, cache, tokens),
        ),
        "codecs": all_of("memory of codecs", coding(), lambda cache: memory_of(half, cache, tokens)),
    }
    if arguments.speed:
        results["speed"] = all_of(
            "speed", full | evicting(budget), lambda cache: speed_of(model, cache, budget, arguments)
        )
    return results


def markdown(results: dict[str, Any]) -> str:
    """The results as a page."""
    shape, budget = results["arguments"], results["budget"]
    lines = [
        "# What each cache holds, and how its steps age",
        "",
        f"A Llama of random float32 weights: hidden {shape['hidden']}, {shape['layers']} layers, {shape['heads']} "
        f"query and {shape['kv_heads']} KV heads. One sequence of {shape['context']} tokens, the last 64 of them "
        "generated.",
        "",
        f"{machine_line(results['machine'])} Made by `python scripts/benchmark_methods.py "
        "--out docs/results/methods_cpu`.",
        "",
        f"## Policies with room for {budget} tokens, a share of {shape['share']:.0%}",
        "",
        "Bytes of the pages in use, read from the live cache. Scratch is what taking in the prompt needs beside "
        "weights and pools, and gives back: one layer's prompt and the hidden states where a policy looks at "
        "attention, else a chunk.",
        "",
        *memory_table(results["policies"], "Full"),
        "",
        "## Codecs",
        "",
        "The same model in bfloat16. Scales and exact residuals included.",
        "",
        *memory_table(results["codecs"], "bfloat16"),
    ]
    if "speed" in results:
        steps, rounds = shape["steps"], shape["rounds"]
        lines += [
            "",
            "## Steps when the budget has just filled, and at the end of the context",
            "",
            f"Medians of {rounds} stretches of {steps} steps each, of two sequences that take turns; in brackets the "
            "least and the greatest ratio of two neighbouring stretches. Full grows, and is there to compare with.",
            "",
            "| policy | first, ms | last, ms | last / first | programs compiled meanwhile |",
            "|---|--:|--:|--:|--:|",
        ]
        for name, row in results["speed"].items():
            ratio = f"{row['ratio']:.2f} ({row['least_ratio']:.2f} to {row['greatest_ratio']:.2f})"
            lines.append(f"| {name} | {row['early_ms']:.2f} | {row['late_ms']:.2f} | {ratio} | {row['compiles']} |")
    return "\n".join([*lines, ""])


def memory_table(rows: dict[str, dict[str, int]], whole: str) -> Sequence[str]:
    """kB of each row, and its share of the row called `whole`."""
    reference = rows[whole]["after_64_more"]
    lines = [
        "| cache | after the prompt, kB | after 64 more | most at once | share | scratch |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        cells = [f"{row[key] / 1000:,.0f}" for key in ("after_prompt", "after_64_more", "most")]
        share = f"{row['most'] / reference:.1%}"
        lines.append(f"| {name} | {' | '.join(cells)} | {share} | {row['scratch'] / 1000:,.0f} |")
    return lines


def main(arguments: Arguments) -> None:
    """Measures, prints and writes."""
    about = about_machine()
    given = {key: value for key, value in dataclasses.asdict(arguments).items() if key != "out"}
    results = {"machine": about, "arguments": given, **measure(arguments, Console(stderr=True))}
    Console().print(markdown(results), highlight=False, soft_wrap=True)
    if arguments.out is not None:
        write_results(arguments.out, results, markdown(results))


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except KvjaxError as error:
        raise SystemExit(f"error: {error}") from None
