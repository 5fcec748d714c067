"""Codecs that were calibrated on a model: how they are told, and what cannot go with them."""

from __future__ import annotations

from typing import Any

from kvjax.errors import ConfigError


def calibrated(codec: Any) -> bool:
    """`calibrated`: codes keys unrotated, keys and values each layer its own way, and the first tokens not at all.

    Without: every vector alike, keys rotated.
    """
    found: bool = getattr(codec, "calibrated", False)
    return found


def first_tokens(codec: Any) -> int:
    """How many of a sequence's first tokens lie exact beside the pages."""
    return codec.first if calibrated(codec) else 0


def check_calibrated(codec: Any, policy: Any) -> None:
    """Refuses what a calibrated codec cannot serve.

    Raises:
      ConfigError: naming what was given, and why.
    """
    if not calibrated(codec):
        return
    if hasattr(policy, "merge") or hasattr(policy, "decide"):
        raise ConfigError(
            f"CacheConfig.codec={codec!r} cannot go with policy={policy!r}: it blends tokens of several positions, and "
            "this codec keeps the first tokens apart by their position and the others in ranges that were calibrated "
            "on single keys; take a policy that keeps tokens as they are, such as policies.Full(), or another codec, "
            "such as codecs.Int4()"
        )
