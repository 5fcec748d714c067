"""What numbers were measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax


def about_machine(libraries: Sequence[str] = ("jax", "jaxlib", "flax", "numpy")) -> dict[str, Any]:
    """Date, processor, device, load and versions, as plain values."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": names[0] if names else platform.machine(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
        "load_before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in libraries},
    }


def machine_line(about: dict[str, Any]) -> str:
    """The same as one sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"{about['date']}, {about['processor']}, {about['cores']} cores, {about['platform']}, load before the run "
        f"{about['load_before']:.1f}; Python {about['python']}, {versions}."
    )
