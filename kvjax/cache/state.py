"""The cache itself: an immutable pytree of pools, block tables and reference counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.cache.bits import pool_dtype
from kvjax.cache.codecs import Encoded
from kvjax.cache.codecs.calibrated import calibrated, first_tokens
from kvjax.cache.codecs.waiting import waits
from kvjax.cache.layout import GroupLayout
from kvjax.cache.policies.optional import evicted, unsettled, with_rows
from kvjax.cache.policies.protocol import EMPTY, RowState
from kvjax.cache.selects.protocol import PageState

Tail = dict[str, jax.Array]
"""The exact newest tokens beside the pages; sequences lie along axis 1, as in rows."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Group:
    """The pages of one layer group.

    Attributes:
      layout: what is static.
      k, v: pools, each leaf [P, layers_per_page, heads_per_page, page_size, ...]; v None: the value lies in the key.
      table: int32[R, B, N], page numbers, -1 is no page.
      length: int32[R, B], slots in use.
      position: int32[R, B, S], the token position in each slot, -1 is empty.
      victim: int32[R, B], the slot the next token overwrites, -1: append. It stays readable until then.
      row_state: name -> [R, B, S, ...], what the policy remembers per slot.
      settled: name -> [R, B], what a sequence's prompt has settled about each row, for policies that settle anything.
      page_state: name -> [P, layers_per_page, heads_per_page, ...], what the select remembers of pages.
      tail: "k" and "v" -> [L, B, ring, K, *], the newest tokens in the model's dtype, for codecs that wait: all L
        layers of the group, and for "v" only where values have a pool. For calibrated codecs the first tokens, by their
        position, float16[L, B, first, K, *].
      tables: name -> [L, ...], what a calibrated codec goes by: the model's, not the sequences'.
      missing: int32[], pages that a prompt was found to need beyond those free.
      free: int32[P], a stack of free page numbers, of which the first `top` int32[] count.
      refs: int32[P], how many table entries hold each page.
      peak, copied, shared: int32[], most pages ever in use, pages copied on write, most pages ever shared.
    """

    layout: GroupLayout = dataclasses.field(metadata={"static": True})
    k: Encoded
    v: Encoded | None
    table: jax.Array
    length: jax.Array
    position: jax.Array
    victim: jax.Array
    row_state: RowState
    free: jax.Array
    top: jax.Array
    refs: jax.Array
    peak: jax.Array
    copied: jax.Array
    shared: jax.Array
    settled: RowState = dataclasses.field(default_factory=dict)
    missing: jax.Array | int = 0
    page_state: PageState = dataclasses.field(default_factory=dict)
    tail: Tail = dataclasses.field(default_factory=dict)
    tables: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    @property
    def num_pages(self) -> int:
        """P."""
        return self.refs.shape[0]

    @property
    def used(self) -> jax.Array:
        """int32[]: pages in use."""
        return self.num_pages - self.top

    @property
    def pool_bytes(self) -> int:
        """Bytes of the pools, of what is remembered of pages, and of the exact tails beside them."""
        pools = jax.tree.leaves((self.k, self.v, self.page_state, self.tail))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in pools)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """All layer groups of a batch of sequences.

    Attributes:
      groups: one per set of layers with equal choices.
      seen: int32[B], tokens each sequence has had, held or not: the next token's position.
      recurrent: per layer that keeps a state instead of keys and values, its arrays [B, ...]; zeros before any token.
      context: one group of encoded vectors that all layers read and no token is added to; empty without a context.
    """

    groups: tuple[Group, ...]
    seen: jax.Array
    recurrent: tuple[tuple[jax.Array, ...], ...] = ()
    context: tuple[Group, ...] = ()

    @property
    def batch(self) -> int:
        """B."""
        return self.seen.shape[0]

    @property
    def recurrent_bytes(self) -> int:
        """Bytes of all recurrent states."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.recurrent))

    @property
    def pool_bytes(self) -> int:
        """Bytes of all pools."""
        return sum(group.pool_bytes for group in (*self.groups, *self.context))

    def locate(self, layer: int | jax.Array) -> tuple[int, int | jax.Array]:
        """A model layer's group and its index within. A traced layer (of a scan over layers) needs a single group."""
        if not isinstance(layer, int):
            if len(self.groups) != 1:
                raise ValueError("a scan over layers needs all layers in one cache group; unroll the layers instead")
            return 0, layer
        for number, group in enumerate(self.groups):
            if layer in group.layout.layers:
                return number, group.layout.layers.index(layer)
        raise ValueError(f"layer {layer} belongs to no cache group")


def empty_pool(layout: GroupLayout, num_pages: int) -> tuple[Encoded, Encoded | None]:
    """Zeroed key and value pools."""

    lead = (num_pages, layout.layers_per_page, layout.heads_per_page, layout.page_size)

    if waits(layout.codec):
        return _coded_pool(layout, num_pages)

    made: tuple[Encoded, Encoded | None] = jax.tree.map(
        lambda leaf: jnp.zeros((*lead, *leaf.shape[1:]), pool_dtype(layout.codec, leaf.dtype)), token_shapes(layout)
    )
    return made


def _coded_pool(layout: GroupLayout, num_pages: int) -> tuple[Encoded, Encoded | None]:
    """Pools of a codec that waits: keys are coded a page at a time."""
    codec: Any = layout.codec
    lead = (num_pages, layout.layers_per_page, layout.heads_per_page)

    def pool(code: Callable[[jax.Array], Encoded], width: int) -> Encoded:
        one = jax.eval_shape(code, jax.ShapeDtypeStruct((layout.page_size, width), layout.dtype))
        return jax.tree.map(lambda leaf: jnp.zeros((*lead, *leaf.shape), leaf.dtype), one)

    keys = pool(codec.code_keys, layout.spec.key_dim)
    return keys, None if layout.spec.value_in_key else pool(codec.code_values, layout.spec.value_dim)


def token_shapes(layout: GroupLayout) -> tuple[Encoded, Encoded | None]:
    """Shapes of one layer's key and value of a token as they are encoded, leaves [K, ...]; value None: in the key."""
    codec: Any = layout.codec
    spec = layout.spec

    def shapes(encode: Callable[..., Encoded], width: int) -> Encoded:
        vectors = jax.ShapeDtypeStruct((spec.kv_heads, width), layout.dtype)
        if not calibrated(codec):
            return jax.eval_shape(encode, vectors)
        # Of any one layer: shapes do not depend on it.
        return jax.eval_shape(lambda x: encode(x, jax.tree.map(lambda t: t[0], codec.tables(layout.layers))), vectors)

    apart = calibrated(codec)
    key = shapes(codec.encode_keys if apart else codec.encode, spec.key_dim)
    if spec.value_in_key:
        return key, None
    if spec.rebuilt:
        return key, Encoded(jax.ShapeDtypeStruct((spec.kv_heads, spec.value_dim), jnp.int32))
    return key, shapes(codec.encode_values if apart else codec.encode, spec.value_dim)


def empty_tail(layout: GroupLayout, batch: int) -> Tail:
    """Tails of B sequences that hold nothing; none where the codec keeps no token beside the pages."""
    codec: Any = layout.codec
    count = codec.ring if waits(codec) else first_tokens(codec)
    if not count:
        return {}
    dtype = layout.dtype if waits(codec) else "float16"
    lead = (len(layout.layers), batch, count, layout.spec.kv_heads)
    tail = {"k": jnp.zeros((*lead, layout.spec.key_dim), dtype)}
    return tail if layout.spec.value_in_key else tail | {"v": jnp.zeros((*lead, layout.spec.value_dim), dtype)}


def empty_page_state(layout: GroupLayout, num_pages: int) -> PageState:
    """What the select remembers of pages that nothing was written to: zeros."""
    lead = (num_pages, layout.layers_per_page, layout.heads_per_page)
    return jax.tree.map(
        lambda leaf: jnp.zeros((*lead, *leaf.shape), pool_dtype(layout.select, leaf.dtype)), layout.page_state
    )


def empty_group(layout: GroupLayout, batch: int, pages_per_row: int, num_pages: int) -> Group:
    """A group that holds nothing: B sequences, N pages per row, P pages."""
    rows, slots = layout.rows, pages_per_row * layout.page_size
    codec: Any = layout.codec
    k, v = empty_pool(layout, num_pages)
    nothing = jnp.full((rows, batch), EMPTY, jnp.int32)
    return Group(
        layout=layout,
        k=k,
        v=v,
        table=jnp.full((rows, batch, pages_per_row), EMPTY, jnp.int32),
        length=jnp.zeros((rows, batch), jnp.int32),
        position=jnp.full((rows, batch, slots), EMPTY, jnp.int32),
        victim=nothing,
        row_state=layout.policy.row_state(rows, batch, slots),
        free=jnp.arange(num_pages, dtype=jnp.int32)[::-1],
        top=jnp.asarray(num_pages, jnp.int32),
        refs=jnp.zeros(num_pages, jnp.int32),
        peak=jnp.zeros((), jnp.int32),
        copied=jnp.zeros((), jnp.int32),
        shared=jnp.zeros((), jnp.int32),
        settled=unsettled(layout.policy, rows, batch),
        missing=jnp.zeros((), jnp.int32),
        page_state=empty_page_state(layout, num_pages),
        tail=empty_tail(layout, batch),
        tables=codec.tables(layout.layers) if calibrated(codec) else {},
    )


def empty_cache(
    layouts: Sequence[GroupLayout],
    batch: int,
    pages: Sequence[tuple[int, int]],
    recurrent: Sequence[Sequence[tuple[int, ...]]] = (),
) -> Cache:
    """A cache that holds nothing.

    Args:
      pages: (pages per row, pages in the pool) of each group.
      recurrent: per layer with a state, the shapes of its float32 arrays without the batch.
    """
    groups = tuple(empty_group(layout, batch, n, p) for layout, (n, p) in zip(layouts, pages, strict=True))
    states = tuple(tuple(jnp.zeros((batch, *shape), jnp.float32) for shape in shapes) for shapes in recurrent)
    return Cache(groups, jnp.zeros(batch, jnp.int32), states)


def with_victims(cache: Cache) -> Cache:
    """The cache with every row's `victim` renewed from what its policy remembers: what ends a step, or a prompt.

    What leaves several at once leaves here, when all layers have read it.
    """

    def renewed(group: Group) -> Group:
        policy, position = group.layout.policy, group.position
        state = with_rows(group.row_state, group.settled)
        gone = evicted(policy, state, position, group.length)
        if gone is not None:
            position = jnp.where(gone, EMPTY, position)
        return dataclasses.replace(group, position=position, victim=policy.victims(state, position, group.length))

    return dataclasses.replace(cache, groups=tuple(map(renewed, cache.groups)))
