"""The workloads whose speed decides, each with the goal it is held to: cases that run before all others."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from pallas_kernels import tuning
from pallas_kernels.attention.mosaic_gpu_call import SERVES_FUSED
from pallas_kernels.checks import workloads
from pallas_kernels.checks.case import Case
from pallas_kernels.checks.peers import Call
from pallas_kernels.paged_attention import cases as paged_cases

TOKENS, CHANNELS = 16384, 2048
"""Of the dense workloads: one sequence of 16k tokens, as many heads as fill 2048 channels."""
CONTEXT = 32768
"""Of the paged ones."""


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a workload is to reach.

    Attributes:
      measure: "peer": no slower than `peer`; "rate": `least` FLOP/s; "copy": `least` of the measured copy rate;
        "numbers": only right.
    """

    measure: Literal["peer", "rate", "copy", "numbers"]
    least: float = 1.0
    peer: str = ""

    def __str__(self) -> str:
        return {
            "peer": f"no slower than {self.peer}",
            "rate": f"{self.least / 1e12:.0f} TFLOP/s",
            "copy": f"{self.least:.0%} of the copy rate",
            "numbers": "right numbers",
        }[self.measure]


@dataclasses.dataclass(frozen=True)
class Target:
    """A workload.

    Attributes:
      peer_call: the same call as peers are asked for it; None: it has no peer.
      forward: the name of the case whose time is taken off before a rate is computed, for backward passes.
    """

    case: Case
    goal: Goal
    peer_call: Call | None = None
    forward: str | None = None


def targets() -> list[Target]:
    """All of them, the most telling first."""
    causal = {width: _forward(width, True) for width in (128, 64, 256)}
    full = [_forward(width, False) for width in (128, 64, 256)]
    forms = (False, True) if SERVES_FUSED else (False,)
    return [
        causal[128],
        _decode(8, "bfloat16", 0.9),
        *(_backward(causal[128], 128, 500e12, fused) for fused in forms),
        _plain(workloads.latent(16, 64, CONTEXT), Goal("copy", 0.85)),
        causal[64],
        causal[256],
        _decode(8, "int8", 0.75),
        _decode(8, "float8_e4m3fn", 0.75),
        _packed("int4"),
        _packed("kivi 2 bits"),
        *(_backward(causal[256], 256, 400e12, fused) for fused in forms),
        _plain(workloads.large_pool(), Goal("numbers")),
        *full,
        _plain(workloads.latent(16, 128, CONTEXT), Goal("copy", 0.85)),
        _decode(1, "bfloat16", 0.9),
    ]


def _named(case: Case) -> Case:
    return dataclasses.replace(case, name=f"target {case.name}")


def _plain(case: Case, goal: Goal) -> Target:
    return Target(_named(case), goal)


def _forward(width: int, causal: bool) -> Target:
    heads = CHANNELS // width
    call = Call("forward", 1, TOKENS, TOKENS, heads, heads, width, causal)
    return Target(_named(workloads.forward(heads, width, causal, TOKENS)), Goal("peer", peer="cudnn"), call)


def _backward(forward: Target, width: int, least: float, fused: bool) -> Target:
    """In two kernels, or fused in one: side by side, whichever of them is tuned. Peers are asked once."""
    heads = CHANNELS // width
    call = None if fused else Call("backward", 1, TOKENS, TOKENS, heads, heads, width, True)
    tuned = workloads.backward(heads, width, True, TOKENS)

    def forced(*arrays: Any) -> Any:
        with tuning.forced("attention", "fused", {"fused": fused}):
            return tuned.call(*arrays)

    name = f"{tuned.name}, {'fused' if fused else 'two kernels'}"
    return Target(
        _named(dataclasses.replace(tuned, name=name, call=forced)), Goal("rate", least), call, forward.case.name
    )


def _packed(codes: str) -> Target:
    """The same shape from codes that share bytes; what is moved are codes, scales and minima. No goal is set for it."""
    name = f"decode d128 {codes}"
    return _plain(paged_cases.case(f"{name} 32k", paged_cases.FULL[name], "full"), Goal("numbers"))


def _decode(batch: int, dtype: str, least: float) -> Target:
    """32 query and 8 KV heads of 128, as in an 8B model."""
    call = Call("decode", batch, 1, CONTEXT, 32, 8, 128, False) if dtype == "bfloat16" else None
    return Target(_named(workloads.decode(batch, dtype, CONTEXT)), Goal("copy", least), call)
