"""A mesh of devices."""

from __future__ import annotations

import dataclasses

from kvjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """A device mesh: axis names and sizes, e.g. axes=("data", "tensor"), shape=(2, 4). -1 takes what is left."""

    axes: tuple[str, ...] = ("data", "tensor")
    shape: tuple[int, ...] = (1, -1)

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.shape) or len(set(self.axes)) != len(self.axes):
            raise ConfigError(f"MeshConfig needs one size per distinct axis, got {self.axes} and {self.shape}")
        if sum(size == -1 for size in self.shape) > 1 or any(size < -1 or size == 0 for size in self.shape):
            raise ConfigError(f"MeshConfig.shape takes positive sizes and at most one -1, got {self.shape}")
