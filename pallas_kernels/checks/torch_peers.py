"""PyTorch's side of `peers`: `python -m pallas_kernels.checks.torch_peers` answers questions.

Times are those of CUDA events, medians of 20, over buffers that together exceed the second-level cache.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

from pallas_kernels.checks.peers import Call, Peer, serve
from pallas_kernels.checks.timing import MOST_SETS, REPEATS, SHORTEST, WORKING_SET


def _time(run: Callable[[Any], Any], sets: list[Any]) -> float:
    """Seconds of one call, `run` taking the sets in turn."""
    import torch

    def span(count: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for i in range(count):
            run(sets[i % len(sets)])
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / count

    for _ in range(2):
        first = span(len(sets))
    count = max(round(SHORTEST / max(first, 1e-6)), len(sets))
    return statistics.median(span(count) for _ in range(REPEATS))


def _inputs(call: Call) -> list[tuple[Any, ...]]:
    """Sets of q [B, H, T, D], k, v [B, K, S, D]."""
    import torch

    q = (call.batch, call.heads, call.tokens, call.width)
    k = (call.batch, call.kv_heads, call.keys, call.width)
    size = 2 * (call.heads * call.tokens + 2 * call.kv_heads * call.keys) * call.batch * call.width
    count = min(max(-(-WORKING_SET // size), 1), MOST_SETS)
    needs = call.kind == "backward"
    return [
        tuple(torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=needs) for s in (q, k, k))
        for _ in range(count)
    ]


def _dense(call: Call, attend: Callable[..., Any]) -> float:
    """Seconds of `attend(q, k, v)`, or of its backward pass alone."""
    import torch

    sets = _inputs(call)
    if call.kind != "backward":
        with torch.no_grad():
            return _time(lambda qkv: attend(*qkv), sets)
    graphs = [(attend(*qkv), qkv) for qkv in sets]
    dout = torch.randn_like(graphs[0][0])
    return _time(lambda pair: torch.autograd.grad(pair[0], pair[1], dout, retain_graph=True), graphs)


def sdpa(call: Call) -> float:
    """`scaled_dot_product_attention`, which chooses its own kernel."""
    from torch.nn.functional import scaled_dot_product_attention

    grouped = call.heads != call.kv_heads
    return _dense(
        call, lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=call.causal, enable_gqa=grouped)
    )


def flex(call: Call) -> float:
    """FlexAttention, compiled."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = None
    if call.causal:
        rule = lambda b, h, q, k: q >= k  # noqa: E731
        mask = create_block_mask(rule, None, None, call.tokens, call.keys, device="cuda")
    attend = torch.compile(flex_attention, dynamic=False)
    grouped = call.heads != call.kv_heads
    return _dense(call, lambda q, k, v: attend(q, k, v, block_mask=mask, enable_gqa=grouped))


def flashinfer(call: Call) -> float:
    """FlashInfer: its prefill kernel, and for decoding its paged one with pages of 16."""
    import torch

    library: Any = importlib.import_module("flashinfer")
    if call.kind == "backward":
        raise NotImplementedError("FlashInfer has no backward pass")
    if call.kind == "forward":
        return _dense(
            call,
            lambda q, k, v: library.single_prefill_with_kv_cache(
                *(x[0].transpose(0, 1) for x in (q, k, v)), causal=call.causal
            ),
        )
    page = 16
    entries = call.keys // page
    cuda = functools.partial(torch.arange, device="cuda", dtype=torch.int32)
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(torch.empty(2**27, dtype=torch.uint8, device="cuda"), "NHD")
    wrapper.plan(
        cuda(call.batch + 1) * entries,
        torch.randperm(call.batch * entries, device="cuda").int(),
        torch.full((call.batch,), page, dtype=torch.int32, device="cuda"),
        call.heads,
        call.kv_heads,
        call.width,
        page,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    q = torch.randn(call.batch, call.heads, call.width, device="cuda", dtype=torch.bfloat16)
    pool = (call.batch * entries, 2, page, call.kv_heads, call.width)
    sets = [torch.randn(pool, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    return _time(lambda pages: wrapper.run(q, pages), sets)


PEERS: dict[str, tuple[str, Callable[[Call], float]]] = {
    "torch sdpa": ("torch", sdpa),
    "torch flex": ("torch", flex),
    "flashinfer": ("flashinfer", flashinfer),
}
"""Name -> the package it needs and what times it."""


def answer(name: str, call: Call) -> Peer:
    """A peer's time, or why there is none."""
    package, measure = PEERS[name]
    if importlib.util.find_spec(package) is None:
        return Peer(name, reason=f"{package} is not installed")
    import torch

    if not torch.cuda.is_available():
        return Peer(name, reason="torch sees no GPU")
    try:
        return Peer(name, measure(call))
    except Exception as error:
        return Peer(name, reason=f"{type(error).__name__}: {error}".splitlines()[0][:300])
    finally:
        torch.cuda.empty_cache()


if __name__ == "__main__":
    serve(answer)
