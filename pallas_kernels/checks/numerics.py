"""How far a result may be from its float32 reference, and how far it is."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TOLERANCES = {"bfloat16": 1e-2, "float16": 2e-3}
"""Of norm(out - reference) / norm(reference): about three roundings of each dtype (2^-8 and 2^-11) in the worst mix."""
GRADIENT_TOLERANCE = 2e-2
"""Of gradients in either dtype: they pass through two more products."""
LSE_TOLERANCE = 1e-3
"""Absolute, of a log-sum-exp in float32: scores of order ten, products in the inputs' dtype summed in float32."""
BASELINE_FACTOR = 2.0
"""No error may exceed this many times that of `xla` in the same dtype."""
NEGLIGIBLE = 0.1
"""Of the tolerance: below it an error's ratio to another means nothing."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """One output against its reference.

    Attributes:
      output: its path in the pytree, such as "[0]".
      kind: "relative" to the reference's norm, or the largest "absolute" difference.
      error: NaN where the output is NaN and the reference is not, infinite where only one is finite.
      baseline: the error of `xla` in the same dtype, if that was measured.
    """

    output: str
    kind: str
    error: float
    allowed: float
    baseline: float | None = None

    @property
    def passed(self) -> bool:
        """Within the tolerance, and not over twice the baseline's error. NaN never passes."""
        # Written so that NaN fails: every comparison with it is false.
        within = self.error <= self.allowed
        if self.baseline is None:
            return within
        return within and self.error <= max(BASELINE_FACTOR * self.baseline, NEGLIGIBLE * self.allowed)


def compare(
    out: Any, reference: Any, tolerance: float, baseline: Any = None, lse_tolerance: float = LSE_TOLERANCE
) -> list[Difference]:
    """Every leaf of `out` against the leaf of `reference` at its place.

    A float32 array with the shape of the one before it less the last axis is a log-sum-exp.

    Raises:
      ValueError: the two differ in structure or in a shape.
    """
    leaves, expected = jax.tree_util.tree_flatten_with_path(out)[0], jax.tree.leaves(reference)
    trees: list[Any] = [jax.tree.structure(out), jax.tree.structure(reference)]
    if trees[0] != trees[1]:
        raise ValueError(f"the outputs are {trees[0]}, the reference is {trees[1]}")
    theirs = [None] * len(leaves) if baseline is None else jax.tree.leaves(baseline)
    found, before = [], None
    for (path, leaf), wanted, base in zip(leaves, expected, theirs, strict=True):
        lse = before is not None and leaf.shape == before[:-1] and leaf.dtype == np.float32
        before = leaf.shape
        measure = absolute_error if lse else relative_error
        found.append(
            Difference(
                jax.tree_util.keystr(path) or "out",
                "absolute" if lse else "relative",
                measure(leaf, wanted),
                lse_tolerance if lse else tolerance,
                None if base is None else measure(base, wanted),
            )
        )
    return found


def relative_error(out: Any, reference: Any) -> float:
    """norm(out - reference) / norm(reference); the plain norm where the reference is 0.

    Arrays of jax stay on their device, where sums are of float32: an error has three digits, which is enough of it.
    """
    _check_shapes(out, reference)
    if isinstance(out, jax.Array) and isinstance(reference, jax.Array):
        difference, scale = (float(norm) for norm in _norms(out, reference))
    else:
        got, wanted = np.asarray(out).astype(np.float64), np.asarray(reference).astype(np.float64)
        difference, scale = float(np.linalg.norm(got - wanted)), float(np.linalg.norm(wanted))
    return difference / (scale if scale else 1.0)


@jax.jit
def _norms(out: jax.Array, reference: jax.Array) -> tuple[jax.Array, jax.Array]:
    wanted = reference.astype(jnp.float32)
    return jnp.sqrt(jnp.sum(jnp.square(out.astype(jnp.float32) - wanted))), jnp.sqrt(jnp.sum(jnp.square(wanted)))


def absolute_error(out: Any, reference: Any) -> float:
    """The largest |out - reference|; equal infinities differ by 0."""
    _check_shapes(out, reference)
    got, wanted = np.asarray(out).astype(np.float64), np.asarray(reference).astype(np.float64)
    same = got == wanted
    return float(np.max(np.abs(np.where(same, 0.0, got) - np.where(same, 0.0, wanted)), initial=0.0))


def _check_shapes(out: Any, reference: Any) -> None:
    if out.shape != reference.shape:
        raise ValueError(f"an output has shape {out.shape}, its reference {reference.shape}")
