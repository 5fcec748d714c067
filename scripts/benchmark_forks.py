"""What it saves that copies of one prompt read the pages they have in common once.

    python scripts/benchmark_forks.py --out docs/results/forks_cpu

Random weights. Both ways take turns on the same prompts, whatever the sizes: `kvjax.attention.copies` chooses between
them by what is found here.
"""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

import kvjax
from kvjax.attention import copies as reading
from kvjax.errors import KvjaxError
from kvjax.evaluate.machine import about_machine, machine_line
from pallas_kernels.checks.files import write_results


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What is measured.

    Attributes:
      hidden, layers, heads, kv_heads: the model, a Llama of random weights.
      copies, prompts: numbers of copies, and tokens of the prompt they come of.
      steps: decoding steps in each stretch that is timed, rounds: pairs of stretches after one that is not counted.
      out: writes OUT.json and OUT.md.
    """

    hidden: int = 512
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    copies: tuple[int, ...] = (2, 4, 8, 16)
    prompts: tuple[int, ...] = (120, 500, 2000, 8000)
    steps: int = 48
    rounds: int = 5
    out: Path | None = None


def step_ms(model: kvjax.Model, prompt: list[int], copies: int, together: bool, steps: int) -> float:
    """Milliseconds a step of all copies."""
    state = kvjax.fork(kvjax.prefill(model, [prompt], room=steps), copies)
    state = state if together else dataclasses.replace(state, copies=1)
    sampling = kvjax.Sampling(temperature=1.0, seeds=tuple(range(copies)))
    out, _ = kvjax.extend(model, state, max_new_tokens=steps, sampling=sampling)
    return 1e3 * out.stats.decode_seconds / steps


def measure(arguments: Arguments, console: Console) -> dict[str, Any]:
    """Everything, as plain values."""
    about = about_machine()
    model = kvjax.init(
        kvjax.ModelConfig(
            vocab_size=512,
            hidden_size=arguments.hidden,
            intermediate_size=2 * arguments.hidden,
            num_layers=arguments.layers,
            num_heads=arguments.heads,
            num_kv_heads=arguments.kv_heads,
            max_position_embeddings=2 * max(arguments.prompts),
        )
    )
    # Sizes at which it does not pay are measured too.
    reading.LEAST_COPIES, reading.LEAST_SLOTS = 2, 0
    rows, sizes = [], [(copies, length) for copies in arguments.copies for length in arguments.prompts]
    for copies, length in track(sizes, "forks", console=console, transient=True):
        prompt = np.random.default_rng(length).integers(0, 512, length).tolist()
        times: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(arguments.rounds + 1):
            for together, held in times.items():
                taken = step_ms(model, prompt, copies, together, arguments.steps)
                if turn:
                    held.append(taken)
        ratios = sorted(alone / once for once, alone in zip(times[True], times[False], strict=True))
        rows.append(
            {
                "copies": copies,
                "prompt": length,
                "each_ms": statistics.median(times[False]),
                "once_ms": statistics.median(times[True]),
                "speedup": statistics.median(ratios),
                "least": ratios[0],
                "greatest": ratios[-1],
            }
        )
    settings = {name: value for name, value in dataclasses.asdict(arguments).items() if name != "out"}
    return {"machine": about, "settings": settings, "rows": rows}


def markdown(results: dict[str, Any]) -> str:
    """The page."""
    settings = results["settings"]
    lines = [
        "# Copies of one prompt: common pages read once, or by each",
        "",
        f"A Llama of random weights: hidden {settings['hidden']}, {settings['layers']} layers, {settings['heads']} "
        f"query and {settings['kv_heads']} KV heads. Milliseconds of a step of all copies, medians of "
        f"{settings['rounds']} turns; the quotient turn by turn, with the least and the greatest.",
        "",
        f"{machine_line(results['machine'])} Made by `python scripts/benchmark_forks.py --out docs/results/forks_cpu`.",
        "",
        "| copies | prompt | by each, ms | once, ms | quicker |",
        "|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['copies']} | {row['prompt']} | {row['each_ms']:.2f} | {row['once_ms']:.2f} "
        f"| {row['speedup']:.2f} ({row['least']:.2f}-{row['greatest']:.2f}) |"
        for row in results["rows"]
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Arguments) -> None:
    """Measures, prints, writes."""
    console = Console()
    results = measure(arguments, console)
    page = markdown(results)
    console.print(page, markup=False, highlight=False, soft_wrap=True)
    if arguments.out is not None:
        write_results(arguments.out, results, page)


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except KvjaxError as error:
        raise SystemExit(f"error: {error}") from None
