"""Partial results: the reads of a policy over tokens that lie side by side, merged by their log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kvjax.attention.sharded import attention
from kvjax.cache.policies.protocol import EMPTY, Read
from kvjax.typing import Rotate
from pallas_kernels import merge


def covered(position: jax.Array, read: Read) -> jax.Array:
    """Positions that a read covers; -1 elsewhere."""
    inside = position >= read.first
    if read.last is not None:
        inside = inside & (position < read.last)
    return jnp.where(inside, position, EMPTY)


def turned(positions: jax.Array, read: Read) -> jax.Array:
    """Where the query is rotated to."""
    return positions if read.turn is None else jnp.minimum(positions, read.turn)


def fanned(q: jax.Array, positions: jax.Array, read: Read, rotate: Rotate) -> tuple[jax.Array, jax.Array]:
    """A query for each token that a read with a `lag` covers: q [B,T,H,D] -> rotated [B,T*n,H,D], int32[B,T*n].

    The integers are the position of the one token that each is to see (with a window of 1), -1 for none. Turning
    queries, not keys, leaves keys as they are stored, and is exact whatever `rotate` does beside turning.
    """
    assert read.last is not None
    assert read.lag is not None
    covers = jnp.arange(read.first, read.last)
    turns = jnp.minimum(positions[..., None], covers + read.lag).reshape(positions.shape[0], -1)
    sees = jnp.where(positions[..., None] >= covers, covers, EMPTY).reshape(turns.shape)
    return rotate(jnp.repeat(q, covers.size, axis=1), turns), sees


def gathered(out: jax.Array, lse: jax.Array, tokens: int) -> tuple[jax.Array, jax.Array]:
    """What the queries of `fanned` found, [B,T*n,H,...], as one partial result of `tokens` tokens, [B,T,H,...]."""
    apart = (jnp.moveaxis(x.reshape(x.shape[0], tokens, -1, *x.shape[2:]), 2, 0) for x in (out, lse))
    return merge(*apart)


def attend_among(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    q_positions: jax.Array,
    reads: Sequence[Read],
    rotate: Rotate,
    soft_cap: float | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Causal attention of unrotated q [B,T,H,D] to rotated k, v [B,S,K,*] under a policy's reads.

    positions int32[B, S], ascending, and q_positions int32[B, T]: -1 is padding. Returns out [B,T,H,Dv], lse
    float32[B,T,H].
    """

    def part(read: Read) -> tuple[jax.Array, jax.Array]:
        # In order, no token lies behind the column of its position, so what is held in few slots is in few columns.
        columns = slice(read.slots)
        fan = read.lag is not None
        queries, sees = (
            fanned(q, q_positions, read, rotate) if fan else (rotate(q, turned(q_positions, read)), q_positions)
        )
        out, lse = attention(
            queries,
            k[:, columns],
            v[:, columns],
            causal=True,
            window=1 if fan else read.window,
            positions=covered(positions[:, columns], read),
            q_positions=sees,
            soft_cap=soft_cap,
            backend=backend,
        )
        return gathered(out, lse, q.shape[1]) if fan else (out, lse)

    return merged([part(read) for read in reads])


def attend_over(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    held: jax.Array,
    positions: jax.Array,
    rotate: Rotate,
    backend: str | None = None,
) -> jax.Array:
    """Causal attention of q [B,T,H,D] at positions int32[B,T] to k, v [B,S,K,*] at `held` int32[B,S], all unrotated.

    -1 is padding on either side. Returns [B,T,H,Dv].
    """
    return attention(
        rotate(q, positions),
        rotate(k, held),
        v,
        causal=True,
        positions=held,
        q_positions=positions,
        backend=backend,
    )[0]


def merged(parts: Sequence[tuple[jax.Array, jax.Array]], sinks: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Partial results (out [B,T,H,Dv], lse float32[B,T,H]) as one, a learned sink per head [H] among them if given.

    A sink takes its part of the attention and gives nothing: one more column, whose value is zero.
    """
    out, lse = parts[0] if len(parts) == 1 else merge(*(jnp.stack(part) for part in zip(*parts, strict=True)))
    if sinks is None:
        return out, lse
    total = jnp.logaddexp(lse, sinks.astype(jnp.float32))
    # A query that sees nothing, with a sink of minus infinity: their difference would be NaN.
    share = jnp.exp(lse - jnp.where(jnp.isfinite(total), total, 0.0))
    return out * share[..., None].astype(out.dtype), total
