"""What every Mosaic GPU kernel for Hopper shares: versions of jax, interpret mode, tiles in shared memory, products.

Supported are jax 0.10 to 0.12. Interpret mode (from 0.11 on) knows no accumulator that starts from a value and no
product whose left side lies in registers, so such products go through `accumulate` and `matmul_into`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import config as jax_config
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

JAX = tuple(int(part) for part in jax.__version__.split(".")[:2])
SHARED_MEMORY = 232448
"""Bytes of shared memory a block may have on an H100."""
LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)

REGISTERS = {1: (240, 40), 2: (240, 24), 3: (160, 32)}
"""Per number of consumers, the registers of a thread of theirs and of the producer's: 512 among all warpgroups."""

ROWS = plgpu.Layout.WGMMA.reduce(1)
"""How a vector with one number for each row of a product lies in registers."""
COLUMNS = plgpu.Layout.WGMMA.reduce(0)
"""The same for each column."""


def interpreted() -> bool:
    """Whether kernels traced now are interpreted on the CPU (`plgpu.force_gpu_interpret_mode`)."""
    return bool(jax_config.pallas_tpu_interpret_mode_context_manager.value)


def kernel(
    body: Callable[..., None],
    *,
    name: str,
    out_type: Any,
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    num_threads: int,
    thread_name: str = "warpgroup",
    scratch_types: Any = (),
    approx_math: bool = True,
    reduction_scratch_bytes: int = 2048,
    unsafe_no_auto_barriers: bool = False,
) -> Callable[..., Any]:
    """`plgpu.kernel` with what differs between versions settled.

    The last axis of `grid` runs fastest. `approx_math` takes the hardware's exp2, log and tanh.
    """

    def named(*refs: Any) -> None:
        body(*refs)

    named.__name__ = named.__qualname__ = name
    return plgpu.kernel(
        named,
        out_type=out_type,
        grid=grid,
        grid_names=grid_names,
        num_threads=num_threads,
        thread_name=thread_name,
        scratch_types=scratch_types,
        compiler_params=plgpu.CompilerParams(
            approx_math=approx_math,
            reduction_scratch_bytes=reduction_scratch_bytes,
            unsafe_no_auto_barriers=unsafe_no_auto_barriers,
            # The default differs between versions.
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
    )


def tiles(shape: tuple[int, ...], dtype: Any, columns: int | None = None) -> Any:
    """Shared memory for matrices [..., rows, columns] laid out as products and TMA copies want them.

    columns: of a tile, of which parts of the matrix must be made up: as many as fill 128 bytes, or fewer.
    """
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = math.gcd((columns or shape[-1]) * bits // 8, 128)
    transforms = (plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def load(ref: Any, layout: Any, *, optimized: bool = True) -> jax.Array:
    """The whole of `ref` (index it with `.at`) in registers, in `layout`."""
    if JAX < (0, 11):
        return plgpu.load(ref, (), layout=layout, optimized=optimized)
    return plgpu.load(ref, layout=layout, optimized=optimized)


def strided(ref: Any, step: int, first: int, layout: Any) -> jax.Array:
    """Every step-th of the numbers of `ref` [*, *] in shared memory from `first` on, as they lie there, in `layout`."""
    count = ref.shape[0] * ref.shape[1] // step
    if interpreted():
        found: jax.Array = ref[...].reshape(count, step)[:, first]
        return found
    # The compiler's choice of layouts knows no such view of shared memory; code given to it whole may have one.
    from jax.experimental.mosaic import gpu as mgpu

    def read(_: Any, memory: Any) -> Any:
        view = mgpu.memref_slice(mgpu.memref_reshape(memory, (count, step)), (slice(None), first))
        return mgpu.FragmentedArray.load_untiled(view, layout=layout.to_mgpu(), optimized=False)

    returned = plgpu.ShapeDtypeStruct((count,), ref.dtype, layout=layout)
    found = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=returned)(read)(ref)
    return found


def filled(shape: tuple[int, ...], value: Any, layout: Any, dtype: Any = jnp.float32) -> jax.Array:
    """An array of one value in registers, in `layout`."""
    return plgpu.layout_cast(jnp.full(shape, value, dtype), layout)


def rows_over(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """vector [rows] repeated along columns."""
    return jax.lax.broadcast_in_dim(vector, shape, [0])


def columns_over(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """vector [columns] repeated along rows."""
    return jax.lax.broadcast_in_dim(vector, shape, [1])


def within_loop(index: jax.Array | int, step: jax.Array) -> jax.Array:
    """`index`, for a loop's step (below 2**30), so that the compiler takes nothing made from it out of the loop.

    Otherwise it keeps the descriptors of all products with what does not change, two registers each, and spills.
    """
    return index + jax.lax.shift_right_logical(step, 30)


class Accumulator:
    """Stands in for `plgpu.ACC` in interpret mode."""

    def __init__(self, value: jax.Array) -> None:
        self.value = value


def matmul_into(acc: Any, a: Any, b: Any) -> None:
    """acc += a @ b on tensor cores; a in registers or shared memory, b in shared memory (`.transpose((1, 0))` is free).

    Asynchronous: what it reads must not change before `accumulate` or `product` returns.
    """
    if not isinstance(acc, Accumulator):
        plgpu.wgmma(acc, a, b)
        return
    left, right = (x if isinstance(x, jax.Array) else x[...] for x in (a, b))
    acc.value += jnp.dot(left, right, preferred_element_type=jnp.float32)
    # This read is generic, unlike the tensor core's: fence it before a copy may reuse the memory.
    plgpu.commit_smem()


def accumulate(body: Callable[[Any], None], init: Any) -> Any:
    """Runs `body(accumulator)`, in which `matmul_into` adds to `init`, and gives the sum once products are done.

    init: float32[64 m, columns] in `plgpu.Layout.WGMMA`, or a pytree of several; `body` gets the same structure.
    """
    if not interpreted():
        return pl.run_state(body)(jax.tree.map(plgpu.ACC.init, init))
    accumulators = jax.tree.map(Accumulator, init)
    body(accumulators)
    return jax.tree.map(lambda acc: acc.value, accumulators)


def product(a: Any, b: Any, meanwhile: Callable[[], None] | None = None) -> jax.Array:
    """a @ b, both in shared memory, float32; `meanwhile` runs while the tensor cores do."""

    def body(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, a, b)
        if meanwhile is not None:
            meanwhile()
        return acc[...]

    return pl.run_scoped(body, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))
