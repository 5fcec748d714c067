"""Draws how the KV cache of Llama-3.1-8B grows with context under several caches: docs/memory.png.

python scripts/memory_picture.py
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import matplotlib
import tyro

from kvjax import CacheConfig, ModelConfig, plan
from kvjax.choices import parse_codec, parse_policy

matplotlib.use("agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
CONTEXTS = [2**n for n in range(10, 21)]
CURVES = (
    ("as MHA (32 KV heads)", "full", "dense", 32),
    ("as trained (GQA, 8 KV heads)", "full", "dense", 8),
    ("int8", "full", "int8", 8),
    ("H2O(2048 + 2048)", "h2o:2048,2048", "dense", 8),
    ("StreamingLLM(4 + 2044)", "streaming_llm:4,2044", "dense", 8),
    ("StreamingLLM(4 + 2044), int8", "streaming_llm:4,2044", "int8", 8),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Where the shape comes from and the picture goes."""

    config: Path = ROOT / "configs" / "llama-3.1-8b.toml"
    output: Path = ROOT / "docs" / "memory.png"


def main(options: Options) -> None:
    """Draws the picture."""
    model = ModelConfig.from_toml(options.config)
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for label, policy, codec, kv_heads in CURVES:
        shape = dataclasses.replace(model, num_kv_heads=kv_heads)
        cache = CacheConfig(policy=parse_policy(policy), codec=parse_codec(codec))
        gigabytes = [plan(shape, cache, context, 1).total_bytes / 1e9 for context in CONTEXTS]
        axes.plot(CONTEXTS, gigabytes, marker=".", label=label)
    axes.axhline(64, color="grey", linestyle=":", linewidth=1)
    axes.text(CONTEXTS[0], 70, "what an 80 GB GPU leaves beside the bf16 weights", color="grey", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="tokens of context, one sequence", ylabel="GB of keys and values")
    axes.set_xscale("log", base=2)
    axes.set_title("Llama-3.1-8B, bf16: pages in use")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0, 0.8))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=110)
    print(options.output)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
