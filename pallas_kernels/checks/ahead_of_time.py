"""The third gate: machine code for an H100, made without one, and what it says of registers, spills and tensor cores.

Kernels alone are compiled, for a described device: Mosaic GPU prints its machine code and ptxas' log, jax-triton leaves
its PTX in a folder. Needed beside jax: the CUDA plugin packages (not a GPU), ptxas and nvdisasm from NVIDIA's wheels or
the path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from pallas_kernels.checks.case import Case
from pallas_kernels.checks.lowering import H100, lower

SHARED_MEMORY = 232448
"""Bytes a block may have on an H100."""
TOOLS = {"ptxas": "nvidia-cuda-nvcc", "nvdisasm": "nvidia-cuda-nvdisasm"}
"""NVIDIA's tools and the packages that bring them."""
ATTENTION = ("attention", "paged_attention", "paged_weights", "shared_prefix")
"""Operations whose kernels must use the tensor cores."""

# What XLA asks a device for, here answered for an H100 SXM with 80 GB (datasheet, and CUDA's limits for 9.0).
_TARGET = f"""
platform_name: "CUDA"
device_description_str: "{H100}"
runtime_version {{ major: 13 minor: 0 }}
dnn_version_info {{ major: 9 minor: 12 }}
gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {SHARED_MEMORY}
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  device_memory_size: 84929347584
}}
"""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel's machine code.

    Attributes:
      registers: per thread, at launch.
      spill_bytes: stored to and loaded from local memory.
      shared_memory: bytes of a block; None where the compiler left no note of it, as Mosaic GPU in jax 0.10. (What is
        too much it refuses to lower.)
      hgmma: tensor core instructions of a warpgroup, 8-bit ones included; hmma: those of a warp.
      warnings: those of ptxas with a number, such as products serialised or register limits ignored.
    """

    name: str
    registers: int
    spill_bytes: int
    shared_memory: int | None
    hgmma: int
    hmma: int
    warnings: tuple[str, ...] = ()

    def faults(self, case: Case) -> list[str]:
        """Which of the rules this kernel of the case breaks."""
        found = [f"spills {self.spill_bytes} bytes"] if self.spill_bytes else []
        if self.shared_memory is not None and self.shared_memory > SHARED_MEMORY:
            found.append(f"{self.shared_memory} bytes of shared memory, over {SHARED_MEMORY}")
        if case.operation.split()[0] in ATTENTION:
            if case.backend == "mosaic_gpu" and not self.hgmma:
                found.append("no warpgroup products (HGMMA)")
            if case.backend == "triton" and not self.hgmma + self.hmma:
                found.append("no tensor core products")
        return found + [warning for warning in self.warnings if re.match(r"\(C75\d\d\)", warning)]


def missing() -> str | None:
    """Why nothing can be compiled ahead of time here, or None."""
    version = metadata.version("jaxlib")
    for package in ("jax-cuda13-plugin", "jax-cuda13-pjrt"):
        try:
            if (found := metadata.version(package)) != version:
                return f"{package} is {found} and jaxlib {version}"
        except metadata.PackageNotFoundError:
            return f"{package} is not installed"
    absent = [f"{tool} ({package})" for tool, package in TOOLS.items() if _tool(tool) is None]
    return f"there is no {' and no '.join(absent)}" if absent else None


@functools.cache
def _tool(name: str) -> str | None:
    try:
        # The namespace that NVIDIA's wheels share.
        roots = importlib.import_module("nvidia").__path__
    except ModuleNotFoundError:
        return shutil.which(name)
    wheels = (tool for root in roots for tool in Path(root).glob(f"*/bin/{name}"))
    return str(next(wheels, None) or shutil.which(name) or "") or None


@functools.cache
def _h100() -> Mesh:
    """One H100 to compile for."""
    return Mesh(topologies.get_topology_desc("h100", "cuda", topology="1x1x1", target_config=_TARGET).devices, ("gpu",))


def compile_case(case: Case) -> list[Kernel]:
    """The Mosaic GPU and Triton kernels of a full case, and nothing else of it."""
    with _left_by_triton() as folder:
        program: Any = lower(case).compiler_ir("stablehlo")
        # Triton compiles while it is lowered.
        made = [_triton_kernel(ptx) for ptx in sorted(folder.rglob("*.ptx"))]
    return made + [_mosaic_kernel(custom) for custom in dict.fromkeys(_mosaic_calls(program.operation))]


@dataclasses.dataclass(frozen=True)
class _MosaicCall:
    """A custom call of a lowered program: the kernel is one of its attributes, a module before Mosaic's own passes."""

    target: str
    attributes: tuple[tuple[str, bytes | bool], ...]


def _mosaic_calls(operation: Any) -> Iterator[_MosaicCall]:
    """The calls of Mosaic GPU kernels that an operation of MLIR is or holds, in order."""
    target = operation.attributes["call_target_name"].value if operation.name == "stablehlo.custom_call" else ""
    if target.startswith("mosaic_gpu"):
        values = ((entry.name, entry.attr) for entry in operation.attributes["mhlo.backend_config"])
        yield _MosaicCall(target, tuple((n, getattr(v, "value_bytes", None) or v.value) for n, v in values))
    for block in (block for region in operation.regions for block in region):
        for inner in block:
            yield from _mosaic_calls(inner.operation)


@functools.cache
def _mosaic_kernel(custom: _MosaicCall) -> Kernel:
    """Compiles a kernel alone: what is around it in its program, and even what it is given, has no part in that."""
    call = jax.ffi.ffi_call(custom.target, jax.ShapeDtypeStruct((), "int32"), has_side_effect=True)
    alone = jax.jit(lambda: call(**dict(custom.attributes)), out_shardings=NamedSharding(_h100(), PartitionSpec()))
    with use_abstract_mesh(_h100().abstract_mesh), _said_by_mosaic() as said:
        alone.trace().lower(lowering_platforms=("cuda",)).compile()
        return _read_mosaic(said())


@contextlib.contextmanager
def _said_by_mosaic() -> Iterator[Callable[[], str]]:
    """Within it, what Mosaic GPU compiles it prints, and nothing of that is seen; the function gives it.

    It could write to a folder, but then adds the program after every pass: 80 MB a kernel, and a third of the time.
    """
    variables = [f"MOSAIC_GPU_DUMP_{part}" for part in ("PTX", "PTXAS", "SASS", "HOST_LLVM")]
    sys.stdout.flush()
    with tempfile.TemporaryFile() as file:
        standard = os.dup(1)
        os.dup2(file.fileno(), 1)
        os.environ.update(dict.fromkeys(variables, "1"))
        try:
            yield lambda: os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")
        finally:
            for name in variables:
                os.environ.pop(name, None)
            os.dup2(standard, 1)
            os.close(standard)


@contextlib.contextmanager
def _left_by_triton() -> Iterator[Path]:
    """A folder that jax-triton leaves PTX in while it is open."""
    # jax-triton reads its variable when it is imported, and never again.
    triton = sys.modules.get("jax_triton.triton_lib")
    with tempfile.TemporaryDirectory(prefix="ahead_of_time_") as folder:
        os.environ["JAX_TRITON_DUMP_DIR"] = folder
        if triton is not None:
            triton._JAX_TRITON_DUMP_DIR = folder  # type: ignore[attr-defined]
            getattr(triton, "_COMPILED_KERNEL_CACHE", {}).clear()
        try:
            yield Path(folder)
        finally:
            os.environ.pop("JAX_TRITON_DUMP_DIR", None)
            if triton is not None:
                triton._JAX_TRITON_DUMP_DIR = None  # type: ignore[attr-defined]


def _read_mosaic(said: str) -> Kernel:
    """A kernel from what Mosaic GPU printed of it: PTX, ptxas' log, machine code, and the host's part."""
    name = re.search(r"\.entry (\w+)\(", said)
    assert name is not None, "Mosaic GPU printed no PTX"
    # Grid, cluster and block come before shared memory; jax 0.12 launches from a description of the kernel.
    launch = r"@mosaic_gpu_(?:launch_kernel|build_kernel_spec)\(ptr [^,]+, (?:i32 [^,]+, ){9}i32 (\d+)"
    memory = re.search(launch, said)
    return _kernel(name[1].removesuffix("_mosaic_gpu_kernel"), said, said, None if memory is None else int(memory[1]))


def _triton_kernel(ptx: Path) -> Kernel:
    """A kernel from its PTX and what lies beside it."""
    target = re.search(r"^\.target (\w+)", ptx.read_text(), re.MULTILINE)
    assert target is not None, f"{ptx.name} names no target"
    notes, binary = ptx.with_suffix(".compile_info"), ptx.with_suffix(".cubin")
    log = _run("ptxas", "-v", f"-arch={target[1]}", str(ptx), "-o", str(binary))
    memory = re.findall(r"shared_mem_bytes: (\d+)", notes.read_text()) if notes.exists() else []
    code = _run("nvdisasm", "-ndf", "-c", str(binary))
    return _kernel(re.sub(r"_\d+$", "", ptx.stem), log, code, int(memory[-1]) if memory else None)


def _kernel(name: str, log: str, code: str, shared_memory: int | None) -> Kernel:
    """From the log of ptxas -v and disassembled machine code."""
    used = re.search(r"Used (\d+) registers", log)
    assert used is not None, f"ptxas says nothing of registers: {log[-400:]}"
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return Kernel(
        name=name,
        registers=int(used[1]),
        spill_bytes=sum(int(stores) + int(loads) for stores, loads in spills),
        shared_memory=shared_memory,
        hgmma=len(re.findall(r"\b[HQI]GMMA\b", code)),
        hmma=len(re.findall(r"\b[HQI]MMA\b", code)),
        warnings=tuple(re.findall(r"^ptxas info +: (\(C\d+\).*)$", log, re.MULTILINE)),
    )


def _run(tool: str, *arguments: str) -> str:
    path = _tool(tool)
    assert path is not None, f"there is no {tool}"
    done = subprocess.run([path, *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stdout[-2000:]}")
    return done.stdout
