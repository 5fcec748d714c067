"""Device meshes: from a `MeshConfig`, or a mesh the caller already has."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from kvjax.config import MeshConfig
from kvjax.errors import ConfigError


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the first devices, its axes left to the compiler to propagate (`AxisType.Auto`).

    Args:
      config: axis names and sizes; one size may be -1 and takes the devices that are left.
      devices: None: all of the default backend.

    Raises:
      ConfigError: the axes need more devices than there are, or -1 stands where the others do not divide them.
    """
    available = list(jax.devices() if devices is None else devices)
    known = math.prod(size for size in config.shape if size != -1)
    if -1 in config.shape and (known > len(available) or len(available) % known):
        raise ConfigError(
            f"MeshConfig{config.axes}: the sizes {config.shape} leave no whole axis of {len(available)} devices; "
            f"the fixed sizes multiply to {known}, which must divide the number of devices"
        )
    shape = tuple(len(available) // known if size == -1 else size for size in config.shape)
    needed = math.prod(shape)
    if needed > len(available):
        raise ConfigError(
            f"MeshConfig{config.axes} of shape {shape} needs {needed} devices, there are {len(available)}; "
            "lower a size or let one be -1"
        )
    # The default axis type differs between jax releases, so it is always named.
    return jax.make_mesh(shape, config.axes, axis_types=(AxisType.Auto,) * len(shape), devices=available[:needed])


def as_mesh(mesh: Mesh | MeshConfig) -> Mesh:
    """What callers pass as `mesh=`, as a mesh with automatic axes; explicit ones would refuse the models' products."""
    if isinstance(mesh, MeshConfig):
        return make_mesh(mesh)
    if not isinstance(mesh, Mesh):
        raise ConfigError(f"mesh must be None, a kvjax MeshConfig or a jax.sharding.Mesh, got {mesh!r}")
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
