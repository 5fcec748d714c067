"""Codecs that code tokens only once a group of them is complete: how they are told, and what cannot go with them."""

from __future__ import annotations

from typing import Any

from kvjax.errors import ConfigError


def waits(codec: Any) -> bool:
    """`waits`: the newest tokens stay exact beside the pages, and are coded later. Without: every token at once."""
    found: bool = getattr(codec, "waits", False)
    return found


def check_waiting(codec: Any, policy: Any, page_size: int | None = None) -> None:
    """Refuses what a waiting codec cannot serve.

    Raises:
      ConfigError: naming what was given, and why.
    """
    if not waits(codec):
        return
    if page_size is not None and page_size != codec.page_size:
        raise ConfigError(
            f"CacheConfig.page_size={page_size} cannot go with codec={codec!r}: a page is the group of tokens whose "
            f"keys share their scales; give page_size={codec.page_size} or None"
        )
    if not policy.append_only:
        raise ConfigError(
            f"CacheConfig.codec={codec!r} cannot go with policy={policy!r}: it codes the keys of a whole page "
            "together, so no slot may be overwritten; take a policy that only appends, such as policies.Full(), or a "
            "codec that codes each token by itself, such as codecs.Int4()"
        )
    if any((read.first, read.last, read.turn, read.lag) != (0, None, None, None) for read in policy.reads(None)):
        raise ConfigError(
            f"CacheConfig.codec={codec!r} cannot go with policy={policy!r}: its reads cover or turn to some "
            "positions only, and the exact newest tokens are read with all that is held; take a policy with one "
            "read of everything, such as policies.Full()"
        )
