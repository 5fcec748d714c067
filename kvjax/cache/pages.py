"""Taking, sharing, copying and returning pages: pure, vectorised, the same for every policy and codec.

Page sharing and copy-on-write follow PagedAttention (Kwon et al. 2023, 2309.06180), widened from the last page to any
page that the next tokens may write.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvjax.cache.policies.optional import with_rows
from kvjax.cache.policies.protocol import EMPTY
from kvjax.cache.put import put
from kvjax.cache.state import Cache, Group

COPIES_PER_TRIP = 16
"""Pages moved per trip of the copying loop: a bound on its temporaries, whatever the pool."""


class Shortage(NamedTuple):
    """What `reserve` found, int32[groups] each: pages needed and pages free. It took none if any group fell short."""

    needed: jax.Array
    available: jax.Array

    @property
    def any(self) -> jax.Array:
        """bool[]: some group fell short."""
        return jnp.any(self.needed > self.available)


class _Wish(NamedTuple):
    """What a group wants: table entries bool[R, B, N] that need a page, and those whose old page is copied into it."""

    needs: jax.Array
    copies: jax.Array
    total: jax.Array


def reserve(cache: Cache, n: jax.Array) -> tuple[Cache, Shortage]:
    """Makes every page that the next n int32[B] tokens of each sequence may write exist and be its own.

    New pages are taken, shared ones copied; if every holder of a shared page is about to write it, one keeps the
    original. When the pool of any group is too small, nothing is taken anywhere and the shortage says so.
    """
    wishes = [_wish(group, cache.seen, n) for group in cache.groups]
    shortage = Shortage(jnp.stack([w.total for w in wishes]), jnp.stack([group.top for group in cache.groups]))
    enough = ~shortage.any
    groups = tuple(_grant(group, wish, enough) for group, wish in zip(cache.groups, wishes, strict=True))
    return dataclasses.replace(cache, groups=groups), shortage


def take_for(group: Group, wanted: jax.Array) -> Group:
    """Takes pages for the table entries marked in wanted bool[R, B, N] that have none: all, or none and `missing` says.

    For prompts whose size in the cache is known only once they have been read.
    """
    needs = wanted & (group.table < 0)
    total = jnp.sum(needs, dtype=jnp.int32)
    enough = total <= group.top
    rank = jnp.cumsum(needs.reshape(-1)).reshape(needs.shape) - 1
    taken = group.free[jnp.clip(group.top - 1 - rank, 0, group.num_pages - 1)]
    granted = needs & enough
    top = group.top - jnp.where(enough, total, 0)
    return dataclasses.replace(
        group,
        table=jnp.where(granted, taken, group.table),
        top=top,
        refs=group.refs.at[jnp.where(granted, taken, group.num_pages)].set(1, mode="drop"),
        peak=jnp.maximum(group.peak, group.num_pages - top),
        missing=group.missing + jnp.where(enough, 0, total - group.top),
    )


def late_shortage(cache: Cache) -> Shortage:
    """What `take_for` found since the cache was made, as `reserve` would have put it."""
    available = jnp.stack([group.top for group in cache.groups])
    missing = jnp.stack([jnp.asarray(group.missing) for group in cache.groups])
    return Shortage(available + missing, available)


def take(cache: Cache, parents: jax.Array) -> Cache:
    """The sequences named by parents int32[B'], in that order; -1 is an empty one. Fork, reorder and release are this.

    Pages are shared, not copied; those that nobody holds any more return to the pool. `B'` may differ from `B`.
    """
    alive = parents >= 0
    chosen = jnp.maximum(parents, 0)
    groups, context = (tuple(_take(group, chosen, alive) for group in part) for part in (cache.groups, cache.context))

    def pick(state: jax.Array) -> jax.Array:
        return jnp.where(alive.reshape(-1, *(1,) * (state.ndim - 1)), state[chosen], jnp.zeros((), state.dtype))

    return Cache(groups, pick(cache.seen), jax.tree.map(pick, cache.recurrent), context)


def fork(cache: Cache, n: int) -> Cache:
    """Every sequence n times, copies side by side: batch B becomes B * n, no page moves."""
    return take(cache, jnp.repeat(jnp.arange(cache.batch), n))


def release(cache: Cache, which: jax.Array) -> Cache:
    """Empties the sequences marked in which bool[B]."""
    return take(cache, jnp.where(which, EMPTY, jnp.arange(cache.batch)))


def truncate(cache: Cache, seen: jax.Array) -> Cache:
    """The cache without all but the first seen int32[B] tokens of each sequence: no more than it has seen.

    For rows to which tokens were only added, in the order of their positions. Pages that become empty return to the
    pool, others stay as they are: what a select remembers of a page is made anew when the next token lands in it,
    which is before a step reads it.
    """
    groups = tuple(_truncate(group, seen) for group in cache.groups)
    return dataclasses.replace(cache, groups=groups, seen=jnp.minimum(cache.seen, seen))


def resize(cache: Cache, pages: tuple[tuple[int, int], ...]) -> Cache:
    """Widens tables and pools to (pages per row, pages in the pool) per group, those of a context last.

    Nothing shrinks. Copies pools once.
    """
    count, every = len(cache.groups), (*cache.groups, *cache.context)
    resized = tuple(_resize(group, n, p) for group, (n, p) in zip(every, pages, strict=True))
    return dataclasses.replace(cache, groups=resized[:count], context=resized[count:])


def _wish(group: Group, seen: jax.Array, n: jax.Array) -> _Wish:
    layout, table = group.layout, group.table
    starts = jnp.arange(table.shape[2]) * layout.page_size
    touched = layout.policy.touches(group.length, seen, n, starts, layout.page_size)
    number = jnp.where(table >= 0, table, group.num_pages)  # out of range: dropped by scatters
    holders = group.refs.at[number].get(mode="fill", fill_value=0)
    shared = touched & (table >= 0) & (holders > 1)
    writers = jnp.zeros(group.num_pages, jnp.int32).at[number].add(shared.astype(jnp.int32), mode="drop")
    order = jnp.arange(table.size, dtype=jnp.int32).reshape(table.shape)
    first = jnp.full(group.num_pages, table.size, jnp.int32)
    first = first.at[jnp.where(shared, number, group.num_pages)].min(order, mode="drop")
    everyone = writers.at[number].get(mode="fill", fill_value=0) == holders
    keeps = everyone & (order == first.at[number].get(mode="fill", fill_value=-1))
    copies = shared & ~keeps
    needs = copies | (touched & (table < 0))
    return _Wish(needs, copies, jnp.sum(needs, dtype=jnp.int32))


def _grant(group: Group, wish: _Wish, enough: jax.Array) -> Group:
    needs, copies = wish.needs & enough, wish.copies & enough
    rank = jnp.cumsum(needs.reshape(-1)).reshape(needs.shape) - 1
    taken = group.free[jnp.clip(group.top - 1 - rank, 0, group.num_pages - 1)]
    table = jnp.where(needs, taken, group.table)
    top = group.top - jnp.where(enough, wish.total, 0)
    out_of_range = group.num_pages
    refs = group.refs.at[jnp.where(copies, group.table, out_of_range)].add(-1, mode="drop")
    refs = refs.at[jnp.where(needs, taken, out_of_range)].set(1, mode="drop")
    pools = (group.k, group.v, group.page_state)
    k, v, page_state = _copy_pages(pools, group.table.reshape(-1), taken.reshape(-1), copies.reshape(-1))
    return dataclasses.replace(
        group,
        k=k,
        v=v,
        page_state=page_state,
        table=table,
        top=top,
        refs=refs,
        peak=jnp.maximum(group.peak, group.num_pages - top),
        copied=group.copied + jnp.sum(copies, dtype=jnp.int32),
    )


def _copy_pages(pools: tuple, source: jax.Array, target: jax.Array, marked: jax.Array) -> tuple:
    """Copies page source[i] to target[i] where marked[i], a fixed number of pages per loop trip."""
    trips = -(-marked.size // COPIES_PER_TRIP)
    listed = jnp.nonzero(marked, size=trips * COPIES_PER_TRIP, fill_value=marked.size)[0]
    source = source.at[listed].get(mode="fill", fill_value=0)
    count = jnp.sum(marked, dtype=jnp.int32)

    def more(carry: tuple) -> jax.Array:
        return carry[0] < count

    def move(carry: tuple) -> tuple:
        start, pools = carry
        some = jax.lax.dynamic_slice_in_dim(source, start, COPIES_PER_TRIP)
        places = jax.lax.dynamic_slice_in_dim(listed, start, COPIES_PER_TRIP)

        def one(pool: jax.Array) -> jax.Array:
            onto = target.at[places].get(mode="fill", fill_value=pool.shape[0])
            return put(pool, (onto,), pool[some])

        return start + COPIES_PER_TRIP, jax.tree.map(one, pools)

    return jax.lax.while_loop(more, move, (jnp.zeros((), jnp.int32), pools))[1]


def _take(group: Group, chosen: jax.Array, alive: jax.Array) -> Group:
    def pick(array: jax.Array, empty: int) -> jax.Array:
        """Sequences lie along axis 1."""
        keep = alive.reshape(1, -1, *(1,) * (array.ndim - 2))
        return jnp.where(keep, array[:, chosen], jnp.asarray(empty, array.dtype))

    return dataclasses.replace(
        _holding(group, pick(group.table, EMPTY)),
        length=pick(group.length, 0),
        position=pick(group.position, EMPTY),
        victim=pick(group.victim, EMPTY),
        row_state=jax.tree.map(lambda state: pick(state, 0), group.row_state),
        settled=jax.tree.map(lambda state: pick(state, 0), group.settled),
        tail=jax.tree.map(lambda state: pick(state, 0), group.tail),
    )


def _truncate(group: Group, seen: jax.Array) -> Group:
    position = jnp.where(group.position < seen[:, None], group.position, EMPTY)
    slots = jnp.arange(position.shape[2], dtype=jnp.int32)
    length = jnp.max(jnp.where(position >= 0, slots + 1, 0), axis=2)
    kept = slots < length[..., None]
    row_state = {
        name: jnp.where(kept.reshape(*kept.shape, *(1,) * (state.ndim - 3)), state, jnp.zeros((), state.dtype))
        for name, state in group.row_state.items()
    }
    starts = jnp.arange(group.table.shape[2]) * group.layout.page_size
    return dataclasses.replace(
        _holding(group, jnp.where(starts < length[..., None], group.table, EMPTY)),
        position=position,
        length=length,
        row_state=row_state,
        victim=group.layout.policy.victims(with_rows(row_state, group.settled), position, length),
    )


def _holding(group: Group, table: jax.Array) -> Group:
    """The group with another table of pages it holds already; pages that nobody holds any more are free."""
    # References beyond the table's own (a prefix tree's holds) stay as they are.
    refs = group.refs - _count(group.table, group.num_pages) + _count(table, group.num_pages)
    freed = (group.refs > 0) & (refs == 0)
    rank = jnp.cumsum(freed) - 1
    spot = jnp.where(freed, group.top + rank, group.num_pages)
    free = group.free.at[spot].set(jnp.arange(group.num_pages, dtype=jnp.int32), mode="drop")
    return dataclasses.replace(
        group,
        table=table,
        free=free,
        top=group.top + jnp.sum(freed, dtype=jnp.int32),
        refs=refs,
        shared=jnp.maximum(group.shared, jnp.sum(refs > 1, dtype=jnp.int32)),
    )


def _count(table: jax.Array, num_pages: int) -> jax.Array:
    """How many table entries name each page: int32[P]."""
    named = jnp.where(table >= 0, table, num_pages).reshape(-1)
    return jnp.zeros(num_pages, jnp.int32).at[named].add(1, mode="drop")


def _resize(group: Group, pages_per_row: int, num_pages: int) -> Group:
    wider = max(pages_per_row - group.table.shape[2], 0)
    more = max(num_pages - group.num_pages, 0)

    def pad(array: jax.Array, axis: int, by: int, value: int) -> jax.Array:
        if not by:
            return array
        widths = [(0, by if i == axis else 0) for i in range(array.ndim)]
        return jnp.pad(array, widths, constant_values=value)

    slots = wider * group.layout.page_size
    fresh = jnp.arange(group.num_pages, group.num_pages + more, dtype=jnp.int32)
    free = pad(group.free, 0, more, 0)
    return dataclasses.replace(
        group,
        k=jax.tree.map(lambda pool: pad(pool, 0, more, 0), group.k),
        v=jax.tree.map(lambda pool: pad(pool, 0, more, 0), group.v),
        page_state=jax.tree.map(lambda pool: pad(pool, 0, more, 0), group.page_state),
        table=pad(group.table, 2, wider, EMPTY),
        position=pad(group.position, 2, slots, EMPTY),
        row_state=jax.tree.map(lambda state: pad(state, 2, slots, 0), group.row_state),
        free=jax.lax.dynamic_update_slice(free, fresh, (group.top,)) if more else free,
        top=group.top + more,
        refs=pad(group.refs, 0, more, 0),
    )
