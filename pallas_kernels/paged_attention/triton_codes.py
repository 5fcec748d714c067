"""Reading pools whose bytes hold several codes, in a Triton kernel. Imports triton at once, as `triton_kernel.py` does.

A vector of D channels is W = D / PACKED bytes; byte i holds the channels i, i + W, ... from its low bits up. Unpacked
side by side, as `tl.join` gives them, a byte's codes are neighbours: tile columns are channels woven. Products do not
mind, as long as queries come woven too and a result's columns are stored where they belong (`channels`).
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def pinned(x):
    """x, computed once: where a tile is wide, the compiler would unpack it in many warps, each for its own product."""
    if COMPILED and x.shape[1] > 256:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)
    return x


@triton.jit
def channels(first: tl.constexpr, count: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr):
    """The channels int32[count] of tile columns from `first` on; WIDTH or more where there is none."""
    column = first + tl.arange(0, count)
    if PACKED == 1:
        return column
    byte = column // PACKED
    return tl.where(byte < WIDTH // PACKED, (column % PACKED) * (WIDTH // PACKED) + byte, WIDTH)


@triton.jit
def woven(x, PACKED: tl.constexpr):
    """[N, PACKED * c], one run of columns after the other, as the columns of codes that share bytes."""
    runs = tl.reshape(x, (x.shape[0], PACKED, x.shape[1] // PACKED))
    return tl.reshape(tl.permute(runs, (0, 2, 1)), x.shape)


@triton.jit
def numbers(bytes, PACKED: tl.constexpr):
    """The codes of uint8[N, c], float32[N, c * PACKED]: 2 of 4 bits a byte, or 4 of 2 bits."""
    wide = bytes.to(tl.uint32)
    if PACKED == 2:
        codes = tl.join(wide & 15, wide >> 4)
    else:
        codes = tl.join(tl.join(wide & 3, (wide >> 4) & 3), tl.join((wide >> 2) & 3, wide >> 6))
    codes = tl.reshape(codes, (bytes.shape[0], bytes.shape[1] * PACKED))
    # 2^23 + code as float32 has the code for its last bits: two fast instructions where a conversion is a slow one.
    return (codes | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def read_groups(values, vector, held, first: tl.constexpr, count: tl.constexpr, run: tl.constexpr,
                WIDTH: tl.constexpr, PACKED: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """Scales or minima of tile columns [first, first + count), one for each `run` bytes and code of theirs.

    float32[N, count / PACKED / run * PACKED], the codes of a byte side by side; 0 where nothing is held.
    """
    stripe: tl.constexpr = WIDTH // PACKED
    groups: tl.constexpr = WIDTH // GROUP
    runs: tl.constexpr = count // PACKED // run
    if runs * PACKED == groups:
        # All of them, as they lie in memory: one copy.
        at = tl.arange(0, groups)
        found = tl.load(values + vector[:, None] * groups + at[None, :], mask=held[:, None], other=0.0)
        if runs > 1:
            found = woven(found, PACKED)
    else:
        place = tl.arange(0, runs * PACKED)
        byte = first // PACKED + place // PACKED * run
        at = ((place % PACKED) * stripe + byte) // GROUP
        wanted = held[:, None] & (byte < stripe)[None, :]
        found = tl.load(values + vector[:, None] * groups + at[None, :], mask=wanted, other=0.0)
    return found.to(tl.float32)


@triton.jit
def read_channels(values, vector, held, first: tl.constexpr, count: tl.constexpr, WIDTH: tl.constexpr,
                  PACKED: tl.constexpr):  # fmt: skip
    """Scales or minima of the channels of tile columns [first, first + count), float32[N, count]."""
    if count == WIDTH:
        at = tl.arange(0, WIDTH)
        found = woven(tl.load(values + vector[:, None] * WIDTH + at[None, :], mask=held[:, None], other=0.0), PACKED)
    else:
        at = channels(first, count, WIDTH, PACKED)
        wanted = held[:, None] & (at < WIDTH)[None, :]
        found = tl.load(values + vector[:, None] * WIDTH + at[None, :], mask=wanted, other=0.0)
    return found.to(tl.float32)


@triton.jit
def read_codes(pool, scale, low, vector, held, page, page_held, dtype: tl.constexpr, first: tl.constexpr,
               count: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr, GROUP: tl.constexpr,
               RUN: tl.constexpr):  # fmt: skip
    """code * scale + minimum of tile columns [first, first + count) of vectors int64[N], [N, count] in `dtype`.

    GROUP: channels that share a scale and a minimum, which stand beside each vector; 0: they belong to a channel of a
    whole page, and page int64[pages of a tile] says where those lie. RUN: bytes over which scales are the same.
    """
    byte = first // PACKED + tl.arange(0, count // PACKED)
    stripe: tl.constexpr = WIDTH // PACKED
    wanted = held[:, None]
    if first // PACKED + count // PACKED > stripe:
        wanted = wanted & (byte < stripe)[None, :]
    codes = numbers(tl.load(pool + vector[:, None] * stripe + byte[None, :], mask=wanted, other=0), PACKED)
    slots: tl.constexpr = codes.shape[0]
    if GROUP:
        step = read_groups(scale, vector, held, first, count, RUN, WIDTH, PACKED, GROUP)
        least = read_groups(low, vector, held, first, count, RUN, WIDTH, PACKED, GROUP)
        runs: tl.constexpr = count // PACKED // RUN
        codes = tl.reshape(codes, (slots, runs, RUN, PACKED))
        step = tl.reshape(step, (slots, runs, 1, PACKED))
        least = tl.reshape(least, (slots, runs, 1, PACKED))
    else:
        step = read_channels(scale, page, page_held, first, count, WIDTH, PACKED)[:, None, :]
        least = read_channels(low, page, page_held, first, count, WIDTH, PACKED)[:, None, :]
        codes = tl.reshape(codes, (page.shape[0], slots // page.shape[0], count))
    return pinned(tl.reshape(codes * step + least, (slots, count)).to(dtype))
