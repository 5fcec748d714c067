"""What the default device can run. Asked while tracing, where arrays do not yet have a device."""

from __future__ import annotations

import functools
import re

import jax


def default_device() -> jax.Device:
    """The device that arrays without one go to."""
    configured = getattr(jax.config, "jax_default_device", None)
    if configured is None:
        return jax.devices()[0]
    return jax.devices(configured)[0] if isinstance(configured, str) else configured


def device_kind() -> str:
    """The default device's name as its maker gives it, such as "NVIDIA H100 80GB HBM3"."""
    return default_device().device_kind


def compute_capability() -> str | None:
    """The default device's CUDA compute capability, such as "9.0"; None where it is no NVIDIA GPU."""
    device = default_device()
    return _capability(device.device_kind) if device.platform == "gpu" else None


@functools.cache
def _capability(kind: str) -> str | None:
    device = next(device for device in [default_device(), *jax.devices("gpu")] if device.device_kind == kind)
    capability = str(getattr(device, "compute_capability", ""))
    # AMD's plugin is a "gpu" too, and answers with the name of an architecture.
    return capability if re.fullmatch(r"\d+\.\d+", capability) else None


def lacks(*capabilities: str, least: str | None = None) -> str | None:
    """Why the default device is none of these compute capabilities, nor `least` or later; None if it is."""
    here = compute_capability()
    wanted = [*capabilities, *([] if least is None else [f"{least} or later"])]
    if here is None:
        return f"needs an NVIDIA GPU of compute capability {' or '.join(wanted)}; the default device is no such GPU"
    if here in capabilities or (least is not None and _number(here) >= _number(least)):
        return None
    return f"needs compute capability {' or '.join(wanted)}; the default device has {here}"


def _number(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))
