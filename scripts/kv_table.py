"""What a token costs in the live cache under each kind of attention, beside the published formula.

    python scripts/kv_table.py

One small shape under every kind: each model takes in a prompt, and what its pools hold of a token is read off them.
"""

from __future__ import annotations

import dataclasses

import jax
import tyro
from rich.console import Console

import kvjax
from kvjax.config import GoldFinch, Latent, ModelConfig

LAYERS, HEADS, WIDTH, GROUPS = 8, 8, 16, 2
HIDDEN = HEADS * WIDTH


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of attention.

    Attributes:
      name, formula: as the table says them.
      elements: of one token over all layers, by the formula.
      extra_bytes: of one token, of what is stored in a dtype of its own.
      config: the model.
    """

    name: str
    formula: str
    elements: int
    config: ModelConfig
    extra_bytes: int = 0


def model(kv_heads: int = GROUPS, **options: object) -> ModelConfig:
    """The small shape with as many KV heads, and whatever else makes the kind."""
    return ModelConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_layers=LAYERS,
        num_heads=HEADS,
        num_kv_heads=kv_heads,
        **options,  # type: ignore[arg-type]
    )


def kinds() -> list[Kind]:
    """Every kind, MHA first."""
    latent = Latent(4 * WIDTH, WIDTH, WIDTH // 2, WIDTH)
    encoder = dataclasses.replace(model(), num_layers=2, windows=())
    half = LAYERS // 2
    return [
        Kind("MHA", "2 n_h d_h l", 2 * HEADS * WIDTH * LAYERS, model(HEADS)),
        Kind("GQA, 2 groups", "2 n_g d_h l", 2 * GROUPS * WIDTH * LAYERS, model()),
        Kind("MQA", "2 d_h l", 2 * WIDTH * LAYERS, model(1)),
        Kind("MLA", "(d_c + d_R) l = 9/2 d_h l", 9 * WIDTH // 2 * LAYERS, model(latent=latent)),
        Kind(
            "CLA, 2 layers a pair, 2 groups",
            "2 n_g d_h l / 2",
            GROUPS * WIDTH * LAYERS,
            model(owners=tuple(layer // 2 * 2 for layer in range(LAYERS))),
        ),
        Kind(
            "YOCO, gated retention, 2 groups",
            "2 n_g d_h",
            2 * GROUPS * WIDTH,
            model(retention_layers=tuple(range(half)), cross_from=half),
        ),
        Kind(
            "GoldFinch",
            "d / 16, and a 4-byte id",
            HIDDEN // 16,
            model(HEADS, goldfinch=GoldFinch(lower_layers=half)),
            extra_bytes=4,
        ),
        Kind("CEPE, of a context token", "d_encoder", HIDDEN, model(encoder=encoder, context_chunk=16)),
    ]


def measured(kind: Kind) -> int:
    """Bytes of one token, from the shapes of the pools after a prompt."""
    built = kvjax.init(kind.config)
    if kind.config.encoder is None:
        groups = kvjax.prefill(built, [[1, 2, 3]]).cache.groups
    else:
        groups = kvjax.prefill(built, [[1, 2, 3]], contexts=[[[4, 5], [6]]]).cache.context
    total = 0
    for group in groups:
        slots = group.num_pages * group.layout.page_size
        # A page of a plain cache holds all layers of its tokens.
        total += sum(leaf.nbytes for leaf in jax.tree.leaves((group.k, group.v))) // slots
    return total


def main() -> None:
    """Prints the table; ends with status 1 where a pool and its formula disagree."""
    every = kinds()
    first = 4 * every[0].elements
    lines = ["| kind | elements of a token | bytes, formula | bytes, live pool | of MHA |", "|---|---|--:|--:|--:|"]
    agree = True
    for kind in every:
        expected, found = 4 * kind.elements + kind.extra_bytes, measured(kind)
        agree = agree and expected == found
        lines.append(f"| {kind.name} | {kind.formula} | {expected:,} | {found:,} | {found / first:.1%} |")
    Console(soft_wrap=True).print("\n".join(lines), highlight=False, markup=False)
    if not agree:
        raise SystemExit("error: a pool and its formula disagree")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
