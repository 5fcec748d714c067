"""Changes a model's kind of attention, and tells layer by layer what that keeps and saves.

python scripts/convert.py models/demo runs/demo_mqa --to gqa --kv-heads 1 --method svd --text FILES...
python scripts/convert.py models/demo runs/demo_mla --to mla --kv-lora-rank 64 --rope-head-dim 64 --text FILES...
python scripts/convert.py models/demo runs/demo_cla --to cla --share 2
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import kvjax
from kvjax.convert import Report, cla, gqa, mla
from kvjax.errors import ConfigError, KvjaxError


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What is converted to what.

    Attributes:
      model: a Hugging Face directory or a kvjax checkpoint.
      out: the directory to write.
      to: gqa: fewer key-value heads; mla: DeepSeek's latent attention; cla: layers that share keys and values.
      kv_heads, method: of gqa; method "mean" averages weights, "svd" keeps the strongest directions.
      kv_lora_rank, rope_head_dim, freq_fold: of mla (`kvjax.convert.to_mla`).
      share: of cla, layers per set of keys and values.
      text: files by which directions are chosen and losses are measured; none: directions from the weights alone.
      rows, length: so many windows of so many tokens are taken of the text, evenly spread.
      format: of what is written; safetensors is a Hugging Face directory, which svd and cla have none of. None:
        safetensors where there is one.
      dtype: to convert in; None: bfloat16 on an accelerator, float32 on a CPU. Written is the checkpoint's own.
    """

    model: Annotated[Path, tyro.conf.Positional]
    out: Annotated[Path, tyro.conf.Positional]
    to: Literal["gqa", "mla", "cla"]
    kv_heads: int = 1
    method: Literal["mean", "svd"] = "mean"
    kv_lora_rank: int | None = None
    rope_head_dim: int | None = None
    freq_fold: int | None = None
    share: int = 2
    text: tuple[Path, ...] = ()
    rows: int = 128
    length: int = 256
    format: Literal["orbax", "safetensors"] | None = None
    dtype: str | None = None


def main(arguments: Arguments) -> None:
    """Converts, prints the table and writes the directory."""
    console = Console()
    model = kvjax.load(arguments.model, dtype=arguments.dtype)
    text = calibration(model, arguments)
    if arguments.to == "gqa":
        after, report = gqa.convert(model, arguments.kv_heads, arguments.method, text)
    elif arguments.to == "cla":
        after, report = cla.convert(model, arguments.share, text)
    elif arguments.kv_lora_rank is None or arguments.rope_head_dim is None:
        raise ConfigError("--to mla needs --kv-lora-rank and --rope-head-dim; a token takes their sum a layer")
    else:
        after, report = mla.convert(model, arguments.kv_lora_rank, arguments.rope_head_dim, text, arguments.freq_fold)
    console.print(table_of(report))
    if report.loss_before is not None:
        console.print(f"nats per token on the text: {report.loss_before:.4f} before, {report.loss_after:.4f} after")
    unsaid = after.config.owners or after.config.merged_keys
    form = arguments.format or ("orbax" if unsaid else "safetensors")
    kvjax.save(as_stored(after), arguments.out, form)
    console.print(f"{arguments.out}: {report.conversion}, as {form}")


def as_stored(model: kvjax.Model) -> kvjax.Model:
    """Weights in the dtype that the checkpoint had."""

    def cast(x: jax.Array) -> jax.Array:
        return x.astype(model.config.dtype) if x.dtype == model.dtype else x

    return dataclasses.replace(model, params=jax.tree.map(cast, model.params))


def calibration(model: kvjax.Model, arguments: Arguments) -> np.ndarray | None:
    """Windows of the text files, by the model's tokenizer: int32[rows, length]."""
    if not arguments.text:
        return None
    if model.tokenizer is None:
        raise ConfigError(f"{arguments.model} has no tokenizer to read --text with; leave --text out")
    if arguments.rows < 1 or arguments.length < 2:
        raise ConfigError(f"--rows must be at least 1 and --length 2, got {arguments.rows} and {arguments.length}")
    try:
        texts = [path.read_text(encoding="utf-8") for path in arguments.text]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read --text: {error}; give text files in UTF-8") from error
    tokens = np.concatenate([np.array(model.tokenizer.encode(text).ids, np.int32) for text in texts])
    windows = len(tokens) // arguments.length
    if not windows:
        raise ConfigError(
            f"--text holds {len(tokens)} tokens, less than one window of {arguments.length}; give more, or a smaller "
            "--length"
        )
    chosen = np.unique(np.linspace(0, windows - 1, min(arguments.rows, windows)).astype(int))
    return np.stack([tokens[window * arguments.length :][: arguments.length] for window in chosen])


def table_of(report: Report) -> Table:
    """Layer by layer: energy kept, and bytes per token before and after."""
    table = Table("layer", "keys kept", "values kept", "keys turned", "bytes", "after", title=report.conversion)
    for each in report.layers:
        shares = (f"{share:.1%}" for share in (each.keys, each.values, each.rope))
        table.add_row(str(each.layer), *shares, f"{each.bytes_before:,}", f"{each.bytes_after:,}")
    table.add_section()
    table.add_row("all", "", "", "", f"{report.bytes_before:,}", f"{report.bytes_after:,}")
    for column in table.columns:
        column.justify = "right"
    return table


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments))
    except KvjaxError as error:
        raise SystemExit(f"error: {error}") from None
