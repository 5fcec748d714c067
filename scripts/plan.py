"""What a cache costs: bytes per token, gigabytes at each context, tokens that fit.

python scripts/plan.py configs/llama-2-13b.toml --context 10000 100000 500000 1000000
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from kvjax import CacheConfig, KVSpec, ModelConfig
from kvjax.choices import parse_codec, parse_policy
from kvjax.errors import ConfigError, KvjaxError
from kvjax.plan import attention_kinds, plan, read_shape

GB = 10**9


@dataclasses.dataclass
class Arguments:
    """The cost of a KV cache, before it is built."""

    config: tyro.conf.Positional[Path]
    """TOML file with a [model] table, or a [kv] table for models that can only be planned for."""
    context: tuple[int, ...] = (4096, 32768, 131072)
    """Tokens per sequence, prompt and generated together."""
    batch: int = 1
    """Sequences."""
    policy: str = "full"
    """What is kept, e.g. sliding_window:1024, streaming_llm:4,1020, tova:512, h2o:heavy=256,recent=256."""
    codec: str = "dense"
    """How a vector becomes bytes, e.g. int8, dense:float32."""
    page_size: int | None = None
    """Slots per page."""
    dtype: str | None = None
    """Of the model's keys and values; None: the config's own, bfloat16 for a [kv] table."""
    memory_gb: tuple[float, ...] = (16.0, 24.0, 80.0)
    """Memory to fill; a GB is 10^9 bytes."""
    formulas: bool = False
    """Also print the elements per token of this shape under MHA, GQA, MQA and MLA."""
    heads: int | None = None
    """With --formulas: query heads. None: the model's own; a [kv] table does not know."""
    head_dim: int = 128
    """With --formulas and a [kv] table: width of a head."""
    groups: int | None = None
    """With --formulas: KV heads of GQA. None: the model's own, 8 for a model without groups."""


def main(arguments: Arguments) -> None:
    """Prints the tables."""
    console = Console()
    shape = read_shape(arguments.config)
    cache = CacheConfig(
        page_size=arguments.page_size,
        policy=parse_policy(arguments.policy),
        codec=parse_codec(arguments.codec),
    )
    plans = [plan(shape, cache, context, arguments.batch, arguments.dtype) for context in arguments.context]
    one = plans[0]
    console.print(f"{arguments.config.stem}: {cache.policy!r}, {cache.codec!r}, batch {arguments.batch}")
    console.print(f"elements per token: {one.elements_per_token:,}")
    console.print(f"bytes per token: {one.bytes_per_token:,}")
    if one.context_bytes_per_token:
        console.print(f"bytes per token of encoded context: {one.context_bytes_per_token:,}")

    table = Table(
        "tokens", "GB", "GB allocated", "pages", title="keys and values in use, and the pool a call allocates"
    )
    for each in plans:
        pages = f"{sum(each.pages):,}"
        table.add_row(f"{each.context:,}", gigabytes(each.total_bytes), gigabytes(each.pool_bytes), pages)
    console.print(justified(table))

    table = Table("GB", "tokens per sequence", title="what fits")
    for memory in arguments.memory_gb:
        fits = one.tokens_that_fit(int(memory * GB))
        table.add_row(f"{memory:g}", "any number" if isinstance(fits, float) else f"{fits:,}")
    console.print(justified(table))

    if arguments.formulas:
        table = Table("attention", "elements per token", "bytes per token", title="the same shape under each attention")
        for name, spec in kinds(shape, arguments).items():
            held = plan(spec, cache, dtype=arguments.dtype or getattr(shape, "dtype", None))
            table.add_row(name, f"{spec.elements_per_token:,}", f"{held.bytes_per_token:,}")
        console.print(justified(table))


def kinds(shape: ModelConfig | KVSpec, arguments: Arguments) -> dict[str, KVSpec]:
    """The shape under each kind of attention, labelled with its formula."""
    groups = arguments.groups or 8
    if isinstance(shape, ModelConfig):
        layers, heads, width = shape.num_layers, arguments.heads or shape.num_heads, shape.width
        groups = arguments.groups or (shape.num_kv_heads if shape.attention_kind == "GQA" else groups)
    elif arguments.heads:
        layers, heads, width = shape.layers, arguments.heads, arguments.head_dim
    else:
        raise ConfigError("--formulas of a [kv] table needs the number of query heads; give --heads")
    formulas = {"MHA": "2 n_h d_h l", "GQA": "2 n_g d_h l", "MQA": "2 d_h l", "MLA": "(d_c + d_h^R) l"}
    specs = attention_kinds(layers, heads, width, groups)
    return {f"{name}  {formulas[name]}  ({spec.kv_heads} x {spec.key_dim})": spec for name, spec in specs.items()}


def gigabytes(count: int) -> str:
    """Bytes as GB, to at least three significant digits."""
    value = count / GB
    return f"{value:,.{3 if value < 1 else 2 if value < 10 else 1}f}"


def justified(table: Table) -> Table:
    """Numbers to the right."""
    for column in table.columns[1:]:
        column.justify = "right"
    return table


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments))
    except KvjaxError as error:
        raise SystemExit(f"error: {error}") from None
