"""The Triton kernels of dense attention. Imports triton at once: `triton.py` beside it loads this when it is needed.

All arrays are as the operation takes them, [B, T, H, D]; queries stand in rows, keys in columns of a tile. A width
that is no power of two lies in two parts, MAIN + REST columns, of which REST may be padded.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels.triton_softmax import LOG2_E, finished, in_log2, raised

LARGEST: tl.constexpr = tl.constexpr(2147483647)
"""Of int32: a window that hides nothing."""


@triton.jit
def line_of(b, index, head, LENGTH: tl.constexpr, HEADS: tl.constexpr):
    """Which vectors int64[N] of [B, LENGTH, HEADS, *] these are."""
    return (b * LENGTH + index).to(tl.int64) * HEADS + head


@triton.jit
def read(array, line, real, first: tl.constexpr, count: tl.constexpr, width: tl.constexpr):
    """Columns [first, first + count) of vectors int64[N], 0 where they are not real or the width ends."""
    column = first + tl.arange(0, count)
    wanted = real[:, None]
    if first + count > width:
        wanted = wanted & (column < width)[None, :]
    return tl.load(array + line[:, None] * width + column[None, :], mask=wanted, other=0.0)


@triton.jit
def read_parts(array, line, real, MAIN: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr):
    """Both parts of vectors; the first for the second where there is only one."""
    main = read(array, line, real, 0, MAIN, WIDTH)
    rest = main
    if REST:
        rest = read(array, line, real, MAIN, REST, WIDTH)
    return main, rest


@triton.jit
def write(array, line, real, values, first: tl.constexpr, count: tl.constexpr, width: tl.constexpr):
    """The opposite of `read`."""
    column = first + tl.arange(0, count)
    wanted = real[:, None] & (column < width)[None, :]
    tl.store(array + line[:, None] * width + column[None, :], values.to(array.dtype.element_ty), mask=wanted)


@triton.jit
def write_parts(array, line, real, main, rest, MAIN: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr):
    """The opposite of `read_parts`."""
    write(array, line, real, main, 0, MAIN, WIDTH)
    if REST:
        write(array, line, real, rest, MAIN, REST, WIDTH)


@triton.jit
def query_positions(q_positions, b, row, TOKENS: tl.constexpr, KEYS: tl.constexpr, GIVEN: tl.constexpr):
    """Where queries int32[M] stand, -1 for none; not given: the last of all."""
    if GIVEN:
        result = tl.load(q_positions + b * TOKENS + row, mask=row < TOKENS, other=-1)
    else:
        result = tl.where(row < TOKENS, row + (KEYS - TOKENS), -1)
    return result


@triton.jit
def key_positions(positions, b, column, end, KEYS: tl.constexpr, GIVEN: tl.constexpr):
    """Where keys int32[N] stand, -1 from `end` on."""
    result = tl.where(column < end, column, -1)
    if GIVEN:
        result = tl.load(positions + b * KEYS + column, mask=column < end, other=-1)
    return result


@triton.jit
def ids_of(segments, b, index, real, LENGTH: tl.constexpr, OTHER: tl.constexpr, GIVEN: tl.constexpr):
    """Segments int32[N] of these tokens, OTHER where they are not real; anything where there are no segments."""
    result = index
    if GIVEN:
        result = tl.load(segments + b * LENGTH + index, mask=real, other=OTHER)
    return result


@triton.jit
def limits(lengths, window, b, KEYS: tl.constexpr, RAGGED: tl.constexpr, WINDOWED: tl.constexpr):
    """Where a sequence's keys end, and how far back its queries see."""
    end = KEYS
    if RAGGED:
        end = tl.minimum(tl.load(lengths + b), KEYS)
    reach = LARGEST
    if WINDOWED:
        reach = tl.load(window)
    return end, reach


@triton.jit
def key_range(q_position, end, reach, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
              POSITIONED: tl.constexpr):  # fmt: skip
    """[begin, last) of the keys that any of these queries may see; begin is the first of a block."""
    begin = 0
    last = end
    # Keys that stand anywhere are all looked at.
    if CAUSAL and not POSITIONED:
        last = tl.minimum(end, tl.max(q_position, 0) + 1)
        if WINDOWED:
            earliest = tl.min(tl.where(q_position >= 0, q_position, LARGEST), 0)
            begin = tl.minimum(tl.maximum(earliest - reach + 1, 0), last) // BLOCK_N * BLOCK_N
    return begin, last


@triton.jit
def seen(q_position, position, q_segment, segment, reach, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
         SEGMENTED: tl.constexpr):  # fmt: skip
    """bool[M, N]: which keys each query sees."""
    distance = q_position[:, None] - position[None, :]
    visible = (position >= 0)[None, :] & (q_position >= 0)[:, None]
    if CAUSAL:
        visible = visible & (distance >= 0)
    if WINDOWED:
        visible = visible & (distance < reach)
    if SEGMENTED:
        visible = visible & (q_segment[:, None] == segment[None, :])
    return visible


@triton.jit
def attention_kernel(
    q, k, v, lengths, segments, positions, q_positions, window, out, lse,
    TOKENS: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    WIDTH: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    SCALE: tl.constexpr, SOFT_CAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, RAGGED: tl.constexpr,
    SEGMENTED: tl.constexpr, POSITIONED: tl.constexpr, Q_POSITIONED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head over all keys they see: out [B, T, H, VALUE], lse float32[B, T, H]."""
    # Under causality the last queries have the most to read: they start first.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    head, b = tl.program_id(1), tl.program_id(2)
    kv_head = head // GROUP
    KV_HEADS: tl.constexpr = HEADS // GROUP
    real = row < TOKENS
    line = line_of(b, row, head, TOKENS, HEADS)
    main, rest = read_parts(q, line, real, MAIN, REST, WIDTH)
    q_position = query_positions(q_positions, b, row, TOKENS, KEYS, Q_POSITIONED)
    q_segment = ids_of(segments, b, row, real, TOKENS, -1, SEGMENTED)
    end, reach = limits(lengths, window, b, KEYS, RAGGED, WINDOWED)
    begin, last = key_range(q_position, end, reach, BLOCK_N, CAUSAL, WINDOWED, POSITIONED)

    MASKED: tl.constexpr = (
        CAUSAL or RAGGED or SEGMENTED or POSITIONED or Q_POSITIONED or TOKENS > KEYS or KEYS % BLOCK_N != 0
    )
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, VALUE_BLOCK], tl.float32)
    # One loop: a second, for the keys that need no mask, made the compiler wait for each product (C7515).
    for start in range(begin, last, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        position = key_positions(positions, b, column, end, KEYS, POSITIONED)
        inside = position >= 0
        keys = line_of(b, column, kv_head, KEYS, KV_HEADS)
        scores = tl.dot(main, tl.trans(read(k, keys, inside, 0, MAIN, WIDTH)))
        if REST:
            scores = tl.dot(rest, tl.trans(read(k, keys, inside, MAIN, REST, WIDTH)), scores)
        scores = in_log2(scores, SCALE, SOFT_CAP)
        if MASKED:
            segment = ids_of(segments, b, column, inside, KEYS, -2, SEGMENTED)
            visible = seen(q_position, position, q_segment, segment, reach, CAUSAL, WINDOWED, SEGMENTED)
            scores = tl.where(visible, scores, -float("inf"))
        top, shift, fade = raised(top, scores)
        weights = tl.exp2(scores - shift[:, None])
        total = total * fade + tl.sum(weights, 1)
        value = read(v, keys, inside, 0, VALUE_BLOCK, VALUE)
        acc = tl.dot(weights.to(value.dtype), value, acc * fade[:, None])

    result, logs = finished(top, total, acc)
    tl.store(lse + line, logs, mask=real)
    write(out, line, real, result, 0, VALUE_BLOCK, VALUE)


@triton.jit
def score_gradients(main, rest, k_main, k_rest, value, dout, log, delta, visible, SCALE: tl.constexpr,
                    SOFT_CAP: tl.constexpr, REST: tl.constexpr):  # fmt: skip
    """Of one tile: weights float32[M, N] and the gradients of the unscaled products, less the factor SCALE."""
    products = tl.dot(main, tl.trans(k_main))
    if REST:
        products = tl.dot(rest, tl.trans(k_rest), products)
    scores = in_log2(products, SCALE, SOFT_CAP)
    weights = tl.where(visible, tl.exp2(scores - log[:, None]), 0.0)
    gradients = weights * (tl.dot(dout, tl.trans(value)) - delta[:, None])
    if SOFT_CAP is not None:
        slope = scores * (1.0 / (SOFT_CAP * LOG2_E))
        gradients *= 1.0 - slope * slope
    return weights, gradients


@triton.jit
def read_rows(q, dout, lse, delta, line, real, WIDTH: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
              VALUE: tl.constexpr, VALUE_BLOCK: tl.constexpr):  # fmt: skip
    """What a tile needs of its queries: both parts of q, dout, the log-sum-exp in log 2, delta."""
    main, rest = read_parts(q, line, real, MAIN, REST, WIDTH)
    log = tl.load(lse + line, mask=real, other=0.0)
    log = tl.where(log == -float("inf"), 0.0, log) * LOG2_E
    return main, rest, read(dout, line, real, 0, VALUE_BLOCK, VALUE), log, tl.load(delta + line, mask=real, other=0.0)


@triton.jit
def key_gradients_kernel(
    q, k, v, dout, lse, delta, lengths, segments, positions, q_positions, window, dk, dv,
    TOKENS: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    WIDTH: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    SCALE: tl.constexpr, SOFT_CAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, RAGGED: tl.constexpr,
    SEGMENTED: tl.constexpr, POSITIONED: tl.constexpr, Q_POSITIONED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk [B, S, K, WIDTH] and dv [B, S, K, VALUE] of BLOCK_N keys of one KV head, over all heads of its group."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    kv_head, b = tl.program_id(1), tl.program_id(2)
    KV_HEADS: tl.constexpr = HEADS // GROUP
    end, reach = limits(lengths, window, b, KEYS, RAGGED, WINDOWED)
    position = key_positions(positions, b, column, end, KEYS, POSITIONED)
    inside = position >= 0
    keys = line_of(b, column, kv_head, KEYS, KV_HEADS)
    k_main, k_rest = read_parts(k, keys, inside, MAIN, REST, WIDTH)
    value = read(v, keys, inside, 0, VALUE_BLOCK, VALUE)
    segment = ids_of(segments, b, column, inside, KEYS, -2, SEGMENTED)
    begin, stop = 0, TOKENS
    if CAUSAL and not (POSITIONED or Q_POSITIONED):
        begin = tl.maximum(tl.program_id(0) * BLOCK_N - (KEYS - TOKENS), 0) // BLOCK_M * BLOCK_M
        if WINDOWED:
            # A query sees no key further back than its window: the last that sees the last key of the tile.
            stop = tl.program_id(0) * BLOCK_N + BLOCK_N - 1 - (KEYS - TOKENS) + tl.minimum(reach, KEYS + TOKENS)
            stop = tl.minimum(TOKENS, stop)
    dk_main = tl.zeros([BLOCK_N, MAIN], tl.float32)
    dk_rest = tl.zeros([BLOCK_N, REST if REST else 16], tl.float32)
    d_value = tl.zeros([BLOCK_N, VALUE_BLOCK], tl.float32)
    for head in range(kv_head * GROUP, kv_head * GROUP + GROUP):
        for start in range(begin, stop, BLOCK_M):
            row = start + tl.arange(0, BLOCK_M)
            real = row < TOKENS
            line = line_of(b, row, head, TOKENS, HEADS)
            main, rest, d_out, log, drop = read_rows(
                q, dout, lse, delta, line, real, WIDTH, MAIN, REST, VALUE, VALUE_BLOCK
            )
            q_position = query_positions(q_positions, b, row, TOKENS, KEYS, Q_POSITIONED)
            q_segment = ids_of(segments, b, row, real, TOKENS, -1, SEGMENTED)
            visible = seen(q_position, position, q_segment, segment, reach, CAUSAL, WINDOWED, SEGMENTED)
            weights, gradients = score_gradients(
                main, rest, k_main, k_rest, value, d_out, log, drop, visible, SCALE, SOFT_CAP, REST
            )
            d_value = tl.dot(tl.trans(weights.to(d_out.dtype)), d_out, d_value)
            turned = tl.trans(gradients.to(main.dtype))
            dk_main = tl.dot(turned, main, dk_main)
            if REST:
                dk_rest = tl.dot(turned, rest, dk_rest)
    real_key = column < KEYS
    write_parts(dk, keys, real_key, dk_main * SCALE, dk_rest * SCALE, MAIN, REST, WIDTH)
    write(dv, keys, real_key, d_value, 0, VALUE_BLOCK, VALUE)


@triton.jit
def query_gradients_kernel(
    q, k, v, dout, lse, delta, lengths, segments, positions, q_positions, window, dq,
    TOKENS: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    WIDTH: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    SCALE: tl.constexpr, SOFT_CAP: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, RAGGED: tl.constexpr,
    SEGMENTED: tl.constexpr, POSITIONED: tl.constexpr, Q_POSITIONED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq [B, T, H, WIDTH] of BLOCK_M queries of one head."""
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    head, b = tl.program_id(1), tl.program_id(2)
    KV_HEADS: tl.constexpr = HEADS // GROUP
    real = row < TOKENS
    line = line_of(b, row, head, TOKENS, HEADS)
    main, rest, d_out, log, drop = read_rows(q, dout, lse, delta, line, real, WIDTH, MAIN, REST, VALUE, VALUE_BLOCK)
    q_position = query_positions(q_positions, b, row, TOKENS, KEYS, Q_POSITIONED)
    q_segment = ids_of(segments, b, row, real, TOKENS, -1, SEGMENTED)
    end, reach = limits(lengths, window, b, KEYS, RAGGED, WINDOWED)
    begin, last = key_range(q_position, end, reach, BLOCK_N, CAUSAL, WINDOWED, POSITIONED)
    dq_main = tl.zeros([BLOCK_M, MAIN], tl.float32)
    dq_rest = tl.zeros([BLOCK_M, REST if REST else 16], tl.float32)
    for start in range(begin, last, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        position = key_positions(positions, b, column, end, KEYS, POSITIONED)
        inside = position >= 0
        keys = line_of(b, column, head // GROUP, KEYS, KV_HEADS)
        k_main, k_rest = read_parts(k, keys, inside, MAIN, REST, WIDTH)
        value = read(v, keys, inside, 0, VALUE_BLOCK, VALUE)
        segment = ids_of(segments, b, column, inside, KEYS, -2, SEGMENTED)
        visible = seen(q_position, position, q_segment, segment, reach, CAUSAL, WINDOWED, SEGMENTED)
        _, gradients = score_gradients(
            main, rest, k_main, k_rest, value, d_out, log, drop, visible, SCALE, SOFT_CAP, REST
        )
        gradients = gradients.to(main.dtype)
        dq_main = tl.dot(gradients, k_main, dq_main)
        if REST:
            dq_rest = tl.dot(gradients, k_rest, dq_rest)
    write_parts(dq, line, real, dq_main * SCALE, dq_rest * SCALE, MAIN, REST, WIDTH)
