"""The table of `scripts/recipe.py`: what each conversion saves, loses, and has after healing."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

from kvjax.train.recipe_file import SISTER, RecipeFile
from kvjax.train.recipe_work import OBJECTIVES, heal_name

Results = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Healed:
    """Losses after healing, one for each seed that is done."""

    losses: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        """Over seeds; None: none is done."""
        return statistics.fmean(self.losses) if self.losses else None

    @property
    def spread(self) -> float:
        """The greatest less the least."""
        return max(self.losses) - min(self.losses) if self.losses else 0.0


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; None: not done (yet), or there is nothing to do.

    Attributes:
      bytes: of a token in the cache. parameters: of the model. converted: nats per byte before any training.
      healed: by objective. scratch: of the same architecture from scratch.
      keys, values, rope: shares of energy that the conversion kept; rope: that RoPE still turns.
      speeds: prompt length -> tokens per second, and ratio to the sister's.
    """

    name: str
    bytes: int
    parameters: int
    converted: float
    healed: dict[str, Healed]
    scratch: float | None
    keys: float | None
    values: float | None
    rope: float | None
    speeds: dict[str, Mapping[str, float]]

    def gap(self, objective: str) -> float | None:
        """How much more than from scratch the healed model loses, as a share."""
        healed = self.healed[objective].mean
        return None if healed is None or self.scratch is None else healed / self.scratch - 1


def rows_of(file: RecipeFile, results: Results) -> list[Row]:
    """A row for the sister, and one for each conversion that is done."""
    found = []
    for conversion in (None, *file.conversions):
        name = SISTER if conversion is None else conversion.name
        piece = results.get("sister" if conversion is None else f"convert/{name}")
        if piece is None:
            continue
        same = SISTER if conversion is None else file.same_architecture(conversion)
        healed = {
            objective: Healed(
                tuple(
                    results[key]["loss"]
                    for seed in file.healing.seeds
                    if (key := heal_name(name, objective, seed)) in results
                )
            )
            for objective in OBJECTIVES
        }
        speeds = {length: by_name[name] for length, by_name in results.get("speed", {}).items() if length != "seconds"}
        found.append(
            Row(
                name,
                piece["bytes_per_token"],
                piece["parameters"],
                piece["loss"],
                healed,
                results.get(f"scratch/{same}", {}).get("loss"),
                piece.get("keys_kept"),
                piece.get("values_kept"),
                piece.get("rope_kept"),
                speeds,
            )
        )
    return found


def loss_table(rows: list[Row]) -> list[str]:
    """Markdown: bytes and losses."""
    lines = [
        "| | bytes of a token | weights | converted | healed, plain | healed, distilled | from scratch | healed, more "
        "than from scratch |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        healed = [_healed(row.healed[objective]) for objective in OBJECTIVES]
        gaps = ", ".join(_number(row.gap(objective), "+.1%") for objective in OBJECTIVES)
        cells = [f"{row.bytes:,}", f"{row.parameters:,}", f"{row.converted:.3f}", *healed, _number(row.scratch), gaps]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return lines


def kept_and_speed_table(rows: list[Row]) -> list[str]:
    """Markdown: energies that were kept, and decoding."""
    lengths = list(rows[0].speeds) if rows else []
    head = "".join(f" tokens/s after {length} | to the sister's |" for length in lengths)
    lines = [f"| | keys kept | values kept | keys turned |{head}", f"|---|--:|--:|--:|{'--:|--:|' * len(lengths)}"]
    for row in rows:
        cells = [_number(share, ".1%") for share in (row.keys, row.values, row.rope)]
        for length in lengths:
            speed = row.speeds[length]
            cells += [f"{speed['tokens_per_second']:,.0f}", f"{speed['ratio']:.2f}"]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return lines


def markdown(file: RecipeFile, results: Results, machine: str, command: str) -> str:
    """The page of results."""
    rows, healing, speed = rows_of(file, results), file.healing, file.speed
    pieces = sum(piece["seconds"] for piece in results.values())
    sizes = file.model
    return "\n".join(
        [
            "# The recipe, run",
            "",
            f"The sister: {sizes.num_layers} layers, hidden {sizes.hidden_size}, {sizes.num_heads} heads of "
            f"{sizes.width}, bytes as tokens; {file.training_tokens:,} bytes of the Python standard library in rows of "
            f"{file.train.context}, Muon and AdamW. Healing: {healing.tokens:,} bytes "
            f"({healing.tokens / file.training_tokens:.1%}), {healing.steps} AdamW steps of at most {rates(file)}. "
            "From scratch: the same architecture, on as many bytes as training and healing together, one seed.",
            "",
            f"{machine} Made by `{command}`; {pieces / 60:.0f} minutes in all.",
            "",
            "## Losses",
            "",
            f"Nats per byte over {file.held_out.windows} windows of held-out code. Bytes of a token are those of the "
            f"cache in {sizes.dtype}. Healed: the mean over {len(healing.seeds)} seeds ± half of greatest less least; "
            "without ±, of one. "
            f"{SISTER}, healed, is the sister trained on for as long: what the bytes are worth by themselves.",
            "",
            *loss_table(rows),
            "",
            "## What was kept, and decoding",
            "",
            "Energies are means over layers, on calibration text "
            f"({file.calibration.rows} rows of {file.calibration.length} bytes). Decoding: {speed.batch} sequences, "
            f"float32, medians of {speed.rounds} stretches of {speed.steps} steps in which the models took turns; the "
            "ratio is that of each turn.",
            "",
            *kept_and_speed_table(rows),
            "",
        ]
    )


def rates(file: RecipeFile) -> str:
    """The learning rates of healing, in words."""
    names: dict[float, list[str]] = {}
    for conversion in file.conversions:
        names.setdefault(file.learning_rate(conversion.name), []).append(conversion.name)
    own = {rate: of for rate, of in names.items() if rate != file.healing.learning_rate}
    return f"{file.healing.learning_rate:g}" + "".join(f" ({rate:g}: {'; '.join(of)})" for rate, of in own.items())


def summary(rows: list[Row]) -> list[dict[str, Any]]:
    """The rows as plain values, with what follows from them."""
    return [
        {
            "name": row.name,
            "bytes_per_token": row.bytes,
            "parameters": row.parameters,
            "converted": row.converted,
            "healed": {name: {"mean": one.mean, "spread": one.spread} for name, one in row.healed.items()},
            "from_scratch": row.scratch,
            "gap": {objective: row.gap(objective) for objective in OBJECTIVES},
            "decode": {length: dict(speed) for length, speed in row.speeds.items()},
        }
        for row in rows
    ]


def _healed(healed: Healed) -> str:
    if healed.mean is None:
        return "-"
    return f"{healed.mean:.3f}" + (f" ± {healed.spread / 2:.3f}" if len(healed.losses) > 1 else "")


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)
