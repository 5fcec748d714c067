"""How many programs XLA has compiled in this process."""

from __future__ import annotations

import itertools

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_seen = itertools.count()
_last = 0


def _listen(event: str, duration_secs: float, **details: str | int) -> None:
    global _last
    if event == _EVENT:
        _last = next(_seen) + 1


jax.monitoring.register_event_duration_secs_listener(_listen)


def compiled_programs() -> int:
    """Programs compiled, or fetched from the persistent compilation cache, since the process began."""
    return _last
