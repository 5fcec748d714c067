"""A ring of slots in shared memory that one producer warpgroup fills ahead of the consumers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


@dataclasses.dataclass(frozen=True)
class Ring:
    """One ring, of one or more buffers that are filled and freed together.

    Attributes:
      buffers: shared memory [stages, ...] each.
      full: a barrier per slot that counts one arrival per buffer. free: likewise, one per consumer.
      stages: how many slots there are.
    """

    buffers: tuple[Any, ...]
    full: Any
    free: Any
    stages: int

    def slot(self, step: jax.Array) -> jax.Array:
        """Where a step's data lies."""
        return lax.rem(step, self.stages)

    def wait(self, step: jax.Array) -> jax.Array:
        """The slot of a step, once it is filled."""
        slot = self.slot(step)
        plgpu.barrier_wait(self.full.at[slot])
        return slot

    def release(self, step: jax.Array) -> None:
        """This consumer reads the step's slot no more."""
        plgpu.barrier_arrive(self.free.at[self.slot(step)])


def barriers(stages: int, buffers: int, consumers: int) -> tuple[Any, Any]:
    """Scratch for `full` and `free` of a ring."""
    return (
        plgpu.Barrier(num_arrivals=buffers, num_barriers=stages),
        plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
    )


def fill(steps: jax.Array, rings: Sequence[Ring], sources: Callable[[jax.Array], Sequence[Sequence[Any]]]) -> None:
    """Runs the producer: step after step, copies `sources(step)`, a view of global memory per buffer of each ring."""

    def step(i: jax.Array, _: Any) -> None:
        for ring, views in zip(rings, sources(i), strict=True):
            slot = ring.slot(i)

            @pl.when(i >= ring.stages)
            def _(ring: Ring = ring, slot: jax.Array = slot) -> None:
                plgpu.barrier_wait(ring.free.at[slot])

            for view, buffer in zip(views, ring.buffers, strict=True):
                plgpu.copy_gmem_to_smem(view, buffer.at[slot], ring.full.at[slot])

    lax.fori_loop(0, steps, step, None)
    for ring in rings:
        # Nobody needs these arrivals, but a barrier must not be left with a phase that was not waited for.
        def drain(i: jax.Array, _: Any, ring: Ring = ring) -> None:
            plgpu.barrier_wait(ring.free.at[ring.slot(i)])

        lax.fori_loop(jnp.maximum(steps - ring.stages, 0), steps, drain, None)


def ring(buffers: tuple[Any, ...], barriers: Any, stages: int) -> Ring:
    """A ring, given both of its barriers as they were allocated."""
    full, free = barriers
    return Ring(buffers, full, free, stages)
