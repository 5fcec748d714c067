"""The shapes at which the Mosaic GPU kernels of paged attention are checked. Calls are made as for Triton's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

from pallas_kernels.checks.case import Case
from pallas_kernels.checks.numerics import TOLERANCES
from pallas_kernels.paged_attention.shapes import Shape, around_a_page, attend, exact, inputs, weigh

BACKEND = "mosaic_gpu"
CONTEXT = 32768
PAGE = 64


def case(name: str, shape: Shape, size: Literal["small", "full"], operation: str = "paged_attention") -> Case:
    """One case. Arithmetic and bytes are those of full lengths: None where a window or ragged lengths need less."""
    call = weigh if operation == "paged_weights" else attend
    weights = operation == "paged_weights"
    vectors = shape.batch * shape.slots * shape.kv_heads * (1 if shape.value or weights else 2)
    widths = shape.width + (0 if weights else shape.value or shape.width)
    # A chunk stands at the end of the row and sees itself causally: half of itself on average.
    seen = shape.slots - (shape.tokens - 1) / 2
    plain = size == "full" and shape.window is None and not shape.ragged
    moved = vectors * shape.vector_bytes
    return Case(
        name=f"paged {name} {size}",
        operation=operation,
        backend=BACKEND,
        size=size,
        inputs=inputs(shape),
        call=call(shape, BACKEND),
        reference=exact(shape, call),
        tolerance=TOLERANCES[shape.dtype],
        flops=2.0 * shape.batch * shape.tokens * shape.heads * seen * widths if plain else None,
        bytes_moved=float(moved) + (4.0 * vectors if weights else 0.0) if plain else None,
        baseline=call(shape, "xla"),
    )


TINY = Shape(batch=3, heads=4, kv_heads=2, width=64, page=16, entries=9, ragged=True)
ONE = replace(TINY, heads=2, kv_heads=1)
"""With one KV head: half the thread blocks, of which interpreting takes its time for each."""
SMALL = {
    "decode": TINY,
    "decode d128 f16, page of a block": replace(ONE, width=128, page=64, entries=3, dtype="float16"),
    "decode page of two blocks, window, soft cap": replace(ONE, page=128, entries=2, window=70, soft_cap=5.0),
    "decode rows per head, positions, window": replace(TINY, row_per_head=True, ordered=False, window=200),
    "decode int8": replace(TINY, codes="int8", page=32, entries=5),
    "decode page of 8": replace(ONE, width=128, page=8, entries=18),
    "decode fp8": replace(ONE, width=128, codes="float8_e4m3fn", page=32, entries=5),
    "decode mla": replace(TINY, kv_heads=1, width=192, value=128),
    "decode mla positions, window": replace(TINY, kv_heads=1, width=192, value=128, ordered=False, window=200),
    "chunk": replace(TINY, tokens=40),
    "chunk int8, positions": replace(ONE, tokens=40, codes="int8", page=32, entries=5, ordered=False),
    "decode int4": around_a_page(replace(ONE, codes="int4", page=32)),
    "decode int4 d128, page of two blocks, positions": replace(
        TINY, batch=2, width=128, codes="int4", page=128, entries=2, ordered=False
    ),
    "decode kivi 2 bits": around_a_page(replace(ONE, width=128, codes="kivi2", page=32)),
    "decode kivi 4 bits, page of a block": replace(TINY, codes="kivi4", page=64, entries=3, window=70),
    "chunk int4": replace(ONE, batch=2, tokens=40, codes="int4", page=32, entries=3),
}
SMALL_WEIGHTS = {
    "weights decode": TINY,
    "weights int8, rows per head, positions": replace(
        TINY, row_per_head=True, codes="int8", page=32, entries=5, ordered=False
    ),
    "weights chunk, window": replace(ONE, tokens=70, window=90),
}


def _decode(batch: int = 8, page: int = PAGE, **changes: Any) -> Shape:
    return replace(Shape(batch=batch, page=page, entries=CONTEXT // page), **changes)


LATENT = _decode(16, kv_heads=1, width=576, value=512)
CHUNK = _decode(1, tokens=512)
FULL = {
    **{f"decode d128 batch {batch}": _decode(batch) for batch in (1, 8, 64)},
    **{f"decode d{width}": _decode(width=width) for width in (64, 256)},
    **{f"decode d128 page {page}": _decode(page=page) for page in (16, 256)},
    "decode d128 f16": _decode(dtype="float16"),
    "decode d128 group of 1": _decode(1, kv_heads=32),
    "decode d128 group of 64": _decode(heads=64, kv_heads=1),
    "decode d128 ragged": _decode(ragged=True),
    "decode d128 rows per head, positions": _decode(row_per_head=True, ordered=False),
    "decode d128 window, soft cap": _decode(window=1000, soft_cap=30.0),
    "decode d256 positions, window": _decode(width=256, ordered=False, window=CONTEXT),
    **{
        f"decode d{width} {short}": _decode(width=width, codes=codes)
        for width in (64, 128, 256)
        for short, codes in (("int8", "int8"), ("fp8", "float8_e4m3fn"))
    },
    "decode d128 int8 positions": _decode(codes="int8", ordered=False),
    **{f"decode d{width} int4": _decode(width=width, codes="int4") for width in (64, 128)},
    "decode d128 int4 page 16": _decode(page=16, codes="int4"),
    "decode d128 int4 positions": _decode(codes="int4", ordered=False),
    "decode d128 kivi 2 bits": _decode(page=32, codes="kivi2"),
    "decode d128 kivi 4 bits": _decode(page=32, codes="kivi4"),
    "chunk d128 int4": replace(CHUNK, codes="int4"),
    "chunk d128 kivi 2 bits": replace(CHUNK, page=32, entries=CONTEXT // 32, codes="kivi2"),
    **{f"decode mla {heads} heads": replace(LATENT, heads=heads) for heads in (16, 64, 128)},
    "decode mla positions, window": replace(LATENT, heads=16, ordered=False, window=CONTEXT),
    "decode mla 128 heads one sequence": replace(LATENT, heads=128, batch=1),
    **{f"chunk d{width}": replace(CHUNK, width=width) for width in (64, 128, 256)},
    "chunk d128 page 16": replace(CHUNK, page=16, entries=CONTEXT // 16),
    "chunk d128 int8": replace(CHUNK, codes="int8"),
    "chunk d256 fp8": replace(CHUNK, width=256, codes="float8_e4m3fn"),
    "chunk d128 window, soft cap": replace(CHUNK, window=1000, soft_cap=30.0),
    "chunk d128 positions": replace(CHUNK, ordered=False),
    "chunk d128 of 8 tokens": _decode(tokens=8),
    "chunk mla": replace(LATENT, batch=1, heads=16, tokens=256),
    # 2.2e9 elements a pool: element numbers need more than 31 bits, bytes more than 32.
    "decode d128 pool of more than 2^31 elements": replace(_decode(4), pages=17000),
}
FULL_WEIGHTS = {
    **{f"weights d{width}": _decode(width=width) for width in (64, 128, 256)},
    "weights d128 rows per head, positions": _decode(row_per_head=True, ordered=False),
    "weights d128 int8": _decode(codes="int8"),
    "weights d256 fp8": _decode(width=256, codes="float8_e4m3fn"),
    "weights d128 chunk": _decode(2, tokens=64),
    "weights mla": replace(LATENT, heads=128),
}


def cases() -> Iterable[Case]:
    """All of them, the small ones first."""
    for name, shape in SMALL.items():
        yield case(name, shape, "small")
    for name, shape in SMALL_WEIGHTS.items():
        yield case(name, shape, "small", "paged_weights")
    for name, shape in FULL.items():
        yield case(name, shape, "full")
    for name, shape in FULL_WEIGHTS.items():
        yield case(name, shape, "full", "paged_weights")
