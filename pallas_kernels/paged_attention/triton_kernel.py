"""The Triton kernels of paged attention. Imports triton at once: `triton.py` beside it loads this when it is needed.

A tile is BLOCK_M rows, each one query of one head, by BLOCK_N slots. Query heads that share a KV head are packed with
the chunk's tokens, token first, so that causal tiles stay compact. A width that is no power of two lies in two parts,
MAIN + REST columns (576 = 512 + 64), of which REST may be padded. Codes that share a byte are neighbours in a tile
(`triton_codes.py`): its columns are then channels in another order.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels.paged_attention.triton_codes import channels, read_codes
from pallas_kernels.triton_softmax import LOG2_E, finished, in_log2, raised


@triton.jit
def read_queries(q, q_positions, b, head, first_row, TOKENS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
                 WIDTH: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """BLOCK_M packed rows: queries [M, MAIN] and [M, REST], their place among B * T * H int64[M], token, position."""
    row = first_row + tl.arange(0, BLOCK_M)
    real = row < TOKENS * GROUP
    token = b * TOKENS + row // GROUP
    place = token.to(tl.int64) * HEADS + head * GROUP + row % GROUP
    position = tl.load(q_positions + token, mask=real, other=-1)
    columns = tl.arange(0, MAIN)
    start = q + place[:, None] * WIDTH
    main = tl.load(start + columns[None, :], mask=real[:, None], other=0.0)
    rest = main
    if REST:
        columns = MAIN + tl.arange(0, REST)
        rest = tl.load(start + columns[None, :], mask=real[:, None] & (columns < WIDTH)[None, :], other=0.0)
    return main, rest, place, token, position, real


@triton.jit
def read_row(table, positions, line, slot, end, ENTRIES: tl.constexpr, PAGE: tl.constexpr,
             POSITIONED: tl.constexpr):  # fmt: skip
    """The page of each slot int32[N] of a row and its token's position, -1 from `end` on."""
    number = tl.load(table + line * ENTRIES + slot // PAGE, mask=slot < end, other=-1)
    position = slot
    if POSITIONED:
        position = tl.load(positions + line * (ENTRIES * PAGE) + slot, mask=slot < end, other=-1)
    return number, position


@triton.jit
def place_of(number, position, layer, page_head, slot, LAYERS: tl.constexpr, PAGE_HEADS: tl.constexpr,
             PAGE: tl.constexpr):  # fmt: skip
    """Which vectors int64[N] of the pool slots are, and which of them hold a token; others may be nowhere."""
    # The pool may hold more than 2^31 elements.
    vector = ((number.to(tl.int64) * LAYERS + layer) * PAGE_HEADS + page_head) * PAGE + slot % PAGE
    return vector, (number >= 0) & (position >= 0)


@triton.jit
def read_vectors(pool, vector, held, first: tl.constexpr, count: tl.constexpr, width: tl.constexpr):
    """Columns [first, first + count) of vectors int64[N] of a pool, [N, count]; 0 where nothing is held."""
    column = first + tl.arange(0, count)
    wanted = held[:, None]
    if first + count > width:
        wanted = wanted & (column < width)[None, :]
    # Unused slots may hold NaN, which a weight of 0 does not silence: they are not read.
    return tl.load(pool + vector[:, None] * width + column[None, :], mask=wanted, other=0.0)


@triton.jit
def pages_of(table, line, start, end, layer, page_head, ENTRIES: tl.constexpr, LAYERS: tl.constexpr,
             PAGE_HEADS: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Where the pages of BLOCK_N slots from `start` on have their scales, int64[pages], and which pages there are."""
    size: tl.constexpr = min(PAGE, BLOCK_N)
    slot = start + tl.arange(0, BLOCK_N // size) * size
    number, _ = read_row(table, table, line, slot, end, ENTRIES, PAGE, False)
    return place_of(number, slot, layer, page_head, slot, LAYERS, PAGE_HEADS, 1)


@triton.jit
def score(main, rest, k_pool, k_scale, k_min, vector, held, page, page_held, WIDTH: tl.constexpr,
          MAIN: tl.constexpr, REST: tl.constexpr, SCALED: tl.constexpr, PACKED: tl.constexpr, GROUP: tl.constexpr,
          RUN: tl.constexpr):  # fmt: skip
    """Products [M, N] of queries and keys, and the keys' two parts [N, MAIN] and [N, REST] in the queries' dtype."""
    if PACKED > 1:
        key = read_codes(
            k_pool, k_scale, k_min, vector, held, page, page_held, main.dtype, 0, MAIN, WIDTH, PACKED, GROUP, RUN
        )
    else:
        key = read_vectors(k_pool, vector, held, 0, MAIN, WIDTH).to(main.dtype)
    products = tl.dot(main, tl.trans(key))
    more = key
    if REST:
        if PACKED > 1:
            more = read_codes(
                k_pool, k_scale, k_min, vector, held, page, page_held, main.dtype, MAIN, REST, WIDTH, PACKED, GROUP, RUN
            )
        else:
            more = read_vectors(k_pool, vector, held, MAIN, REST, WIDTH).to(main.dtype)
        products = tl.dot(rest, tl.trans(more), products)
    if SCALED and PACKED == 1:
        # One scale a slot belongs to the score, not to each element of the key.
        products *= tl.load(k_scale + vector, mask=held, other=0.0)[None, :]
    return products, key, more


@triton.jit
def seen(held, position, q_position, window, WINDOWED: tl.constexpr):
    """bool[M, N]: slots that hold a token not later than the query, and within its window."""
    distance = q_position[:, None] - position[None, :]
    visible = held[None, :] & (distance >= 0)
    if WINDOWED:
        visible = visible & (distance < window)
    return visible


@triton.jit
def paged_attention_kernel(
    q, k_pool, v_pool, table, lengths, layer, positions, q_positions, window, k_scale, v_scale, k_min, v_min, out, lse,
    BATCH: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    ENTRIES: tl.constexpr, LAYERS: tl.constexpr, PAGE_HEADS: tl.constexpr, PAGE: tl.constexpr,
    WIDTH: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    VALUE_REST: tl.constexpr, VALUE_STRIDE: tl.constexpr, VALUE_IN_KEY: tl.constexpr, SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr, WINDOWED: tl.constexpr, POSITIONED: tl.constexpr, K_SCALED: tl.constexpr,
    V_SCALED: tl.constexpr, PACKED: tl.constexpr, K_GROUP: tl.constexpr, V_GROUP: tl.constexpr, K_RUN: tl.constexpr,
    V_RUN: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One split of the slots of one sequence, for BLOCK_M rows of one KV head.

    out [SPLITS, B, T, H, VALUE], normalised within the split, in q's dtype if SPLITS is 1, else float32; lse float32
    [SPLITS, B, T, H]. VALUE_IN_KEY: the value is exactly the key's first part, or its channels are woven and it lies
    among them: already read. VALUE_REST: of such channels, the second part.
    """
    split = tl.program_id(0) % SPLITS
    # Under causality the last rows have the most to read: they start first.
    first_row = (tl.num_programs(0) // SPLITS - 1 - tl.program_id(0) // SPLITS) * BLOCK_M
    head, b = tl.program_id(1), tl.program_id(2)
    row, page_head = (head, 0) if ROWS > 1 else (0, head)
    main, rest, place, _, q_position, real = read_queries(
        q, q_positions, b, head, first_row, TOKENS, HEADS, GROUP, WIDTH, MAIN, REST, BLOCK_M
    )

    length = tl.minimum(tl.load(lengths + b * ROWS + row), ENTRIES * PAGE)
    latest = tl.maximum(tl.max(q_position, 0), -1)
    reach = 2147483647
    if WINDOWED:
        reach = tl.load(window)
    begin = 0
    if POSITIONED:
        end = tl.where(latest >= 0, length, 0)
    else:
        end = tl.minimum(length, latest + 1)
        if WINDOWED:
            earliest = tl.min(tl.where(q_position >= 0, q_position, 2147483647), 0)
            begin = tl.minimum(tl.maximum(earliest - reach + 1, 0), end)
    first = begin // BLOCK_N
    share = tl.cdiv(tl.cdiv(end, BLOCK_N) - first, SPLITS)
    stop = tl.minimum(first + (split + 1) * share, tl.cdiv(end, BLOCK_N))
    place_in_page = tl.load(layer)
    line = (b * ROWS + row).to(tl.int64)

    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, VALUE_BLOCK], tl.float32)
    if VALUE_REST:
        acc_rest = tl.zeros([BLOCK_M, VALUE_REST], tl.float32)
    # Page numbers are read a block ahead: left within a block, they take up stages of the compiler's pipeline.
    slot = (first + split * share) * BLOCK_N + tl.arange(0, BLOCK_N)
    number, position = read_row(table, positions, line, slot, end, ENTRIES, PAGE, POSITIONED)
    by_page: tl.constexpr = PACKED > 1 and (K_GROUP == 0 or V_GROUP == 0)
    page = tl.zeros([1], tl.int64)
    page_held = page == 0
    if by_page:
        begin = (first + split * share) * BLOCK_N
        page, page_held = pages_of(
            table, line, begin, end, place_in_page, page_head, ENTRIES, LAYERS, PAGE_HEADS, PAGE, BLOCK_N
        )
    for block in range(first + split * share, stop):
        vector, held = place_of(number, position, place_in_page, page_head, slot, LAYERS, PAGE_HEADS, PAGE)
        products, key, more = score(
            main, rest, k_pool, k_scale, k_min, vector, held, page, page_held, WIDTH, MAIN, REST, K_SCALED, PACKED,
            K_GROUP, K_RUN,
        )  # fmt: skip
        scores = in_log2(products, SCALE, SOFT_CAP)
        scores = tl.where(seen(held, position, q_position, reach, WINDOWED), scores, -float("inf"))
        slot += BLOCK_N
        number, position = read_row(table, positions, line, slot, end, ENTRIES, PAGE, POSITIONED)
        top, shift, fade = raised(top, scores)
        weights = tl.exp2(scores - shift[:, None])
        total = total * fade + tl.sum(weights, 1)
        value_rest = more
        if VALUE_IN_KEY:
            value = key
            if PACKED > 1 and K_GROUP == 0:
                # A page may have no scale that could be read.
                value = tl.where(held[:, None], value, 0.0)
                value_rest = tl.where(held[:, None], more, 0.0)
        elif PACKED > 1:
            value = read_codes(
                v_pool, v_scale, v_min, vector, held, page, page_held, main.dtype, 0, VALUE_BLOCK,
                VALUE_STRIDE * PACKED, PACKED, V_GROUP, V_RUN,
            )  # fmt: skip
            if VALUE_REST:
                value_rest = read_codes(
                    v_pool, v_scale, v_min, vector, held, page, page_held, main.dtype, VALUE_BLOCK, VALUE_REST,
                    VALUE_STRIDE * PACKED, PACKED, V_GROUP, V_RUN,
                )  # fmt: skip
        else:
            value = read_vectors(v_pool, vector, held, 0, VALUE_BLOCK, VALUE_STRIDE).to(main.dtype)
        acc *= fade[:, None]
        if V_SCALED and PACKED == 1:
            # Relative to the block's largest scale: tiny scales would leave the range of float16.
            steps = tl.load(v_scale + vector, mask=held, other=0.0)
            largest = tl.max(steps, 0)
            weights *= (steps / tl.where(largest > 0.0, largest, 1.0))[None, :]
            acc += tl.dot(weights.to(main.dtype), value) * largest
        else:
            acc = tl.dot(weights.to(main.dtype), value, acc)
        if VALUE_REST:
            acc_rest = tl.dot(weights.to(main.dtype), value_rest, acc_rest * fade[:, None])
        if by_page:
            page, page_held = pages_of(
                table, line, (block + 1) * BLOCK_N, end, place_in_page, page_head, ENTRIES, LAYERS, PAGE_HEADS, PAGE,
                BLOCK_N,
            )  # fmt: skip

    result, logs = finished(top, total, acc)
    at = tl.cast(split, tl.int64) * (BATCH * TOKENS * HEADS) + place
    tl.store(lse + at, logs, mask=real)
    column = channels(0, VALUE_BLOCK, VALUE_STRIDE * PACKED, PACKED)
    wanted = real[:, None] & (column < VALUE)[None, :]
    tl.store(out + at[:, None] * VALUE + column[None, :], result.to(out.dtype.element_ty), mask=wanted)
    if VALUE_REST:
        result, _ = finished(top, total, acc_rest)
        column = channels(VALUE_BLOCK, VALUE_REST, VALUE_STRIDE * PACKED, PACKED)
        wanted = real[:, None] & (column < VALUE)[None, :]
        tl.store(out + at[:, None] * VALUE + column[None, :], result.to(out.dtype.element_ty), mask=wanted)


@triton.jit
def paged_weights_kernel(
    q, k_pool, table, lengths, layer, positions, q_positions, window, k_scale, k_min, lse, row_weights, mass,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    ENTRIES: tl.constexpr, LAYERS: tl.constexpr, PAGE_HEADS: tl.constexpr, PAGE: tl.constexpr,
    WIDTH: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, SCALE: tl.constexpr, SOFT_CAP: tl.constexpr,
    WINDOWED: tl.constexpr, POSITIONED: tl.constexpr, K_SCALED: tl.constexpr, PACKED: tl.constexpr,
    K_GROUP: tl.constexpr, K_RUN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Column sums of the probabilities of BLOCK_N slots over all rows of one KV head: mass float32[B, K, S]."""
    head, b = tl.program_id(1), tl.program_id(2)
    row, page_head = (head, 0) if ROWS > 1 else (0, head)
    slot = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    length = tl.minimum(tl.load(lengths + b * ROWS + row), ENTRIES * PAGE)
    reach = 2147483647
    if WINDOWED:
        reach = tl.load(window)
    line = (b * ROWS + row).to(tl.int64)
    place_in_page = tl.load(layer)
    number, position = read_row(table, positions, line, slot, length, ENTRIES, PAGE, POSITIONED)
    vector, held = place_of(number, position, place_in_page, page_head, slot, LAYERS, PAGE_HEADS, PAGE)
    page = tl.zeros([1], tl.int64)
    page_held = page == 0
    if PACKED > 1 and K_GROUP == 0:
        begin = tl.program_id(0) * BLOCK_N
        page, page_held = pages_of(
            table, line, begin, length, place_in_page, page_head, ENTRIES, LAYERS, PAGE_HEADS, PAGE, BLOCK_N
        )
    some = tl.max(held.to(tl.int32), 0)
    sums = tl.zeros([BLOCK_N], tl.float32)
    for first_row in range(0, TOKENS * GROUP * some, BLOCK_M):
        main, rest, place, token, q_position, real = read_queries(
            q, q_positions, b, head, first_row, TOKENS, HEADS, GROUP, WIDTH, MAIN, REST, BLOCK_M
        )
        products, _, _ = score(
            main, rest, k_pool, k_scale, k_min, vector, held, page, page_held, WIDTH, MAIN, REST, K_SCALED, PACKED,
            K_GROUP, K_RUN,
        )  # fmt: skip
        visible = seen(held, position, q_position, reach, WINDOWED)
        logs = tl.load(lse + place, mask=real, other=0.0)
        logs = tl.where(logs == -float("inf"), 0.0, logs) * LOG2_E
        weights = tl.where(visible, tl.exp2(in_log2(products, SCALE, SOFT_CAP) - logs[:, None]), 0.0)
        sums += tl.sum(weights * tl.load(row_weights + token, mask=real, other=0.0)[:, None], 0)
    to = mass + (b * (HEADS // GROUP) + head).to(tl.int64) * (ENTRIES * PAGE) + slot
    tl.store(to, sums, mask=slot < ENTRIES * PAGE)
