"""Which backend serves a call.

A backend is a module with `unsupported(**call) -> str | None` (the reason it cannot serve, or None) and the operations
themselves; one that needs a device has `unavailable() -> str | None` too (the reason the default device will not do).
`backend=None` takes the first that can; one asked for by name raises its reason rather than fall back, and is not asked
about the device: it may be lowered for another, or interpreted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Backend = Mapping[str, Callable[..., Any]]


def choose(operation: str, backends: Mapping[str, Backend], wanted: str | None, **call: Any) -> Callable[..., Any]:
    """The implementation of `operation` that serves this call.

    Raises:
      ValueError: the backend is unknown to this operation.
      NotImplementedError: the backend asked for cannot serve the call, or none can; the message holds every reason.
    """
    if wanted is not None and wanted not in backends:
        raise ValueError(f"{operation} has no backend {wanted!r}; it has: {', '.join(backends)}")
    reasons = []
    for name, backend in backends.items():
        if wanted in (None, name):
            reason = backend["unavailable"]() if wanted is None and "unavailable" in backend else None
            reason = reason or backend["unsupported"](**call)
            if reason is None:
                return backend[operation]
            reasons.append(f"{name}: {reason}")
    raise NotImplementedError(f"{operation} cannot be served: {'; '.join(reasons)}")
