"""DMC: each head decides for every token whether it needs an entry of its own (Nawrot et al. 2024, 2403.09636)."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from kvjax.cache.policies.bases import Positional
from kvjax.cache.policies.optional import Decision, next_joins
from kvjax.cache.policies.protocol import Read, RowState, appended, overlaps

BIAS = 5.0
"""Where decisions and importances start (section 3): a model that knows nothing of them appends, with weights near 1.

Training takes the same (`kvjax.train.dmc`): what a model has learnt is measured from here.
"""


@dataclasses.dataclass(frozen=True)
class DMC(Positional):
    """Each KV head appends a token, or blends it into its newest entry; nothing ever leaves.

    Before RoPE two channels speak. A key's last one decides, alpha = round(sigmoid(k - 5)); the last one of its group's
    queries weighs, omega = sigmoid(mean + 5). Both are then zero: no score has them. alpha = 1: key and value of the
    newest entry become its mean with the token's, under weights z and omega, and z grows by omega. alpha = 0, or the
    first token: it is appended, z = omega. A blend stands at its latest token's position, and the token's own
    attention sees it. Keys are blended as if unrotated: RoPE is relative, so that the stored one is turned on by one
    position. (Published code zeroes the two channels once more after RoPE; here what RoPE turns into them counts.)

    For models trained for it (`kvjax.train.dmc`): to others it is Full without two channels, or worse.
    """

    rows: Literal["head"] = dataclasses.field(default="head", init=False, repr=False)
    in_order: bool = dataclasses.field(default=False, init=False, repr=False)
    append_only: bool = dataclasses.field(default=False, init=False, repr=False)
    takes_late: bool = dataclasses.field(default=True, init=False, repr=False)

    def capacity(self, tokens: int) -> int:
        """As many slots as tokens, should all be appended."""
        return tokens

    def decide(self, q: jax.Array, k: jax.Array, query_factor: float) -> Decision:
        """The two channels' say in float32, and q and k without them."""
        batch, tokens, kv_heads = k.shape[:3]
        raw = q[..., -1].reshape(batch, tokens, kv_heads, -1).astype(jnp.float32) / query_factor
        return Decision(
            q=q.at[..., -1].set(0),
            k=k.at[..., -1].set(0),
            # One half rounds to the even 0.
            joins=k[..., -1].astype(jnp.float32) > BIAS,
            weight=jax.nn.sigmoid(jnp.mean(raw, axis=-1) + BIAS),
        )

    def slots(self, length: jax.Array, victim: jax.Array, seen: jax.Array, positions: jax.Array) -> jax.Array:
        """Behind what is held: where a token lands that joins no other."""
        return appended(length, seen, positions)

    def touches(self, length: jax.Array, seen: jax.Array, n: jax.Array, starts: jax.Array, page_size: int) -> jax.Array:
        """None for a prompt; then the page of the newest entry, which may take the token in, and new ones."""
        end = jnp.where((seen > 0) & (n > 0), length + n, 0)
        return overlaps(jnp.minimum(jnp.maximum(length - 1, 0), end), end, starts, page_size)

    def reads(self, window: int | None) -> tuple[Read, ...]:
        """Everything held; in a layer that the model itself windows, what stands within."""
        return (Read(window=window),)

    def row_state(self, rows: int, batch: int, slots: int) -> RowState:
        """weight float32[R, B, S], z: the summed importance of the tokens in an entry."""
        return {"weight": jnp.zeros((rows, batch, slots), jnp.float32)}

    def blank_tally(self, heads: int, batch: int, tokens: int) -> RowState:
        """weight float32 and joins bool [K, B, T] of a prompt: z of the entry as of each token, and its decision."""
        shape = (heads, batch, tokens)
        return {"weight": jnp.zeros(shape, jnp.float32), "joins": jnp.zeros(shape, bool)}

    def keep(self, state: RowState, position: jax.Array) -> jax.Array:
        """Of a prompt's blends as of each token, those that no later token joins."""
        return (position >= 0) & ~next_joins(state["joins"], axis=-1)
