"""What others take for the same call on the same GPU: cuDNN through JAX, and PyTorch's kernels, in processes apart.

Each is optional: one that is not installed, or cannot serve a call, says so.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.checks import timing
from pallas_kernels.checks.process import Lost, Process, answering

NAMES = ("cudnn", "torch sdpa", "torch flex", "flashinfer")
"""All of them; those after the first live in PyTorch."""
SECONDS = 90.0
"""What a peer may take for one call, its own compilation included."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A dense call in bfloat16, q [B, T, H, D], k and v [B, S, K, D].

    Attributes:
      kind: "forward"; "backward": that alone; "decode": one query token over a long context.
    """

    kind: Literal["forward", "backward", "decode"] | str
    batch: int
    tokens: int
    keys: int
    heads: int
    kv_heads: int
    width: int
    causal: bool


@dataclasses.dataclass(frozen=True)
class Peer:
    """Seconds a peer took, or the reason there are none."""

    name: str
    seconds: float | None = None
    reason: str = ""


def cudnn(call: Call) -> Peer:
    """cuDNN's attention, as `jax.nn.dot_product_attention` calls it."""
    if call.kind == "decode":
        return Peer("cudnn", reason="not compared: it has no pages")
    q = (call.batch, call.tokens, call.heads, call.width)
    k = (call.batch, call.keys, call.kv_heads, call.width)

    def inputs(seed: int) -> tuple[jax.Array, ...]:
        keys = jax.random.split(jax.random.key(seed), 4)
        return tuple(jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, (q, k, k, q), strict=True))

    def forward(q: Any, k: Any, v: Any, dout: Any = None) -> Any:
        return jax.nn.dot_product_attention(q, k, v, is_causal=call.causal, implementation="cudnn")

    def both(q: Any, k: Any, v: Any, dout: Any) -> Any:
        return jax.vjp(forward, q, k, v)[1](dout)

    try:
        seconds = timing.time_call(forward, inputs).seconds
        if call.kind == "backward":
            seconds = timing.time_call(both, inputs).seconds - seconds
    except Exception as error:
        return Peer("cudnn", reason=f"{type(error).__name__}: {error}".splitlines()[0][:300])
    return Peer("cudnn", seconds)


class Peers:
    """A process for each library, started when it is first needed; they end with the context."""

    def __init__(self) -> None:
        self._cudnn = Process("pallas_kernels.checks.peers")
        self._torch = Process("pallas_kernels.checks.torch_peers")

    def __enter__(self) -> Peers:
        """Starts nothing yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the processes."""
        self._cudnn.close()
        self._torch.close()

    def ask(self, name: str, call: Call, seconds: float = SECONDS) -> Peer:
        """What the peer of this name takes for a call."""
        process = self._cudnn if name == "cudnn" else self._torch
        try:
            return Peer(
                **json.loads(process.ask(json.dumps({"name": name, "call": dataclasses.asdict(call)}), seconds))
            )
        except Lost as lost:
            return Peer(name, reason=str(lost))


def serve(answer: Callable[[str, Call], Peer]) -> None:
    """A process's own side."""
    with answering() as (questions, answers):
        for line in questions:
            question = json.loads(line)
            peer = answer(question["name"], Call(**question["call"]))
            print(json.dumps(dataclasses.asdict(peer)), file=answers, flush=True)


if __name__ == "__main__":
    serve(lambda name, call: cudnn(call))
