"""The shapes at which dense attention on TPUs is interpreted and lowered. Gradients are of both outputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pallas_kernels.attention.cases import case
from pallas_kernels.checks.case import Case
from pallas_kernels.checks.numerics import LSE_TOLERANCE

ROUNDED = 4e-3
"""Of log-sum-exps where the scale is no power of two: it rounds queries once more, to bfloat16. That moves a score of
order 1 by 2^-9 / sqrt(3) as a standard deviation, and a query that sees one key has that score for its log-sum-exp."""
SMALL: dict[str, tuple[tuple[int, int, int, int, int, int, int], dict[str, Any]]] = {
    "causal group2 d64": ((2, 130, 130, 2, 1, 64, 64), {}),
    "ragged d192/128, queries at the end": ((2, 70, 300, 1, 1, 192, 128), dict(lengths=(299, 0))),
    "window cap d64": ((1, 130, 300, 1, 1, 64, 64), dict(window=70, soft_cap=2.0)),
    "segments sinks d128": ((1, 200, 200, 2, 2, 128, 128), dict(segments=True, sinks=True)),
    "not causal d64": ((1, 65, 130, 2, 1, 64, 64), dict(causal=False)),
}
FULL: dict[str, tuple[tuple[int, int, int, int, int, int, int], dict[str, Any]]] = {
    **{f"d{width} group4 causal": ((2, 4096, 4096, 16, 4, width, width), {}) for width in (64, 128, 256)},
    "d256 group4 cap window": ((2, 4096, 4096, 16, 4, 256, 256), dict(soft_cap=30.0, window=1024)),
    "d192/128 ragged": ((4, 777, 2000, 8, 8, 192, 128), dict(lengths=(2000, 1, 0, 1500))),
    "d128 segments": ((2, 2048, 2048, 8, 1, 128, 128), dict(segments=True)),
    "d128 not causal": ((2, 1000, 3000, 8, 8, 128, 128), dict(causal=False)),
}


def cases() -> Iterable[Case]:
    """Forward and backward of every shape, the small ones first."""
    for size, shapes in (("small", SMALL), ("full", FULL)):
        for name, (shape, options) in shapes.items():
            for gradient in (False, True):
                what = "tpu gradient" if gradient else "tpu"
                within = LSE_TOLERANCE if shape[5] in (64, 256) else ROUNDED
                given = dict(options, gradient=gradient, backend="tpu", lse_tolerance=within)
                yield case(f"{what} {name}{' small' if size == 'small' else ''}", size, shape, **given)
