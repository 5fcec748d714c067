"""Continues prompts from the command line, streaming the text, and tells what the cache cost.

python scripts/generate.py --demo
python scripts/generate.py models/demo --prompt "def main(" --policy streaming_llm:4,252 --codec int8
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

import kvjax
from kvjax.choices import parse_codec, parse_policy

DEMO_MODEL = Path(__file__).resolve().parent.parent / "models" / "demo"
DEMO_PROMPT = '''import os


class Cache:
    """Keeps the most recently used values."""

    def __init__(self, maxsize=128):
        self.maxsize = maxsize
        self.data = {}

    def get(self, key, default=None):
'''


@dataclasses.dataclass(frozen=True)
class Options:
    """What to continue, and how.

    Attributes:
      model: a Hugging Face directory or a kvjax checkpoint.
      prompt: the text to continue; "-" reads standard input.
      chat: the prompt is a user's message: it is put into the model's chat template.
      demo: complete a piece of Python with the repository's own model, under three caches.
      tokens: how many tokens to generate at most.
      policy, codec: how the cache is kept, e.g. full, sliding_window:256, streaming_llm:4,252, h2o:64,64; dense, int8.
      page_size, num_pages: of the cache; left out: what fits the call.
      temperature, top_k, top_p, min_p, repetition_penalty, seed: how tokens are drawn.
      stop: strings that end the text.
      compilation_cache: keep compiled programs on disk, so that the next start is quick.
    """

    model: Annotated[Path | None, tyro.conf.Positional] = None
    prompt: str = DEMO_PROMPT
    chat: bool = False
    demo: bool = False
    tokens: int = 200
    policy: str = "full"
    codec: str = "dense"
    page_size: int | None = None
    num_pages: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    compilation_cache: bool = True


def main(options: Options) -> int:
    """Runs the command; returns the exit status."""
    console = Console(highlight=False)
    if options.compilation_cache:
        kvjax.enable_compilation_cache()
    try:
        if options.demo:
            run_demo(options, console)
        else:
            run_one(options, console)
    except kvjax.errors.KvjaxError as error:
        Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]: {error}", markup=True, highlight=False)
        return 1
    return 0


def run_one(options: Options, console: Console) -> None:
    """One prompt under one cache."""
    if options.model is None:
        raise kvjax.errors.RequestError("give the directory of a model, or --demo")
    model = kvjax.load(options.model)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    config = kvjax.CacheConfig(
        policy=parse_policy(options.policy),
        codec=parse_codec(options.codec),
        page_size=options.page_size,
        num_pages=options.num_pages,
    )
    tokens = kvjax.chat_prompt(model, [{"role": "user", "content": prompt}]) if options.chat else prompt
    console.print(prompt, style="dim", end="\n" if options.chat else "", markup=False)
    out = stream_text(model, tokens, options, config, console)
    console.print(stats_table({f"{options.policy}, {options.codec}": out}))


def run_demo(options: Options, console: Console) -> None:
    """The repository's model on one prompt under three caches, side by side."""
    model = kvjax.load(options.model or DEMO_MODEL)
    caches = {
        "full": kvjax.CacheConfig(),
        "sliding_window:128": kvjax.CacheConfig(policy=kvjax.policies.SlidingWindow(128)),
        "full, int8": kvjax.CacheConfig(codec=kvjax.codecs.Int8()),
    }
    c = model.config
    console.print(
        f"[bold]kvjax demo[/]: {model.num_parameters / 1e6:.1f} M parameters, {c.num_layers} layers, "
        f"{c.num_heads} query and {c.num_kv_heads} KV heads ({c.attention_kind}), {model.dtype.name}"
    )
    context = len(model.tokenizer.encode(options.prompt).ids) + options.tokens
    outputs = {}
    for name, config in caches.items():
        console.rule(f"[bold]{name}")
        # Compiling is left out of the table: it shows what a second request of this size takes.
        first = kvjax.generate(model, [options.prompt], 3, config, sampling_of(options), context=context)
        console.print(f"[dim]{first.stats.compiles} programs compiled or fetched[/]")
        console.print(options.prompt, style="dim", end="", markup=False)
        outputs[name] = stream_text(model, options.prompt, options, config, console)
    console.rule("[bold]what each cache cost")
    console.print(stats_table(outputs))


def sampling_of(options: Options) -> kvjax.Sampling:
    """The sampling settings of the command line."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop")
    return kvjax.Sampling(**{name: getattr(options, name) for name in names})


def stream_text(
    model: kvjax.Model, prompt: str | list[int], options: Options, config: kvjax.CacheConfig, console: Console
) -> kvjax.GenerateOutput:
    """Writes the continuation of a prompt as it comes."""
    stream = kvjax.stream(
        model,
        prompt,
        options.tokens,
        cache=config,
        sampling=sampling_of(options),
        seed=options.seed,
        block_steps=16,
    )
    for piece in stream:
        console.print(piece if isinstance(piece, str) else f"{piece} ", end="", markup=False, soft_wrap=True)
    console.print()
    assert stream.output is not None
    return stream.output


def stats_table(outputs: dict[str, kvjax.GenerateOutput]) -> Table:
    """What each cache cost, a column each."""
    table = Table()
    table.add_column("")
    for name in outputs:
        table.add_column(name, justify="right")
    rows = {
        "tokens per second": lambda s: f"{s.tokens_per_second:.0f}",
        "prefill seconds": lambda s: f"{s.prefill_seconds:.3f}",
        "decode seconds": lambda s: f"{s.decode_seconds:.3f}",
        "KV bytes per token": lambda s: f"{s.kv_bytes_per_token:,}",
        "pages used, of": lambda s: f"{s.peak_pages} / {s.pages_total}",
        "pool bytes": lambda s: f"{s.pool_bytes:,}",
    }
    for label, show in rows.items():
        table.add_row(label, *(show(out.stats) for out in outputs.values()))
    first = next(iter(outputs.values())).tokens[0]
    table.add_row("tokens as the first", *(_agreement(first, out.tokens[0]) for out in outputs.values()))
    return table


def _agreement(first: list[int], other: list[int]) -> str:
    same = next((i for i, (a, b) in enumerate(zip(first, other, strict=False)) if a != b), min(len(first), len(other)))
    return f"first {same}"


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
