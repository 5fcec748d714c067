"""Which configurations are tried for which workloads; those that spill or overflow are left out without a GPU.

A candidate is a case like any other, whose call runs with its configuration forced.
"""

from __future__ import annotations

import ast
import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import pallas_kernels
from pallas_kernels import tuning
from pallas_kernels.attention import mosaic_gpu
from pallas_kernels.checks import lowering, workloads
from pallas_kernels.checks.case import Case
from pallas_kernels.checks.files import replace
from pallas_kernels.checks.gates import Verdict, brief
from pallas_kernels.paged_attention.triton_cases import DEVICES
from pallas_kernels.tuning import Key, bucket

FIELDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "forward": {"block": (64, 128), "stages": (2, 3), "consumers": (2, 3)},
    "dkv": {"stages": (2, 3), "split": (False, True)},
    "dq": {"key_block": (64, 128), "v_stages": (1, 2)},
    "fused": {"fused": (True,), "dout_stages": (1, 2), "dq_columns": (64, 128)},
    "decode": {"stages": (2, 4, 6), "splits": (1, 4, 8, 16, 32)},
    "latent": {"splits": (1, 2, 4, 8, 16, 32)},
    "triton_forward": {"rows": (64, 128), "columns": (32, 64), "warps": (8,), "stages": (2, 3)},
    "triton_decode": {"slots": (32, 64, 128), "stages": (2, 4), "splits": (1, 4, 8, 16, 32)},
    "backend": {"name": ("mosaic_gpu", "cudnn")},
}
"""Kernel -> what its configuration may say; of "backend", which one serves dense calls."""
SOURCES = {
    "forward": "attention.mosaic_gpu_forward",
    "dkv": "attention.mosaic_gpu_dkv",
    "dq": "attention.mosaic_gpu_dq",
    "fused": "attention.mosaic_gpu_fused",
    "decode": "paged_attention.mosaic_gpu",
    "latent": "paged_attention.mosaic_gpu",
    "triton_forward": "attention.triton",
    "triton_decode": "paged_attention.triton",
}
"""Kernel -> the module that makes it."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """Where a kernel has a choice, and the key under which the choice is kept.

    Attributes:
      make: backend -> the case.
    """

    operation: str
    key: Key
    make: Callable[[str], Case]

    @property
    def backend(self) -> str:
        """Whose kernel it is."""
        return "triton" if self.key.kernel.startswith("triton") else "mosaic_gpu"

    def serves_here(self) -> bool:
        """Whether the default device takes this kernel for such a call: Triton's where it has none of Mosaic GPU."""
        return (mosaic_gpu.unavailable() is None) == (self.backend == "mosaic_gpu")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A workload with one configuration; None: the kernel's own heuristic, which the others have to beat."""

    workload: Workload
    config: Mapping[str, Any] | None

    @property
    def case(self) -> Case:
        """The workload's case, run so."""
        config, key = self.config, self.workload.key
        case = self.workload.make(self.workload.backend)
        if self.workload.backend == "triton":
            case = dataclasses.replace(case, device=DEVICES)
        begin = f"tune {key.kernel} {case.name}"
        if config is None:
            return dataclasses.replace(case, name=f"{begin}: heuristic", baseline=None)
        chosen = ", ".join(f"{name} {value}" for name, value in config.items())
        if key.kernel == "backend":
            return dataclasses.replace(self.workload.make(config["name"]), name=f"{begin}: {chosen}", baseline=None)

        def call(*arguments: Any) -> Any:
            with tuning.forced(self.workload.operation, key.kernel, config):
                return case.call(*arguments)

        return dataclasses.replace(case, name=f"{begin}: {chosen}", call=call, baseline=None)

    @property
    def compiled(self) -> str | None:
        """What the compiler sees of it: much the same for every length and batch, which change nothing but numbers.

        None: there is nothing to prune, as the heuristic is always timed.
        """
        key = self.workload.key
        if self.config is None or key.kernel == "backend":
            return None
        pages = f" page {key.page} group {key.group}" if key.page else ""
        config = {n: "many" if n == "splits" and value > 1 else value for n, value in self.config.items()}
        chosen = ", ".join(f"{name} {value}" for name, value in config.items())
        return f"{key.kernel} d{key.width} {key.dtype}{pages}: {chosen}"


def all_workloads() -> list[Workload]:
    """What is tuned, the most telling first; backends are compared once their kernels are tuned."""
    found = []
    dense = list(itertools.product((16384, 2048), (128, 64, 256)))
    # The kernels of the backward pass follow each other, so each is tuned for itself; then both against the fused one.
    for kernel in ("forward", "dkv", "dq", "fused", "triton_forward"):
        make = workloads.forward if kernel.endswith("forward") else workloads.backward
        for tokens, width in dense:
            key = Key(kernel, "bfloat16", width, 0, 0, bucket(tokens), 0)
            found.append(Workload("attention", key, functools.partial(make, 2048 // width, width, True, tokens)))
    for context, batch, dtype, page in itertools.product((32768, 4096), (1, 8, 64), ("bfloat16", "int8"), (64, 16)):
        # Small pages are tuned where they matter most.
        if context * batch <= 2**19 and (page == 64 or (context, batch, dtype) == (32768, 8, "bfloat16")):
            for kernel in ("decode", "triton_decode"):
                key = Key(kernel, dtype, 128, 4, page, bucket(context), bucket(batch))
                decode = functools.partial(_decode, batch, dtype, context, page)
                found.append(Workload("paged_attention", key, decode))
    for batch in (1, 16):
        key = Key("latent", "bfloat16", 576, 64, 64, 32768, bucket(batch))
        found.append(Workload("paged_attention", key, functools.partial(_latent, batch)))
    for tokens, width in dense:
        key = Key("backend", "bfloat16", width, 0, 0, bucket(tokens), 0)
        found.append(
            Workload("attention", key, functools.partial(workloads.forward, 2048 // width, width, True, tokens))
        )
    return found


def _decode(batch: int, dtype: str, context: int, page: int, backend: str) -> Case:
    return workloads.decode(batch, dtype, context, page=page, backend=backend)


def _latent(batch: int, backend: str) -> Case:
    return workloads.latent(batch, 64, 32768, backend=backend)


def all_candidates() -> list[Candidate]:
    """Every configuration of every workload, the heuristic's first."""
    found = []
    for workload in all_workloads():
        heuristic = () if workload.key.kernel == "backend" else (None,)
        found += [Candidate(workload, config) for config in (*heuristic, *_grid(workload.key.kernel))]
    return found


def candidate_cases() -> list[Case]:
    """Their cases: what a process that compiles them asks for."""
    return [candidate.case for candidate in all_candidates()]


def _grid(kernel: str) -> list[dict[str, Any]]:
    fields = FIELDS[kernel]
    return [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]


@functools.cache
def fingerprint(kernel: str) -> str:
    """Changes with a kernel's source, with whatever of ours that imports, and with jax: what a verdict was about.

    It is that of the first call: what is edited while candidates are compiled comes too late for them.
    """
    digest = hashlib.sha256(jax.__version__.encode())
    for path in sorted(_imported(Path(pallas_kernels.__file__).parent, SOURCES[kernel])):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _imported(root: Path, module: str, found: frozenset[Path] = frozenset()) -> frozenset[Path]:
    """A module's file and those of all modules of ours that it imports."""
    path = root.joinpath(*module.split(".")).with_suffix(".py")
    if path in found or not path.is_file():
        return found
    found |= {path}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(root.name):
            inner = (node.module or "").removeprefix(root.name).removeprefix(".")
            for name in ("", *(alias.name for alias in node.names)):
                found = _imported(root, ".".join(filter(None, (inner, name))), found)
    return found


@dataclasses.dataclass
class Pruned:
    """Verdicts on candidates, kept in a file: those of a kernel that has changed since are forgotten."""

    path: Path
    verdicts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.is_file():
            self.verdicts = json.loads(self.path.read_text())

    def get(self, candidate: Candidate) -> bool | None:
        """Whether the candidate compiled without a fault; None: not known."""
        verdict = self.verdicts.get(candidate.compiled or "")
        if verdict is None or verdict["fingerprint"] != fingerprint(candidate.workload.key.kernel):
            return None
        passed: bool = verdict["passed"]
        return passed

    def put(self, candidate: Candidate, verdict: Verdict) -> None:
        """Takes in a verdict of the gate "compile", if it is one, and writes the file."""
        if verdict.passed is None or verdict.lost or candidate.compiled is None:
            return
        self.verdicts[candidate.compiled] = {
            "passed": verdict.passed,
            "reason": verdict.reason,
            "fingerprint": fingerprint(candidate.workload.key.kernel),
        }
        replace(self.path, json.dumps(self.verdicts, indent=1, sort_keys=True) + "\n")


def invalid(operation: str, held: Mapping[str, Any]) -> str | None:
    """Why an entry of a tuning table would not do, or None: its kernel is lowered for an H100 with it."""
    key = Key(**held["key"])
    workload = next((one for one in all_workloads() if (one.operation, one.key) == (operation, key)), None)
    if workload is None:
        return f"no workload of {operation} has the key {key}"
    try:
        lowering.lower(Candidate(workload, held["config"]).case)
    except Exception as error:
        return brief(error)
    return None


def entry(workload: Workload, config: Mapping[str, Any], seconds: float, heuristic: float | None) -> dict[str, Any]:
    """One line of a tuning table: the fastest configuration, its time and that of the heuristic."""
    return {
        "key": dataclasses.asdict(workload.key),
        "config": dict(config),
        "seconds": seconds,
        "heuristic_seconds": heuristic,
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def write_table(path: Path, device: str, entries: Sequence[Mapping[str, Any]]) -> None:
    """Adds entries to a table; one for the same key is replaced."""
    held = json.loads(path.read_text())["entries"] if path.is_file() else []
    fresh = [one["key"] for one in entries]
    kept = [one for one in held if one["key"] not in fresh]
    replace(path, json.dumps({"device": device, "entries": [*kept, *entries]}, indent=1) + "\n")
    tuning.table.cache_clear()
