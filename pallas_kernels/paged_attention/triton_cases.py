"""The shapes at which the Triton kernels of paged attention are checked. Making the list needs no triton."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from pallas_kernels.checks.case import Case
from pallas_kernels.checks.numerics import TOLERANCES
from pallas_kernels.paged_attention.shapes import Shape, around_a_page, attend, exact, inputs, weigh

DEVICES = ("8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "12.0")


def case(name: str, shape: Shape, size: Any = "full", operation: str = "paged_attention") -> Case:
    """One case. Bytes and arithmetic are those of full lengths; a window's or a ragged batch's are not counted."""
    call = attend if operation == "paged_attention" else weigh
    slots = shape.batch * shape.slots * shape.kv_heads
    weights = operation == "paged_weights"
    vectors = 1 if shape.value or weights else 2
    per_slot = vectors * shape.vector_bytes
    widths = shape.width + (0 if weights else shape.value or shape.width)
    plain = shape.window is None and not shape.ragged
    return Case(
        name=f"triton {name}",
        operation=operation,
        backend="triton",
        size=size,
        inputs=inputs(shape),
        call=call(shape, "triton"),
        reference=exact(shape, call),
        tolerance=TOLERANCES[shape.dtype],
        flops=2.0 * shape.batch * shape.tokens * shape.heads * shape.slots * widths if plain else None,
        bytes_moved=float(slots * per_slot) + (4.0 * slots if weights else 0.0) if plain else None,
        device=DEVICES if shape.codes != "float8_e4m3fn" else DEVICES[3:],
        baseline=call(shape, "xla"),
    )


TINY = Shape(batch=3, heads=4, kv_heads=2, width=32, page=16, entries=5, dtype="float16", ragged=True)
"""For Triton's interpreter, which has no bfloat16 products."""
SMALL = {
    "decode": TINY,
    "decode lengths around a page": around_a_page(TINY),
    "decode rows per head, window, soft cap": dataclasses.replace(TINY, row_per_head=True, window=20, soft_cap=5.0),
    "decode positions, window": dataclasses.replace(TINY, ordered=False, window=90),
    "decode mla": dataclasses.replace(TINY, kv_heads=1, width=80, value=64),
    "decode mla, value beyond a power of two": dataclasses.replace(TINY, kv_heads=1, width=80, value=48),
    "decode int8": dataclasses.replace(TINY, codes="int8"),
    "decode mla fp8": dataclasses.replace(TINY, kv_heads=1, width=80, value=64, codes="float8_e4m3fn"),
    "decode group of 3, page of 8": dataclasses.replace(TINY, heads=6, page=8, entries=9),
    "chunk": dataclasses.replace(TINY, tokens=20),
    "decode int4": around_a_page(dataclasses.replace(TINY, width=64, codes="int4")),
    "decode int4, rows per head, positions": dataclasses.replace(
        TINY, width=64, codes="int4", row_per_head=True, ordered=False
    ),
    "decode kivi 2 bits": around_a_page(dataclasses.replace(TINY, width=128, codes="kivi2", page=32)),
    "decode kivi 4 bits, positions, window": dataclasses.replace(
        TINY, width=64, codes="kivi4", page=32, entries=4, ordered=False, window=90
    ),
    "decode mla int4": dataclasses.replace(TINY, kv_heads=1, width=96, value=64, codes="int4"),
    "decode mla kivi 2 bits": dataclasses.replace(
        TINY, kv_heads=1, width=96, value=64, codes="kivi2", page=32, entries=4
    ),
    "chunk int4": dataclasses.replace(TINY, width=64, tokens=20, codes="int4"),
    "chunk kivi 2 bits": dataclasses.replace(TINY, width=64, tokens=20, codes="kivi2", page=32, entries=4),
}
SMALL_WEIGHTS = (
    "decode",
    "decode rows per head, window, soft cap",
    "decode positions, window",
    "decode int8",
    "chunk",
    "decode int4",
    "decode kivi 2 bits",
)
LATENT = Shape(batch=16, heads=128, kv_heads=1, width=576, value=512)
KIVI = Shape(codes="kivi2", page=32, entries=256)
FULL = {
    **{f"decode d{width}": Shape(width=width) for width in (64, 128, 256)},
    "decode d96": Shape(width=96, heads=8),
    "decode d128 f16": Shape(dtype="float16"),
    "decode d128 page 16": Shape(page=16, entries=512),
    "decode d128 one sequence of 32k": Shape(batch=1, entries=512),
    "decode d128 group of 1": Shape(kv_heads=32, entries=64),
    "decode d128 group of 32": Shape(kv_heads=1, heads=32, entries=512),
    "decode d128 ragged": Shape(ragged=True),
    "decode d128 rows per head": Shape(row_per_head=True),
    "decode d128 window, soft cap": Shape(window=1000, soft_cap=30.0),
    "decode d128 positions": Shape(ordered=False),
    "decode d64 int8": Shape(width=64, codes="int8"),
    "decode d128 int8": Shape(codes="int8"),
    "decode d128 fp8": Shape(codes="float8_e4m3fn"),
    "decode d256 int8": Shape(width=256, codes="int8"),
    "decode mla positions, window": dataclasses.replace(LATENT, heads=16, ordered=False, window=8192),
    **{f"decode mla {heads} heads": dataclasses.replace(LATENT, heads=heads) for heads in (16, 32, 64, 128)},
    "decode mla 16 heads int8": dataclasses.replace(LATENT, heads=16, codes="int8"),
    "decode mla 128 heads int8": dataclasses.replace(LATENT, codes="int8"),
    "decode mla 128 heads fp8": dataclasses.replace(LATENT, codes="float8_e4m3fn"),
    **{f"chunk d{width}": Shape(batch=2, tokens=512, width=width) for width in (64, 128, 256)},
    "chunk d128 int8": Shape(batch=2, tokens=512, codes="int8"),
    **{f"decode d{width} int4": Shape(width=width, codes="int4") for width in (64, 96, 128, 256)},
    "decode d128 int4 f16": Shape(codes="int4", dtype="float16"),
    "decode d128 int4 rows per head, positions": Shape(codes="int4", row_per_head=True, ordered=False),
    **{f"decode d{width} kivi 2 bits": dataclasses.replace(KIVI, width=width) for width in (64, 128, 256)},
    "decode d128 kivi 4 bits": dataclasses.replace(KIVI, codes="kivi4"),
    "decode d128 kivi 2 bits window, soft cap": dataclasses.replace(KIVI, window=1000, soft_cap=30.0),
    "decode mla 16 heads int4": dataclasses.replace(LATENT, heads=16, codes="int4"),
    "decode mla 128 heads int4": dataclasses.replace(LATENT, codes="int4"),
    "decode mla 128 heads kivi 2 bits": dataclasses.replace(LATENT, codes="kivi2", page=32, entries=256),
    "chunk d128 int4": Shape(batch=2, tokens=512, codes="int4"),
    "chunk d128 kivi 2 bits": dataclasses.replace(KIVI, batch=2, tokens=512),
    "chunk d256 int4": Shape(batch=2, tokens=512, width=256, codes="int4"),
    "chunk d128 window, soft cap": Shape(batch=2, tokens=512, window=1000, soft_cap=30.0),
    "chunk d128 positions": Shape(batch=2, tokens=512, ordered=False),
    "chunk d128 of 8 tokens": Shape(tokens=8),
    "chunk d256 int8": Shape(batch=2, tokens=512, width=256, codes="int8"),
    "chunk mla": dataclasses.replace(LATENT, batch=1, heads=16, tokens=512),
    # More than 2^31 elements: addresses need 64 bits.
    "decode d128 pool of 2^31 elements and more": Shape(pages=17000, kv_heads=8, value=128),
}
WEIGHTS = {
    "weights d128": Shape(),
    "weights d128 rows per head, positions": Shape(row_per_head=True, ordered=False),
    "weights d256 int8": Shape(width=256, codes="int8"),
    "weights d128 int4": Shape(codes="int4"),
    "weights d128 kivi 2 bits": KIVI,
    "weights d128 chunk": Shape(batch=2, tokens=64),
    "weights mla": dataclasses.replace(LATENT, batch=4),
}


def cases() -> Iterable[Case]:
    """All of them, the small ones first."""
    yield from (case(f"{name} small", shape, "small") for name, shape in SMALL.items())
    for name in SMALL_WEIGHTS:
        yield case(f"weights {name} small", SMALL[name], "small", "paged_weights")
    yield from (case(name, shape) for name, shape in FULL.items())
    yield from (case(name, shape, operation="paged_weights") for name, shape in WEIGHTS.items())
