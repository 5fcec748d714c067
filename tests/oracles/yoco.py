"""YOCO, a decoder-decoder (Sun et al. 2024, 2405.05254): one sequence, float64.

The first half of the layers, the self-decoder, keeps a bounded state each: a matrix per head (gated retention) or a
window of keys and values. Its output makes one pair of keys and values per token, which all cross-decoder layers read.

Two forms. `forward` is the whole sequence through every layer. `prefill` and `step` hold a `Cache`: a prompt goes
through the self-decoder in chunks, and only its last token through the cross-decoder.

Parameters, D hidden, d head width, Hs heads of the self-decoder, H and K query and KV heads of the cross-decoder:

    embed/embedding [V, D]   norm/scale [D]   head/weight [V, D]
    bridge/norm/scale [D]   bridge/{k, v}/weight [K d, D]: the global keys and values
    layers_i/attention_norm/scale, layers_i/mlp_norm/scale [D]   layers_i/mlp/{gate, up, down}/weight
    layers_i/attention of the self-decoder with retention: {q, k, v, gate}/weight [Hs d, D], decay/weight [Hs, D],
        o/weight [D, Hs d]; with a window: {q, k, v, o}/weight; of the cross-decoder: {q, o}/weight
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tests.oracles.blocks import Random, Weights, attend, heads_of, rotate_neighbours, silu, swiglu
from tests.oracles.decoder import dense, rms_norm


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the arrays' shapes do not say.

    Attributes:
      num_layers: even, half of them each. num_heads: of the cross-decoder. self_heads: of the self-decoder.
      window: how many positions a self-decoder layer sees, its own included; None: it has retention.
    """

    num_layers: int
    num_heads: int
    self_heads: int
    window: int | None = None
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def self_layers(self) -> int:
        """Layers of the self-decoder."""
        return self.num_layers // 2


# Gated retention: q, k, v [T, H, d], rotated; log_decay [T, H] = log gamma; a state S is [H, d, d].


class Retention(NamedTuple):
    """What is given to a retention head for each token."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    log_decay: np.ndarray

    def tokens(self, start: int, end: int) -> Retention:
        """Tokens start .. end."""
        return Retention(*(array[start:end] for array in self))


def retention_parallel(r: Retention) -> np.ndarray:
    """o_t = sum over j <= t of (product of gamma over j < i <= t) (q_t . k_j) d^-1/2 v_j: [T, H, d]."""
    total = np.cumsum(r.log_decay, axis=0)
    causal = np.tril(np.ones((len(total), len(total)), bool))[..., None]
    decay = np.exp(np.where(causal, total[:, None] - total[None], -np.inf))
    scores = np.einsum("thd,jhd->tjh", r.q, r.k) * r.q.shape[-1] ** -0.5
    return np.einsum("tjh,jhe->the", scores * decay, r.v)


def retention_recurrent(r: Retention, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """S_t = gamma_t S_(t-1) + d^-1/2 k_t' v_t, o_t = q_t S_t. Returns o [T, H, d] and the last state."""
    out = np.zeros_like(r.v)
    for t in range(len(r.q)):
        write = np.einsum("hd,he->hde", r.k[t], r.v[t]) * r.q.shape[-1] ** -0.5
        state = np.exp(r.log_decay[t])[:, None, None] * state + write
        out[t] = np.einsum("hd,hde->he", r.q[t], state)
    return out, state


def retention_chunk(r: Retention, state: np.ndarray, valid: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """One chunk: what came before through the state, the chunk itself in parallel. Returns o and the next state.

    Tokens where valid bool[T] is false, at the end, do not decay the state and write nothing; their o is of no use.
    """
    if valid is not None:
        r = r._replace(k=r.k * valid[:, None, None], log_decay=r.log_decay * valid[:, None])
    total = np.cumsum(r.log_decay, axis=0)
    cross = np.einsum("thd,hde->the", r.q * np.exp(total)[..., None], state)
    left = np.exp(total[-1] - total)[..., None] * r.q.shape[-1] ** -0.5
    next_state = np.exp(total[-1])[:, None, None] * state + np.einsum("thd,the->hde", r.k * left, r.v)
    return cross + retention_parallel(r), next_state


def log_decay(x: np.ndarray, weights: Weights) -> np.ndarray:
    """log gamma = log sigmoid(x W) / 16: [T, Hs]."""
    return -np.logaddexp(0.0, -dense(x, weights["decay"])) / 16.0


# The network.


def rope_frequencies(width: int, theta: float) -> np.ndarray:
    """From 1 to 1 / theta, both included: [width / 2]."""
    return theta ** -np.linspace(0.0, 1.0, width // 2)


def forward(params: Weights, shape: Shape, tokens: Sequence[int]) -> np.ndarray:
    """Every token through every layer: logits [T, V]."""
    x = embed(params, tokens)
    positions = np.arange(len(tokens))

    def mix(weights: Weights) -> Callable[[np.ndarray], np.ndarray]:
        def whole(h: np.ndarray) -> np.ndarray:
            if shape.window is None:
                r = retention_inputs(weights["attention"], h, positions, shape)
                return retention_output(weights["attention"], h, retention_parallel(r), shape.norm_eps)
            q, k, v = window_inputs(weights["attention"], h, positions, shape)
            distance = positions[:, None] - positions
            out = attend(q, k, v, (distance >= 0) & (distance < shape.window))
            return dense(out.reshape(len(h), -1), weights["attention"]["o"])

        return whole

    for i in range(shape.self_layers):
        weights = params[f"layers_{i}"]
        x = block(weights, x, mix(weights), shape.norm_eps)
    k, v = bridge(params, shape, x, positions)
    return cross_decoder(params, shape, x, positions, k, v)


@dataclasses.dataclass
class Cache:
    """What is kept of the tokens seen.

    Attributes:
      k, v: [n, K, d], rotated: the one pair all cross-decoder layers read.
      states: per self-decoder layer, (S [Hs, d, d],) or (k, v) of its window, [at most window, heads, d] each.
    """

    k: np.ndarray
    v: np.ndarray
    states: list[tuple[np.ndarray, ...]]

    @property
    def global_bytes(self) -> int:
        """Bytes that grow with every token."""
        return self.k.nbytes + self.v.nbytes

    @property
    def state_bytes(self) -> int:
        """Bytes that are bounded."""
        return sum(array.nbytes for state in self.states for array in state)


def empty_cache(params: Weights, shape: Shape) -> Cache:
    """Before any token."""
    k_width = params["bridge"]["k"]["weight"].shape[0]
    width = params[f"layers_{shape.self_layers}"]["attention"]["q"]["weight"].shape[0] // shape.num_heads
    nothing = np.zeros((0, k_width // width, width))
    states: list[tuple[np.ndarray, ...]] = []
    for i in range(shape.self_layers):
        if shape.window is None:
            d = params[f"layers_{i}"]["attention"]["q"]["weight"].shape[0] // shape.self_heads
            states.append((np.zeros((shape.self_heads, d, d)),))
        else:
            weights = params[f"layers_{i}"]["attention"]
            d = weights["q"]["weight"].shape[0] // shape.self_heads
            none = np.zeros((0, weights["k"]["weight"].shape[0] // d, d))
            states.append((none, none))
    return Cache(nothing, nothing, states)


def prefill(
    params: Weights, shape: Shape, tokens: Sequence[int], chunk: int, cache: Cache | None = None
) -> tuple[np.ndarray, Cache]:
    """Early exit: the prompt stops after the global keys and values, its last token goes on. Logits [V], the cache."""
    cache = cache or empty_cache(params, shape)
    for start in range(0, len(tokens), chunk):
        x, cache = self_decoder(params, shape, cache, tokens[start : start + chunk])
    last = np.array([len(cache.k) - 1])
    return cross_decoder(params, shape, x[-1:], last, cache.k, cache.v)[0], cache


def step(params: Weights, shape: Shape, cache: Cache, token: int) -> tuple[np.ndarray, Cache]:
    """One token: logits [V] and the cache with it."""
    return prefill(params, shape, [token], 1, cache)


def self_decoder(params: Weights, shape: Shape, cache: Cache, tokens: Sequence[int]) -> tuple[np.ndarray, Cache]:
    """A chunk through the first half -> x [T, D], and the cache with its keys, values and states."""
    x = embed(params, tokens)
    positions = len(cache.k) + np.arange(len(tokens))
    states: list[tuple[np.ndarray, ...]] = []

    def mix(weights: Weights, state: tuple[np.ndarray, ...]) -> Callable[[np.ndarray], np.ndarray]:
        def continued(h: np.ndarray) -> np.ndarray:
            if shape.window is None:
                r = retention_inputs(weights["attention"], h, positions, shape)
                out, renewed = retention_chunk(r, state[0])
                states.append((renewed,))
                return retention_output(weights["attention"], h, out, shape.norm_eps)
            q, *new = window_inputs(weights["attention"], h, positions, shape)
            k, v = (np.concatenate([old, fresh]) for old, fresh in zip(state, new, strict=True))
            distance = positions[:, None] - (positions[-1] - np.arange(len(k))[::-1])
            states.append((k[-shape.window :], v[-shape.window :]))
            out = attend(q, k, v, (distance >= 0) & (distance < shape.window))
            return dense(out.reshape(len(h), -1), weights["attention"]["o"])

        return continued

    for i in range(shape.self_layers):
        weights = params[f"layers_{i}"]
        x = block(weights, x, mix(weights, cache.states[i]), shape.norm_eps)
    k, v = bridge(params, shape, x, positions)
    return x, Cache(np.concatenate([cache.k, k]), np.concatenate([cache.v, v]), states)


def cross_decoder(
    params: Weights, shape: Shape, x: np.ndarray, positions: np.ndarray, k: np.ndarray, v: np.ndarray
) -> np.ndarray:
    """x [T, D] of tokens at positions, k and v of tokens 0, 1, ... [S, K, d] -> logits [T, V]."""
    visible = np.arange(len(k)) <= positions[:, None]
    width = k.shape[-1]

    def mix(weights: Weights) -> Callable[[np.ndarray], np.ndarray]:
        def read(h: np.ndarray) -> np.ndarray:
            q = heads_of(dense(h, weights["q"]), width)
            q = rotate_neighbours(q, positions, rope_frequencies(width, shape.rope_theta))
            return dense(attend(q, k, v, visible).reshape(len(h), -1), weights["o"])

        return read

    for i in range(shape.self_layers, shape.num_layers):
        weights = params[f"layers_{i}"]
        x = block(weights, x, mix(weights["attention"]), shape.norm_eps)
    return dense(rms_norm(x, params["norm"]["scale"], shape.norm_eps), params["head"])


def bridge(params: Weights, shape: Shape, x: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """k, rotated, and v [T, K, d] from what the self-decoder gives, normalised."""
    weights = params["bridge"]
    width = params[f"layers_{shape.self_layers}"]["attention"]["q"]["weight"].shape[0] // shape.num_heads
    h = rms_norm(x, weights["norm"]["scale"], shape.norm_eps)
    k = heads_of(dense(h, weights["k"]), width)
    k = rotate_neighbours(k, positions, rope_frequencies(width, shape.rope_theta))
    return k, heads_of(dense(h, weights["v"]), width)


def embed(params: Weights, tokens: Sequence[int]) -> np.ndarray:
    """Embeddings times sqrt(D): [T, D]."""
    table = params["embed"]["embedding"]
    return table[list(tokens)] * np.sqrt(table.shape[1])


def block(weights: Weights, x: np.ndarray, mix: Callable[[np.ndarray], np.ndarray], eps: float) -> np.ndarray:
    """x plus what the tokens tell each other, plus the gated unit."""
    x = x + mix(rms_norm(x, weights["attention_norm"]["scale"], eps))
    return x + swiglu(rms_norm(x, weights["mlp_norm"]["scale"], eps), weights["mlp"])


def window_inputs(
    weights: Weights, h: np.ndarray, positions: np.ndarray, shape: Shape
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q and k, rotated, and v of a self-decoder layer."""
    width = weights["q"]["weight"].shape[0] // shape.self_heads
    q, k, v = (heads_of(dense(h, weights[name]), width) for name in "qkv")
    turns = rope_frequencies(width, shape.rope_theta)
    return rotate_neighbours(q, positions, turns), rotate_neighbours(k, positions, turns), v


def retention_inputs(weights: Weights, h: np.ndarray, positions: np.ndarray, shape: Shape) -> Retention:
    """What a retention layer makes of its normed input."""
    return Retention(*window_inputs(weights, h, positions, shape), log_decay(h, weights))


def retention_output(weights: Weights, h: np.ndarray, out: np.ndarray, eps: float) -> np.ndarray:
    """W_o (silu(W_g h) * o), every head of o normalised without a scale: [T, D]."""
    normed = rms_norm(out, np.ones(()), eps).reshape(len(h), -1)
    return dense(silu(dense(h, weights["gate"])) * normed, weights["o"])


def random_params(
    shape: Shape, vocab: int, hidden: int, wide: int, kv_heads: int, self_kv_heads: int | None = None, seed: int = 0
) -> Weights:
    """Weights for tests; head widths are hidden / heads."""
    random = Random(seed)
    width, self_width = hidden // shape.num_heads, hidden // shape.self_heads

    def mixer(i: int) -> Weights:
        if i >= shape.self_layers:
            both = random.attention(hidden, shape.num_heads, kv_heads, width)
            return {"attention": {"q": both["q"], "o": both["o"]}}
        own = random.attention(hidden, shape.self_heads, self_kv_heads or shape.self_heads, self_width)
        if shape.window is not None:
            return {"attention": own}
        # Decays from about 0.7 on, so that a wrong one shows within a few tokens.
        return {
            "attention": own
            | {"gate": random.dense(hidden, hidden), "decay": random.dense(hidden, shape.self_heads, 4.0)}
        }

    def layer(i: int) -> Weights:
        norms = {"attention_norm": random.norm(hidden), "mlp_norm": random.norm(hidden)}
        return norms | mixer(i) | {"mlp": random.mlp(hidden, wide)}

    pair = random.attention(hidden, shape.num_heads, kv_heads, width)
    return {
        "embed": {"embedding": random.normal(vocab, hidden, spread=hidden**-0.5)},
        "bridge": {"norm": random.norm(hidden), "k": pair["k"], "v": pair["v"]},
        "norm": random.norm(hidden),
        "head": random.dense(hidden, vocab),
    } | {f"layers_{i}": layer(i) for i in range(shape.num_layers)}
