"""What a calibrated codec is told of a model's keys and values: a file, and a value that hashes by its content."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kvjax.errors import CheckpointError, ConfigError

BITS = (2, 3, 4)
"""Bits a code may have; a calibration holds levels for each."""

HOW = 'kvjax.calibrate(model, tokens).save("calibration.npz")'


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """Ranges and levels of one model's keys and values, made by `kvjax.calibrate`; equal content is equal.

    Layers are those that hold keys and values of their own, L of them.

    Attributes:
      key_least, key_greatest: float32[L, K, D], the range of each channel of the keys before RoPE.
      key_levels: bits -> float32[L, 2^bits], ascending, within [-1, 1].
      value_levels: the same; empty where the value lies in the key.
    """

    key_least: np.ndarray
    key_greatest: np.ndarray
    key_levels: Mapping[int, np.ndarray]
    value_levels: Mapping[int, np.ndarray]

    def __post_init__(self) -> None:
        for name, array in self._arrays().items():
            if not np.all(np.isfinite(array)):
                raise CheckpointError(f"calibration: {name} holds numbers that are not finite; make it again by {HOW}")
        layers = self.key_least.shape[0]
        if self.key_least.ndim != 3 or self.key_greatest.shape != self.key_least.shape:
            raise CheckpointError(
                f"calibration: key_least and key_greatest must both be [layers, heads, channels], got "
                f"{self.key_least.shape} and {self.key_greatest.shape}; make it again by {HOW}"
            )
        for name, levels in (("key_levels", self.key_levels), ("value_levels", self.value_levels)):
            for bits, table in levels.items():
                if table.shape != (layers, 2**bits) or np.any(np.diff(table, axis=1) < 0):
                    raise CheckpointError(
                        f"calibration: {name} of {bits} bits must be {layers} ascending rows of {2**bits}, got "
                        f"{table.shape}; make it again by {HOW}"
                    )

    @functools.cached_property
    def digest(self) -> str:
        """A hash of everything."""
        state = hashlib.sha256()
        for name, array in sorted(self._arrays().items()):
            state.update(f"{name}{array.shape}".encode())
            state.update(np.ascontiguousarray(array, np.float32).tobytes())
        return state.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Calibration) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        layers, heads, width = self.key_least.shape
        return f"Calibration({layers}x{heads}x{width}, {self.digest[:12]})"

    def save(self, path: str | Path) -> None:
        """Writes an .npz file, which `KVQuant(calibration=path)` and `Calibration.load` read."""
        with Path(path).open("wb") as file:
            np.savez(file, **self._arrays())  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads what `save` wrote.

        Raises:
          ConfigError: there is no such file.
          CheckpointError: it is damaged, or no calibration.
        """
        try:
            # Opened here: a file that turns out to be damaged would stay open.
            with Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                arrays = {name: np.asarray(file[name], np.float32) for name in file.files}
        except OSError as error:
            raise ConfigError(
                f"cannot read the calibration {path}: {error.strerror or error}; make it by {HOW}"
            ) from error
        except (ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
            raise CheckpointError(f"{path} is damaged, or no calibration: {error}; make it by {HOW}") from error
        missing = {"key_least", "key_greatest"} - set(arrays)
        if missing:
            raise CheckpointError(f"{path} is no calibration: it lacks {sorted(missing)[0]}; make it by {HOW}")

        def levels(part: str) -> dict[int, np.ndarray]:
            names = {bits: f"{part}_levels_{bits}" for bits in BITS}
            return {bits: arrays[name] for bits, name in names.items() if name in arrays}

        try:
            return cls(arrays["key_least"], arrays["key_greatest"], levels("key"), levels("value"))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error

    def _arrays(self) -> dict[str, np.ndarray]:
        parts = (("key", self.key_levels), ("value", self.value_levels))
        tables = {f"{part}_levels_{bits}": table for part, levels in parts for bits, table in levels.items()}
        return {"key_least": self.key_least, "key_greatest": self.key_greatest, **tables}
