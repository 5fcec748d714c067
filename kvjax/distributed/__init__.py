"""Meshes, and which parameter dimension lies on which mesh axis."""

from kvjax.distributed.mesh import as_mesh, make_mesh
from kvjax.distributed.rules import AxisRules, parameter_shardings, partition_specs

__all__ = ["AxisRules", "as_mesh", "make_mesh", "parameter_shardings", "partition_specs"]
