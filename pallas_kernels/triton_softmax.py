"""What the Triton kernels share: capped scores and one step of a softmax kept up from block to block.

Imports triton at once, so whoever imports this does it where triton is known to be there.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def in_log2(scores, scale: tl.constexpr, soft_cap: tl.constexpr):
    """Scaled and capped scores in units of log 2, so that a softmax over them takes exp2."""
    if soft_cap is None:
        result = scores * (scale * LOG2_E)
    else:
        # tanh through one exponential: at either end that is 0 or infinite, and the result 1 or -1, never NaN.
        halves = 1.0 / (tl.exp2(scores * (2.0 * scale / soft_cap * LOG2_E)) + 1.0)
        result = (soft_cap * LOG2_E) * (1.0 - 2.0 * halves)
    return result


@triton.jit
def raised(top, scores):
    """A new row maximum over a block of scores [M, N]: the maximum, the shift for exp2, and how the past fades.

    The shift is 0 while a row has seen nothing: minus infinity less minus infinity would be NaN.
    """
    higher = tl.maximum(top, tl.max(scores, 1))
    shift = tl.where(higher == -float("inf"), 0.0, higher)
    return higher, shift, tl.exp2(top - shift)


@triton.jit
def finished(top, total, out):
    """The normalised output [M, D] and natural log-sum-exp [M] of rows; 0 and minus infinity where none was seen."""
    some = total > 0.0
    divisor = tl.where(some, total, 1.0)
    lse = tl.where(some, (top + tl.log2(divisor)) * LN_2, -float("inf"))
    return out / divisor[:, None], lse
