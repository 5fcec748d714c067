"""GoldFinch (Goldstein et al. 2024, 2407.12077): one sequence, float64.

The lower layers (Finch-C2, a refined RWKV-6) are recurrent. What they give is compressed to C = D / 16 numbers a token;
these and the token's id are all that the upper layers (GOLD, softmax attention) keep of it: their keys come from the
compressed vector and the embedding, their values from the embedding.

Two forms. `forward` is the whole sequence, recurrences written out as sums. `step` takes one token, holds a `State`,
and rebuilds every key and value each time. `prefill` is the same for a prompt, with the upper layers run for its last
tokens only: a token's logits depend on what the two tokens before it had in the layer below, hence on the last 2 G + 1
tokens through G upper layers.

Parameters: D hidden, A = H d attention width (equal to D), C compressed, M, W, L low ranks, F feed-forward width. LN is
{scale, bias}; weights are [out, in] without bias.

    embed/embedding [V, D]   embed_norm LN [D]   norm LN [D]   head/weight [V, D]
    compress/weight [C, D]   expand/weight [A, D + C]
    layers_i/attention_norm, layers_i/mlp_norm LN [D]
    layers_i/channel_mix: shift [2, D] of k, r;   {key [F, D], receptance [D, D], value [D, F]}/weight
    lower, layers_i/time_mix: shift_x [D], shift [5, D] of r, k, v, w, second v, shift_down [D, 5 M], shift_up
        [5, M, D];   decay [A], decay_down [D, W], decay_up [W, A];   second_down [D, W], second_up [W, A];
        {r, k, v}/weight [A, D], norm LN [A], o/weight [D, A]
    upper, layers_i/attention: shift_x [D], shift [1, D] of q, shift_down [D, M], shift_up [1, M, D];
        source_shift_x [D], source_shift [2, D] of k, v, source_shift_down [D, 2 M], source_shift_up [2, M, D];
        key_down, value_down [D, L], key_up, value_up [L, A];   q/weight [A, D], {q, k, v, out}_norm LN [A], o/weight
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tests.oracles.blocks import Random, Weights, attend, frequencies, heads_of, layer_norm, rotate_neighbours
from tests.oracles.decoder import dense


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the arrays' shapes do not say.

    Attributes:
      head_dim: d, in lower and upper layers.
      rope_theta: None: the upper layers know of order by token shift and causality alone.
    """

    num_layers: int
    head_dim: int
    rope_theta: float | None = None

    @property
    def lower_layers(self) -> int:
        """The first two thirds."""
        return 2 * self.num_layers // 3

    @property
    def reach(self) -> int:
        """How many of a prompt's last tokens must pass the upper layers for its last logits."""
        return 2 * (self.num_layers - self.lower_layers) + 1


# Parts.


def before(x: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Each token's predecessor: x [T, D] -> [T, D]; `last` [D] is the first one's."""
    return np.concatenate([last[None], x[:-1]])


def mixture(weights: Weights, x: np.ndarray, by: np.ndarray, prefix: str = "shift") -> np.ndarray:
    """How much of `by` = predecessor - x each of n mixtures takes, partly as the data says: [n, T, D]."""
    up = weights[f"{prefix}_up"]
    low = np.tanh((x + by * weights[f"{prefix}_x"]) @ weights[f"{prefix}_down"]).reshape(len(x), len(up), -1)
    return weights[prefix][:, None] + np.einsum("tnm,nmd->ntd", low, up)


def rms(x: np.ndarray) -> np.ndarray:
    """x / (root mean square + 1e-8), without a scale."""
    return x / (np.sqrt(np.mean(x * x, axis=-1, keepdims=True)) + 1e-8)


def low_rank(weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    """tanh(x down) up."""
    return np.tanh(x @ weights[f"{name}_down"]) @ weights[f"{name}_up"]


class Memory(NamedTuple):
    """What is given to a recurrent head for each token: r, k, v, log w [T, H, d], the decay of each channel of k."""

    r: np.ndarray
    k: np.ndarray
    v: np.ndarray
    log_decay: np.ndarray


def memory_whole(m: Memory) -> np.ndarray:
    """y_t = sum over j < t of (r_t . (product of w over j < i < t) k_j) v_j: [T, H, d], without the token itself."""
    total = np.cumsum(m.log_decay, axis=0)
    earlier = np.tril(np.ones((len(total), len(total)), bool), -1)[..., None, None]
    decay = np.exp(np.where(earlier, (total - m.log_decay)[:, None] - total[None], -np.inf))
    return np.einsum("thd,tjhd,jhd,jhe->the", m.r, decay, m.k, m.v, optimize=True)


def memory_recurrent(m: Memory, state: np.ndarray, valid: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """y_t = r_t S_(t-1), S_t = diag(w_t) S_(t-1) + k_t' v_t; S [H, d, d]. Returns y and the last state.

    Tokens where valid bool[T] is false do not decay the state and write nothing; their y is of no use.
    """
    if valid is not None:
        m = m._replace(k=m.k * valid[:, None, None], log_decay=m.log_decay * valid[:, None, None])
    out = np.zeros_like(m.v)
    for t in range(len(m.r)):
        out[t] = np.einsum("hd,hde->he", m.r[t], state)
        state = np.exp(m.log_decay[t])[..., None] * state + np.einsum("hd,he->hde", m.k[t], m.v[t])
    return out, state


def memory_inputs(weights: Weights, x: np.ndarray, last: np.ndarray, width: int) -> tuple[Memory, np.ndarray]:
    """Normed input [T, D] -> what the memory is given, and the second value [T, A] that goes past it."""
    by = before(x, last) - x
    r, k, v, w, second = x + by * mixture(weights, x, by)
    log_decay = -np.exp(weights["decay"] + low_rank(weights, "decay", w))
    given = (
        dense(r, weights["r"]),
        dense(k, weights["k"]) * (1.0 - np.exp(log_decay)),
        dense(v, weights["v"]),
        log_decay,
    )
    memory = Memory(*(heads_of(part, width) for part in given))
    return memory, dense(second, weights["v"]) + low_rank(weights, "second", second)


def memory_output(weights: Weights, y: np.ndarray, second: np.ndarray) -> np.ndarray:
    """W_o LN(y + second value), one LayerNorm over all heads: [T, D]."""
    return dense(layer_norm(y.reshape(len(y), -1) + second, weights["norm"]), weights["o"])


def channel_mix(weights: Weights, x: np.ndarray, last: np.ndarray) -> np.ndarray:
    """sigmoid(receptance r) * value(relu(key k)^2), k and r mixed with the predecessor. [T, D] -> [T, D]."""
    k, r = x + (before(x, last) - x) * weights["shift"][:, None]
    gate = 1.0 / (1.0 + np.exp(-dense(r, weights["receptance"])))
    return gate * dense(np.maximum(dense(k, weights["key"]), 0.0) ** 2, weights["value"])


def embed(params: Weights, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """x0 [T, D]: what enters the first layer, and what keys and values are rebuilt from."""
    return layer_norm(params["embed"]["embedding"][np.asarray(tokens, int)], params["embed_norm"])


def key_cache(params: Weights, x0: np.ndarray, compressed: np.ndarray) -> np.ndarray:
    """The keys all upper layers start from, RMSNorm(W_b [x0 | c]): x0 [S, D], compressed [S, C] -> [S, A]."""
    return rms(dense(np.concatenate([x0, compressed], axis=-1), params["expand"]))


def keys_and_values(weights: Weights, shape: Shape, x0: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One upper layer's k and v [S, H, d] of tokens 0, 1, ... from x0 [S, D] and `key_cache` [S, A]."""
    values, nothing = rms(x0), np.zeros(x0.shape[1])
    by_k, by_v = before(keys, nothing) - keys, before(values, nothing) - values
    mix_k, mix_v = mixture(weights, values, by_v, "source_shift")
    k, v = keys + by_k * mix_k, values + by_v * mix_v
    k = layer_norm(k + low_rank(weights, "key", k), weights["k_norm"])
    v = layer_norm(v + low_rank(weights, "value", v), weights["v_norm"])
    return rotated(k, np.arange(len(k)), shape), heads_of(v, shape.head_dim)


def gold(
    weights: Weights,
    shape: Shape,
    x: np.ndarray,
    last: np.ndarray,
    positions: np.ndarray,
    kv: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """Attention of tokens at positions, normed input x [T, D], to tokens 0, 1, ...: [T, D]."""
    by = before(x, last) - x
    q = layer_norm(dense(x + by * mixture(weights, x, by)[0], weights["q"]), weights["q_norm"])
    visible = np.arange(len(kv[0])) <= positions[:, None]
    out = attend(rotated(q, positions, shape), *kv, visible).reshape(len(x), -1)
    return dense(layer_norm(out, weights["out_norm"]), weights["o"])


def rotated(x: np.ndarray, positions: np.ndarray, shape: Shape) -> np.ndarray:
    """[T, A] -> [T, H, d], turned if the model turns."""
    x = heads_of(x, shape.head_dim)
    if shape.rope_theta is None:
        return x
    return rotate_neighbours(x, positions, frequencies(shape.head_dim, shape.rope_theta))


# The network.


class Shift(NamedTuple):
    """The normed inputs [D] of a layer's last token: to its time mixing or attention, and to its channel mixing."""

    attention: np.ndarray
    mlp: np.ndarray


@dataclasses.dataclass
class State:
    """What is kept of the tokens seen.

    Attributes:
      tokens: int32[n]. compressed: [n, C].
      keys: [n, A] if they are stored as the published code does, instead of being rebuilt; else None.
      memories: S [H, d, d] of each lower layer.
      shifts: of every layer.
    """

    tokens: np.ndarray
    compressed: np.ndarray
    keys: np.ndarray | None
    memories: list[np.ndarray]
    shifts: list[Shift]

    @property
    def token_bytes(self) -> int:
        """Bytes that grow with every token."""
        return self.tokens.nbytes + (self.compressed if self.keys is None else self.keys).nbytes

    @property
    def recurrent_bytes(self) -> int:
        """Bytes that are bounded."""
        return sum(m.nbytes for m in self.memories) + sum(x.nbytes for shift in self.shifts for x in shift)


def empty_state(params: Weights, shape: Shape, store_keys: bool = False) -> State:
    """Before any token: zeros."""
    compressed, hidden = params["compress"]["weight"].shape
    width, d = params["expand"]["weight"].shape[0], shape.head_dim
    return State(
        np.zeros(0, np.int32),
        np.zeros((0, compressed)),
        np.zeros((0, width)) if store_keys else None,
        [np.zeros((width // d, d, d)) for _ in range(shape.lower_layers)],
        [Shift(np.zeros(hidden), np.zeros(hidden)) for _ in range(shape.num_layers)],
    )


def forward(params: Weights, shape: Shape, tokens: Sequence[int]) -> np.ndarray:
    """Every token through every layer: logits [T, V]."""
    x = x0 = embed(params, tokens)
    nothing = np.zeros(x.shape[1])
    for i in range(shape.num_layers):
        weights = params[f"layers_{i}"]
        h = layer_norm(x, weights["attention_norm"])
        if i < shape.lower_layers:
            memory, second = memory_inputs(weights["time_mix"], h, nothing, shape.head_dim)
            x = x + memory_output(weights["time_mix"], memory_whole(memory), second)
        else:
            if i == shape.lower_layers:
                keys = key_cache(params, x0, dense(x, params["compress"]))
            kv = keys_and_values(weights["attention"], shape, x0, keys)
            x = x + gold(weights["attention"], shape, h, nothing, np.arange(len(x)), kv)
        x = x + channel_mix(weights["channel_mix"], layer_norm(x, weights["mlp_norm"]), nothing)
    return dense(layer_norm(x, params["norm"]), params["head"])


def step(params: Weights, shape: Shape, state: State, token: int) -> tuple[np.ndarray, State]:
    """One token: logits [V] and the state with it."""
    x, state = lower(params, shape, state, [token])
    return upper(params, shape, state, x)


def prefill(
    params: Weights,
    shape: Shape,
    tokens: Sequence[int],
    chunk: int,
    state: State | None = None,
    reach: int | None = None,
) -> tuple[np.ndarray, State]:
    """A prompt, in chunks through the lower layers, and its last tokens through the upper ones: logits [V], the state.

    reach: how many last tokens; None: as many as it takes.
    """
    state, outputs = state or empty_state(params, shape), []
    for start in range(0, len(tokens), chunk):
        x, state = lower(params, shape, state, tokens[start : start + chunk])
        outputs.append(x)
    return upper(params, shape, state, np.concatenate(outputs)[-(reach or shape.reach) :])


def lower(params: Weights, shape: Shape, state: State, tokens: Sequence[int]) -> tuple[np.ndarray, State]:
    """A chunk through the lower layers -> x [T, D], and the state with its tokens, compressed vectors and memories."""
    x = x0 = embed(params, tokens)
    memories, shifts = list(state.memories), list(state.shifts)
    for i in range(shape.lower_layers):
        weights = params[f"layers_{i}"]
        h = layer_norm(x, weights["attention_norm"])
        memory, second = memory_inputs(weights["time_mix"], h, shifts[i].attention, shape.head_dim)
        y, memories[i] = memory_recurrent(memory, memories[i])
        x = x + memory_output(weights["time_mix"], y, second)
        x, shifts[i] = channel_mixed(weights, x, h, shifts[i])
    compressed = dense(x, params["compress"])
    stored = None if state.keys is None else np.concatenate([state.keys, key_cache(params, x0, compressed)])
    return x, State(
        np.concatenate([state.tokens, np.asarray(tokens, np.int32)]),
        np.concatenate([state.compressed, compressed]),
        stored,
        memories,
        shifts,
    )


def upper(params: Weights, shape: Shape, state: State, x: np.ndarray) -> tuple[np.ndarray, State]:
    """The newest tokens x [T, D] through the upper layers: the last one's logits [V] and the state."""
    positions = len(state.tokens) - len(x) + np.arange(len(x))
    x0 = embed(params, state.tokens)
    keys = key_cache(params, x0, state.compressed) if state.keys is None else state.keys
    shifts = list(state.shifts)
    for i in range(shape.lower_layers, shape.num_layers):
        weights = params[f"layers_{i}"]
        h = layer_norm(x, weights["attention_norm"])
        kv = keys_and_values(weights["attention"], shape, x0, keys)
        x = x + gold(weights["attention"], shape, h, shifts[i].attention, positions, kv)
        x, shifts[i] = channel_mixed(weights, x, h, shifts[i])
    logits = dense(layer_norm(x[-1], params["norm"]), params["head"])
    return logits, dataclasses.replace(state, shifts=shifts)


def channel_mixed(weights: Weights, x: np.ndarray, h: np.ndarray, last: Shift) -> tuple[np.ndarray, Shift]:
    """x after the layer's channel mixing, and what the next token needs of this one; h: the first block's input."""
    normed = layer_norm(x, weights["mlp_norm"])
    return x + channel_mix(weights["channel_mix"], normed, last.mlp), Shift(h[-1], normed[-1])


def random_params(shape: Shape, vocab: int, hidden: int, wide: int, seed: int = 0) -> Weights:
    """Weights for tests, low ranks 4, compressed to hidden / 16, whose data-dependent parts all matter."""
    random, rank = Random(seed), 4

    def matrix(rows: int, columns: int) -> np.ndarray:
        return random.normal(rows, columns, spread=rows**-0.5)

    def shifts(n: int, prefix: str = "shift") -> Weights:
        return {
            f"{prefix}_x": random.rng.uniform(size=hidden),
            prefix: random.rng.uniform(size=(n, hidden)),
            f"{prefix}_down": matrix(hidden, n * rank),
            f"{prefix}_up": random.normal(n, rank, hidden, spread=0.3),
        }

    def ranks(*names: str) -> Weights:
        return {f"{n}_down": matrix(hidden, rank) for n in names} | {f"{n}_up": matrix(rank, hidden) for n in names}

    def mixer(i: int) -> Weights:
        if i < shape.lower_layers:
            return {
                "time_mix": shifts(5)
                | ranks("decay", "second")
                | {"decay": random.rng.uniform(-3.0, 0.5, hidden), "norm": random.norm(hidden, bias=True)}
                | {name: random.dense(hidden, hidden) for name in "rkvo"}
            }
        return {
            "attention": shifts(1)
            | shifts(2, "source_shift")
            | ranks("key", "value")
            | {name: random.dense(hidden, hidden) for name in "qo"}
            | {f"{name}_norm": random.norm(hidden, bias=True) for name in ("q", "k", "v", "out")}
        }

    def layer(i: int) -> Weights:
        norms = {name: random.norm(hidden, bias=True) for name in ("attention_norm", "mlp_norm")}
        mix = {
            "shift": random.rng.uniform(size=(2, hidden)),
            "key": random.dense(hidden, wide),
            "receptance": random.dense(hidden, hidden),
            "value": random.dense(wide, hidden),
        }
        return norms | mixer(i) | {"channel_mix": mix}

    compressed = hidden // 16
    return {
        "embed": {"embedding": random.normal(vocab, hidden)},
        "embed_norm": random.norm(hidden, bias=True),
        "compress": random.dense(hidden, compressed),
        "expand": random.dense(hidden + compressed, hidden),
        "norm": random.norm(hidden, bias=True),
        "head": random.dense(hidden, vocab),
    } | {f"layers_{i}": layer(i) for i in range(shape.num_layers)}
