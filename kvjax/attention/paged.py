"""Attention over the paged cache: writes a step's tokens and reads what their policy keeps."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from kvjax.attention.blending import blend_step
from kvjax.attention.context import cross_paged
from kvjax.attention.partial import attend_over
from kvjax.attention.reading import Call, after, read_held, read_then_self
from kvjax.cache.calibrated import encoded, first_of, keep_first, noted, tables_of
from kvjax.cache.codecs import Encoded
from kvjax.cache.codecs.waiting import waits
from kvjax.cache.page_state import ended, store
from kvjax.cache.policies.optional import arrivals, decide, decides, observes_steps
from kvjax.cache.state import Cache
from kvjax.cache.tail import put_exact, settled
from kvjax.cache.write import layer_rows, place, place_in_page
from kvjax.typing import Held, Rotate, Scoring


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """What is carried through the layers of one forward pass.

    Attributes:
      cache: metadata already says where the new tokens are; keys and values follow layer by layer.
      slots: per group int32[R, B, T], where the new tokens land.
      before: per group, the group's positions and lengths before this step, for chunks that may overwrite what their
        own first queries still need; None where writing first is safe.
      active: bool[B], sequences that have a token in this step.
      pending: layer -> its encoded keys and values and their slots, which `end` writes: other layers may still read
        what they will overwrite.
      order: int32[], zero, known once every layer so far has read.
    """

    cache: Cache
    slots: tuple[jax.Array, ...]
    before: tuple[tuple[jax.Array, jax.Array] | None, ...]
    active: jax.Array
    pending: dict[int, tuple[Encoded, Encoded | None, jax.Array]] = dataclasses.field(default_factory=dict)
    order: jax.Array | int = 0


@dataclasses.dataclass(frozen=True)
class PagedAttend:
    """The `attend` of prefill and decoding over a `Cache` whose pages were reserved.

    One token a step, or a chunk of tokens under a policy that needs no attention weights. Writes come first where no
    slot is overwritten that a query of the same call still needs: one token at a time, or an append-only policy.
    Otherwise a chunk attends to what is held and to itself, and then writes what stays.

    Attributes:
      backend: which kernel, None for the best that can serve.
      prompt: the tokens are a prompt's, which reads everything whatever the select, even where they come one by one.
      rotate: that of the layers that a select reads, for what happens once all layers are through: pages may then lose
        keys that a codec holds unrotated, or be given them. Others do without.
      copies: so many sequences side by side came of one, and a step reads the first pages they have in common once.
    """

    backend: str | None = None
    prompt: bool = False
    rotate: Rotate | None = None
    copies: int = 1
    latent: ClassVar[bool] = True

    def begin(self, cache: Cache, tokens: jax.Array, positions: jax.Array) -> Step:
        """positions int32[B, T], -1 is padding. Decides where every token lands, in every row."""
        chunk = positions.shape[1] > 1
        groups, slots, before = [], [], []
        for group in cache.groups:
            policy = group.layout.policy
            if chunk and (observes_steps(policy) or decides(policy) or waits(group.layout.codec)):
                raise ValueError(
                    f"{policy!r} with {group.layout.codec!r} takes one token a step once its prompt is in, "
                    f"got {positions.shape[1]}"
                )
            landing = policy.slots(group.length, group.victim, cache.seen, positions)
            # Where nothing is known of a token before its layer has seen it, the layer places it.
            groups.append(group if decides(policy) else place(group, landing, positions, arrivals(policy, tokens)))
            slots.append(landing)
            before.append((group.position, group.length) if chunk and not policy.append_only else None)
        seen = cache.seen + jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
        renewed = dataclasses.replace(cache, groups=tuple(groups), seen=seen)
        return Step(renewed, tuple(slots), tuple(before), jnp.any(positions >= 0, axis=1))

    def resume(self, cache: Cache, positions: jax.Array) -> Step:
        """A pass that adds no token: positions int32[B, T] of queries whose keys and values are held already."""
        return Step(cache, (), (None,) * len(cache.groups), jnp.any(positions >= 0, axis=1))

    def put(
        self, cache: Step, layer: int, k: jax.Array, v: jax.Array | None, positions: jax.Array, rotate: Rotate
    ) -> Step:
        """Stores a layer's keys and values, unrotated, for calls with write False to read."""
        number, index = cache.cache.locate(layer)
        group = cache.cache.groups[number]
        key, value = encoded(group.layout.codec, tables_of(group, index), k, v, positions, rotate)
        group = keep_first(group, index, noted(first_of(group, index), k, v, positions))
        slots = layer_rows(group, cache.slots[number], index)
        if cache.before[number] is not None:
            cache = dataclasses.replace(cache, pending={**cache.pending, layer: (key, value, slots)})
        else:
            group = store(group, index, slots, key, value, rotate)
        groups = (*cache.cache.groups[:number], group, *cache.cache.groups[number + 1 :])
        return dataclasses.replace(cache, cache=dataclasses.replace(cache.cache, groups=groups))

    def hold(self, cache: Step, layer: int, k: jax.Array, v: jax.Array, positions: jax.Array) -> tuple[Held, Step]:
        """Stores k [B,T,1,C] by the codec and v int32[B,T,1,1] as it is, and reads everything held, these included."""
        number, index = cache.cache.locate(layer)
        group = cache.cache.groups[number]
        slots = layer_rows(group, cache.slots[number], index)
        group = store(group, index, slots, group.layout.codec.encode(k), Encoded(v))
        groups = (*cache.cache.groups[:number], group, *cache.cache.groups[number + 1 :])
        cache = dataclasses.replace(cache, cache=dataclasses.replace(cache.cache, groups=groups))
        return self.held(cache, layer), cache

    def held(self, cache: Step, layer: int) -> Held:
        """Everything that `hold` has stored of this layer, in the model's dtype; zeros where nothing is held."""
        number, index = cache.cache.locate(layer)
        group = cache.cache.groups[number]
        assert group.v is not None
        table, place = layer_rows(group, group.table, index)[0], place_in_page(group, index)
        held = layer_rows(group, group.position, index)[0]

        def gathered(pool: jax.Array) -> jax.Array:
            """[P, L, K, page_size, ...] -> [B, S, K, ...]."""
            pages = jnp.moveaxis(pool[jnp.maximum(table, 0), place], 2, 3)
            return pages.reshape(held.shape[0], -1, *pages.shape[3:])

        keys = group.layout.codec.decode(jax.tree.map(gathered, group.k), jnp.dtype(group.layout.dtype))
        filled = (held >= 0)[..., None, None]
        values = gathered(group.v.values)
        return Held(jnp.where(filled, keys, 0), jnp.where(filled, values, 0), held)

    def over(
        self, q: jax.Array, k: jax.Array, v: jax.Array, held: jax.Array, positions: jax.Array, rotate: Rotate
    ) -> jax.Array:
        """Causal attention of q [B,T,H,D] at positions to k, v [B,S,K,*] at `held`, unrotated -> [B,T,H,Dv]."""
        return attend_over(q, k, v, held, positions, rotate, self.backend)

    def cross(
        self, cache: Step, q: jax.Array, to_k: jax.Array, to_v: jax.Array, positions: jax.Array
    ) -> jax.Array | None:
        """Reads the cache's own pages of encoded context."""
        context = cache.cache.context
        return cross_paged(context[0], q, to_k, to_v, positions, self.backend) if context else None

    def state(self, cache: Step, layer: int) -> tuple[jax.Array, ...]:
        """What the recurrent layer of this number remembers."""
        return cache.cache.recurrent[layer]

    def keep(self, cache: Step, layer: int, state: tuple[jax.Array, ...]) -> Step:
        """Replaces what it remembers."""
        states = (*cache.cache.recurrent[:layer], state, *cache.cache.recurrent[layer + 1 :])
        return dataclasses.replace(cache, cache=dataclasses.replace(cache.cache, recurrent=states))

    def __call__(
        self,
        cache: Step,
        layer: Any,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array | None,
        positions: jax.Array,
        rotate: Rotate,
        *,
        scoring: Scoring = Scoring(),
        write: bool = True,
    ) -> tuple[jax.Array, Step]:
        """q [B,T,H,D], k [B,T,K,D], v [B,T,K,Dv] unrotated, positions int32[B,T] -> out [B,T,H,Dv], the step.

        With write False, k and v are those that the layer has been given before: only q is new.
        """
        number, index = cache.cache.locate(layer)
        group, before = cache.cache.groups[number], cache.before[number]
        codec = group.layout.codec
        pending, order = dict(cache.pending), cache.order
        deciding = decides(group.layout.policy)
        if deciding:
            decision = decide(group.layout.policy, q, k, group.layout.spec.query_factor)
            q, landing = decision.q, layer_rows(group, cache.slots[number], index)
            group = blend_step(group, index, landing, decision, v, positions, rotate)
        elif write or before is not None:
            key, value = encoded(codec, tables_of(group, index), k, v, positions, rotate)
            group = keep_first(group, index, noted(first_of(group, index), k, v, positions))
        call = Call(index, q, positions, rotate, scoring, self.prompt, self.backend, self.copies)
        if before is None:
            if write and not deciding:
                landing = layer_rows(group, cache.slots[number], index)
                if waits(codec):
                    group = put_exact(group, index, landing, key, value)
                else:
                    group = store(group, index, landing, key, value, rotate)
            out, group = read_held(group, call, cache.active, observe=write)
            if waits(codec) and isinstance(layer, int):
                order = order + after(jnp.zeros((), jnp.int32), out)
        else:
            out = read_then_self(group, before, call, key, value)
            slots = pending[layer][2] if not write else layer_rows(group, cache.slots[number], index)
            if isinstance(layer, int):
                pending[layer] = key, value, slots
                order = order + after(jnp.zeros((), jnp.int32), out)
            else:
                group = store(group, index, after(slots, out), key, value, rotate)
        groups = (*cache.cache.groups[:number], group, *cache.cache.groups[number + 1 :])
        renewed = dataclasses.replace(cache.cache, groups=groups)
        return out, dataclasses.replace(cache, cache=renewed, pending=pending, order=order)

    def end(self, cache: Step) -> Cache:
        """Writes what waited, and marks what the next token overwrites."""
        groups = list(cache.cache.groups)
        for layer, (key, value, slots) in cache.pending.items():
            number, index = cache.cache.locate(layer)
            groups[number] = store(groups[number], index, slots + cache.order, key, value, self.rotate)
        for number, group in enumerate(groups):
            if waits(group.layout.codec):
                groups[number] = settled(group, cache.active, cache.order)
        return ended(dataclasses.replace(cache.cache, groups=tuple(groups)), self.rotate)
