"""The `attend` protocol: the one point where a model meets whatever holds its keys and values."""

from __future__ import annotations

from typing import Any, Protocol

import jax

from kvjax.typing import Held, Rotate, Scoring


class Attend(Protocol):
    """What a forward pass calls: `begin` once, the object itself once per layer, `end` once.

    Implementations are frozen dataclasses, passed as static arguments. `cache` is any pytree, or None. One that holds
    latents, not keys and values per head, has an attribute `latent` that is true.
    """

    def begin(self, cache: Any, tokens: jax.Array, positions: jax.Array) -> Any:
        """tokens, positions int32[B, T]; position -1 marks padding. Returns what is carried through the layers."""
        ...

    def __call__(
        self,
        cache: Any,
        layer: Any,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array | None,
        positions: jax.Array,
        rotate: Rotate,
        *,
        scoring: Scoring = Scoring(),
        write: bool = True,
    ) -> tuple[jax.Array, Any]:
        """q [B,T,H,D], k [B,T,K,D], v [B,T,K,Dv], unrotated; layer int or int32[] -> out [B,T,H,Dv], the carry.

        Args:
          layer: which of the layers that own keys and values.
          v: None under latent attention, where the value is the first columns of the key.
          scoring, write: given only by models that need them. write False: a layer that reads another's keys and
            values, which `layer` names and k and v are, and which that layer has written.
        """
        ...

    def put(
        self, cache: Any, layer: Any, k: jax.Array, v: jax.Array | None, positions: jax.Array, rotate: Rotate
    ) -> Any:
        """Takes in keys and values that calls with write False read; only models with a cross-decoder call it."""
        ...

    def hold(self, cache: Any, layer: int, k: jax.Array, v: jax.Array, positions: jax.Array) -> tuple[Held, Any]:
        """Takes in k [B,T,1,C] and v int32[B,T,1,1] as they are, and gives back all that is held, these included.

        Only models that rebuild keys and values on every read call it.
        """
        ...

    def over(
        self, q: jax.Array, k: jax.Array, v: jax.Array, held: jax.Array, positions: jax.Array, rotate: Rotate
    ) -> jax.Array:
        """Causal attention of q [B,T,H,D] at positions int32[B,T] to k, v [B,S,K,*] at `held` int32[B,S], unrotated.

        Nothing is stored. Only models that rebuild keys and values call it.
        """
        ...

    def cross(
        self, cache: Any, q: jax.Array, to_k: jax.Array, to_v: jax.Array, positions: jax.Array
    ) -> jax.Array | None:
        """q [B,T,H,D] over the sequences' encoded context -> [B,T,H,D]; None: there is none in this call.

        to_k, to_v [K,D,E] make keys and values of what an encoder gave. Only models with an encoder call it.
        """
        ...

    def state(self, cache: Any, layer: int) -> tuple[jax.Array, ...] | None:
        """What a recurrent layer remembers, arrays [B, ...]; None: it starts. Only models with such layers call it."""
        ...

    def keep(self, cache: Any, layer: int, state: tuple[jax.Array, ...]) -> Any:
        """Takes in what a recurrent layer remembers from now on."""
        ...

    def end(self, cache: Any) -> Any:
        """After the last layer: lengths have advanced and evictions happen here, the same for every layer."""
        ...
