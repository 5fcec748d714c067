"""Which layers see only a window, as `config.json` says it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from kvjax.convert.hf_fields import Fields
from kvjax.errors import CheckpointError

FULL, SLIDING = "full_attention", "sliding_attention"

Seen = tuple[int | None, ...]
"""Per layer, how many positions it sees; None: all."""


@dataclasses.dataclass(frozen=True)
class Windows:
    """How the configs of a family say it.

    Attributes:
      rule: "none": no layer has a window. "every": `sliding_window` holds for all layers. "switched": likewise, where
        `use_sliding_window` is set. "by_layer": likewise, for the layers that `layer_types` names or those from
        `max_window_layers` on. "pattern": for the layers that `layer_types` names, or else for all but each
        `full_every`-th.
      size: what an absent `sliding_window` means (an explicit null always means none).
      full_every, full_every_field: see above; the field, where the family has one, overrides the number.
    """

    rule: Literal["none", "every", "switched", "by_layer", "pattern"] = "none"
    size: int | None = 4096
    full_every: int = 2
    full_every_field: str | None = None

    def read(self, fields: Fields, layers: int) -> Seen:
        """How far each layer sees."""
        types = self._types(fields, layers)
        window = self._size(fields)
        if types is not None and SLIDING in types and window is None:
            raise CheckpointError(f"{fields.source}: layer_types has sliding layers, but sliding_window is off or null")
        if self.rule == "pattern" and types is None:
            types = self._pattern(fields, layers)
            if SLIDING in types and window is None:
                raise fields.wrong("sliding_window", "an integer, as some layers have a window")
        if self.rule in ("by_layer", "pattern") and types is not None:
            return tuple(window if name == SLIDING else None for name in types)
        first = 0
        if self.rule == "by_layer" and window is not None:
            first = fields.integer("max_window_layers", 28, least=0)
        windows = tuple(window if index >= first else None for index in range(layers))
        if types is not None and tuple(window if name == SLIDING else None for name in types) != windows:
            raise CheckpointError(
                f"{fields.source}: layer_types contradicts sliding_window, which holds for every layer of model_type "
                f"{fields.table.get('model_type')!r}; remove layer_types"
            )
        return windows

    def write(self, windows: Seen, extra: dict[str, Any]) -> dict[str, Any]:
        """The fields that `read` reads; a switched-off `sliding_window` stays as it was."""
        sizes = [window for window in windows if window is not None]
        types = [FULL if window is None else SLIDING for window in windows]
        listed = {"layer_types": types} if "layer_types" in extra else {}
        if self.rule == "none":
            return {}
        if self.rule == "every":
            return {"sliding_window": sizes[0] if sizes else None}
        if self.rule == "pattern":
            if types != self._pattern(Fields(extra, "ModelConfig.extra"), len(windows)):
                listed = {"layer_types": types}
            return {**({"sliding_window": sizes[0]} if sizes else {}), **listed}
        if not sizes:
            return {"use_sliding_window": False, **(listed if self.rule == "by_layer" else {})}
        switched = {"use_sliding_window": True, "sliding_window": sizes[0]}
        if self.rule == "switched":
            return switched
        # Readers older than layer_types know only a number of unwindowed layers in front.
        return {**switched, "max_window_layers": types.index(SLIDING), "layer_types": types}

    def _types(self, fields: Fields, layers: int) -> list[str] | None:
        """`layer_types`, where it is there."""
        types: Any = fields.table.get("layer_types")
        if types is None:
            return None
        if not isinstance(types, list) or len(types) != layers:
            raise fields.wrong("layer_types", f"a list of {layers} entries, one per layer")
        for name in types:
            if name not in (FULL, SLIDING):
                raise CheckpointError(f"{fields.source}: layer_types holds {name!r}; allowed: {FULL!r} and {SLIDING!r}")
        return types

    def _size(self, fields: Fields) -> int | None:
        """The window, None where there is none."""
        on = self.rule in ("every", "pattern")
        on = on or (self.rule in ("switched", "by_layer") and fields.flag("use_sliding_window"))
        if not on or ("sliding_window" in fields.table and fields.table["sliding_window"] is None):
            return None
        size: int | None = fields.integer("sliding_window", self.size)
        return size

    def _pattern(self, fields: Fields, layers: int) -> list[str]:
        """What "pattern" means without `layer_types`."""
        every = self.full_every
        if self.full_every_field is not None:
            every = fields.integer(self.full_every_field, every)
        return [SLIDING if (index + 1) % every else FULL for index in range(layers)]
