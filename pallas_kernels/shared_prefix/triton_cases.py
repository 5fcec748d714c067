"""Attention over shared prefixes through the Triton kernels of paged attention."""

from __future__ import annotations

from collections.abc import Iterable

from pallas_kernels.checks.case import Case
from pallas_kernels.paged_attention.triton_cases import DEVICES
from pallas_kernels.shared_prefix.cases import cases_for


def cases() -> Iterable[Case]:
    """As many as there are for Mosaic GPU."""
    return cases_for("triton", DEVICES)
