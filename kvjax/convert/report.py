"""What a conversion between kinds of attention did, layer by layer."""

from __future__ import annotations

import dataclasses

from kvjax.config import ModelConfig
from kvjax.plan import plan


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One layer of a `Report`.

    Attributes:
      keys, values: the share of their energy (mean squared norm) that is kept, 0 to 1, over calibration text, or as the
        weights alone say of inputs that are white once normalised.
      rope: the share of the keys' energy that RoPE still turns.
      bytes_before, bytes_after: what a token takes in the cache, in the config's dtype.
    """

    layer: int
    keys: float
    values: float
    rope: float
    bytes_before: int
    bytes_after: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conversion kept and what it saves.

    Attributes:
      conversion: what was done, such as "GQA, 2 of 8 heads, by SVD".
      layers: one for each layer of the model.
      loss_before, loss_after: nats per token on the calibration text; None: there was none.
    """

    conversion: str
    layers: tuple[LayerReport, ...]
    loss_before: float | None = None
    loss_after: float | None = None

    @property
    def bytes_before(self) -> int:
        """Bytes per token over all layers, before."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes per token over all layers, after."""
        return sum(layer.bytes_after for layer in self.layers)


@dataclasses.dataclass(frozen=True)
class Energy:
    """`keys`, `values` and `rope` of a `LayerReport`."""

    keys: float = 1.0
    values: float = 1.0
    rope: float = 1.0


def report(
    conversion: str,
    energies: list[Energy],
    before: ModelConfig,
    after: ModelConfig,
    losses: tuple[float | None, float | None] = (None, None),
) -> Report:
    """The report of a conversion from one config to another; energies: one for each layer."""
    held = zip(bytes_by_layer(before), bytes_by_layer(after), strict=True)
    layers = tuple(
        LayerReport(layer, energy.keys, energy.values, energy.rope, old, new)
        for layer, (energy, (old, new)) in enumerate(zip(energies, held, strict=True))
    )
    return Report(conversion, layers, *losses)


def bytes_by_layer(config: ModelConfig) -> list[int]:
    """What one token takes in the plain cache, for each layer of the model: nothing where a layer reads another's."""
    of_cache = {
        layer: layout.bytes_per_token // len(layout.layers)
        for layout in plan(config).layouts
        for layer in layout.layers
    }
    owns = {layer: of_cache[index] for index, layer in enumerate(config.owning_layers)}
    return [owns.get(layer, 0) for layer in range(config.num_layers)]
