"""Which policies a select can choose among the entries of."""

from __future__ import annotations

from kvjax.cache.policies import Policy
from kvjax.cache.selects.protocol import Select
from kvjax.errors import ConfigError


def check_select(select: Select, policy: Policy) -> None:
    """Refuses what has no meaning together.

    Raises:
      ConfigError: naming both, and why.
    """
    reads = policy.reads(None)
    if len(reads) > 1 or any(read.turn is not None or read.lag is not None for read in reads):
        raise ConfigError(
            f"CacheConfig.select={select!r} cannot go with policy={policy!r}: a step turns its query to several "
            "positions, and by which of them it chooses is nowhere defined; take a policy that reads all it holds from "
            "one position, such as policies.SlidingWindow(window)"
        )
