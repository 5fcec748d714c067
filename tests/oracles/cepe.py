"""CEPE, parallel context encoding (Yen et al. 2024, 2402.16617): one sequence with several chunks of context, float64.

A small bidirectional encoder reads each chunk by itself, positions from 0 in each. Every decoder layer that has a
cross-attention adds it between self-attention and feed-forward: queries from the layer's own normed state, keys and
values from what the encoder gives, all chunks together under one softmax, nothing rotated, nothing masked but padding.

Two forms. `encode_together` reads padded chunks at once under a block-diagonal mask, and `forward` attends to them all.
`encode` reads one chunk, and `step` attends chunk by chunk and merges the partial results. It makes keys and values of
the encoded chunks at every step, or once, or never: absorbed, a head's W_k goes into its query and its W_v follows the
average, so that attention reads the encoded chunks themselves, as one KV head that is key and value at once.

Parameters, D hidden, d head width, E hidden width of the encoder; the decoder is a Llama in kvjax's names:

    embed/embedding [V, D]   norm/scale [D]   head/weight [V, D]
    layers_i/{attention_norm, mlp_norm}/scale [D]   layers_i/{attention/{q, k, v, o}, mlp/{gate, up, down}}/weight
    layers_i/cross_norm/scale [D]   layers_i/cross_attention/{q [H d, D], k [K d, E], v [K d, E], o [D, H d]}/weight
        (published: in the last layers, all 32 of Llama-2-7B)
    encoder/: embed, layers_i and norm as above, of its own widths, without cross-attention and head
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from tests.oracles.blocks import Random, Weights, attend, frequencies, heads_of, merge, partial, rotate_halves, swiglu
from tests.oracles.decoder import dense, rms_norm


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the arrays' shapes do not say, of the decoder or of the encoder."""

    num_layers: int
    num_heads: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


KeyValue = tuple[np.ndarray, np.ndarray]
"""k and v [S, K, d]."""


def encode(params: Weights, shape: Shape, chunk: Sequence[int]) -> np.ndarray:
    """One chunk: [n, E]. `params` and `shape` are the encoder's."""
    n = len(chunk)
    return read(params, shape, np.asarray(chunk), np.arange(n), np.ones((n, n), bool))


def encode_together(params: Weights, shape: Shape, chunks: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """chunks int[N, n], of chunk i the first lengths[i] real -> [N, n, E]; padding is seen by nobody."""
    count, width = chunks.shape
    place = np.tile(np.arange(width), count)
    owner = np.repeat(np.arange(count), width)
    real = place < lengths[owner]
    visible = (owner[:, None] == owner) & real
    return read(params, shape, chunks.reshape(-1), place, visible).reshape(count, width, -1)


def read(params: Weights, shape: Shape, tokens: np.ndarray, positions: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """The encoder: tokens [T] at positions [T], who sees whom bool[T, T] -> [T, E], normed."""
    x = params["embed"]["embedding"][tokens]
    for i in range(shape.num_layers):
        weights = params[f"layers_{i}"]

        def mix(h: np.ndarray, weights: Weights = weights) -> np.ndarray:
            q, k, v = inputs(weights["attention"], shape, h, positions)
            return dense(attend(q, k, v, visible).reshape(len(h), -1), weights["attention"]["o"])

        x = layer(weights, shape, x, mix)
    return rms_norm(x, params["norm"]["scale"], shape.norm_eps)


def forward(
    params: Weights, shape: Shape, tokens: Sequence[int], context: np.ndarray | None, real: np.ndarray | None = None
) -> np.ndarray:
    """Logits [T, V] of the decoder over context [S, E], of which real bool[S] counts; None: it has no context."""
    x = params["embed"]["embedding"][list(tokens)]
    positions = np.arange(len(tokens))
    causal = positions <= positions[:, None]
    for i in range(shape.num_layers):
        weights = params[f"layers_{i}"]

        def mix(h: np.ndarray, weights: Weights = weights) -> np.ndarray:
            q, k, v = inputs(weights["attention"], shape, h, positions)
            return dense(attend(q, k, v, causal).reshape(len(h), -1), weights["attention"]["o"])

        def cross(h: np.ndarray, weights: Weights = weights.get("cross_attention")) -> np.ndarray:
            assert context is not None
            q, (k, v) = cross_query(weights, shape, h), cross_keys_values(weights, shape, context)
            seen = np.ones(len(k), bool) if real is None else real
            return dense(attend(q, k, v, np.tile(seen, (len(h), 1))).reshape(len(h), -1), weights["o"])

        x = layer(weights, shape, x, mix, None if context is None else cross)
    return dense(rms_norm(x, params["norm"]["scale"], shape.norm_eps), params["head"])


@dataclasses.dataclass
class Cache:
    """What is kept.

    Attributes:
      own: per layer, the decoder's keys and values so far.
      context: encoded chunks [n_i, E].
      stored: per layer and chunk, the keys and values made of them; None: they are not kept.
      absorbed: they are never made.
    """

    own: list[KeyValue]
    context: list[np.ndarray]
    stored: list[list[KeyValue]] | None
    absorbed: bool = False

    @property
    def context_bytes(self) -> int:
        """Bytes that grow with the context."""
        if self.stored is None:
            return sum(chunk.nbytes for chunk in self.context)
        return sum(array.nbytes for layer in self.stored for pair in layer for array in pair)


def start(params: Weights, shape: Shape, context: list[np.ndarray], keep: str = "computed") -> Cache:
    """A cache over encoded chunks, before any token. keep: "computed", "stored" or "absorbed" keys and values."""
    stored = None
    if keep == "stored":
        weights = [params[f"layers_{i}"].get("cross_attention") for i in range(shape.num_layers)]
        stored = [[cross_keys_values(w, shape, chunk) for chunk in context if w] for w in weights]
    d = params["layers_0"]["attention"]["q"]["weight"].shape[0] // shape.num_heads
    nothing = np.zeros((0, params["layers_0"]["attention"]["k"]["weight"].shape[0] // d, d))
    return Cache([(nothing, nothing)] * shape.num_layers, context, stored, keep == "absorbed")


def step(params: Weights, shape: Shape, cache: Cache, token: int) -> tuple[np.ndarray, Cache]:
    """One token: logits [V] and the cache with it."""
    x = params["embed"]["embedding"][[token]]
    position = np.array([len(cache.own[0][0])])
    own: list[KeyValue] = []
    for i in range(shape.num_layers):
        weights = params[f"layers_{i}"]

        def mix(h: np.ndarray, weights: Weights = weights["attention"], held: KeyValue = cache.own[i]) -> np.ndarray:
            q, *new = inputs(weights, shape, h, position)
            k, v = (np.concatenate(pair) for pair in zip(held, new, strict=True))
            own.append((k, v))
            return dense(attend(q, k, v, np.ones((1, len(k)), bool)).reshape(1, -1), weights["o"])

        def cross(h: np.ndarray, weights: Weights = weights.get("cross_attention"), i: int = i) -> np.ndarray:
            q = cross_query(weights, shape, h)
            if cache.absorbed:
                return dense(cross_absorbed(weights, q, cache.context).reshape(1, -1), weights["o"])
            if cache.stored is None:
                pairs = [cross_keys_values(weights, shape, chunk) for chunk in cache.context]
            else:
                pairs = cache.stored[i]
            parts = [partial(q, k, v, np.ones((1, len(k)), bool)) for k, v in pairs]
            return dense(merge(parts).reshape(1, -1), weights["o"])

        x = layer(weights, shape, x, mix, cross if cache.context else None)
    logits = dense(rms_norm(x, params["norm"]["scale"], shape.norm_eps), params["head"])[0]
    return logits, dataclasses.replace(cache, own=own)


def layer(
    weights: Weights,
    shape: Shape,
    x: np.ndarray,
    mix: Callable[[np.ndarray], np.ndarray],
    cross: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Self-attention, cross-attention where the layer has one and there is context, feed-forward; each added to x."""
    x = x + mix(rms_norm(x, weights["attention_norm"]["scale"], shape.norm_eps))
    if cross is not None and "cross_attention" in weights:
        x = x + cross(rms_norm(x, weights["cross_norm"]["scale"], shape.norm_eps))
    return x + swiglu(rms_norm(x, weights["mlp_norm"]["scale"], shape.norm_eps), weights["mlp"])


def inputs(
    weights: Weights, shape: Shape, h: np.ndarray, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q and k, rotated, and v of self-attention."""
    d = weights["q"]["weight"].shape[0] // shape.num_heads
    q, k, v = (heads_of(dense(h, weights[name]), d) for name in "qkv")
    turns = frequencies(d, shape.rope_theta)
    return rotate_halves(q, positions, turns), rotate_halves(k, positions, turns), v


def cross_query(weights: Weights, shape: Shape, h: np.ndarray) -> np.ndarray:
    """[T, D] -> [T, H, d]."""
    return heads_of(dense(h, weights["q"]), weights["q"]["weight"].shape[0] // shape.num_heads)


def cross_keys_values(weights: Weights, shape: Shape, context: np.ndarray) -> KeyValue:
    """[S, E] -> k and v [S, K, d]."""
    d = weights["q"]["weight"].shape[0] // shape.num_heads
    return heads_of(dense(context, weights["k"]), d), heads_of(dense(context, weights["v"]), d)


def cross_absorbed(weights: Weights, q: np.ndarray, context: list[np.ndarray]) -> np.ndarray:
    """Attention of q [1, H, d] to encoded chunks, chunk by chunk: [1, H, d]."""
    _, heads, d = q.shape
    group = heads * d // weights["k"]["weight"].shape[0]
    into_k, into_v = (np.repeat(weights[name]["weight"].reshape(heads // group, d, -1), group, axis=0) for name in "kv")
    wide = np.einsum("thd,hde->the", q, into_k)
    wide *= np.sqrt(wide.shape[-1] / d)  # the score is still divided by the root of d
    parts = [partial(wide, e[:, None], e[:, None], np.ones((1, len(e)), bool)) for e in context]
    return np.einsum("the,hde->thd", merge(parts), into_v)


def random_params(
    shape: Shape,
    encoder: Shape,
    vocab: int,
    hidden: int,
    wide: int,
    kv_heads: int,
    encoder_hidden: int,
    crossed: int | None = None,
    seed: int = 0,
) -> Weights:
    """Weights for tests. crossed: how many layers, the last ones, have cross-attention; None: all."""
    random = Random(seed)

    def one(width: int, heads: int, kv_heads: int, cross: bool) -> Weights:
        weights = {
            "attention_norm": random.norm(width),
            "attention": random.attention(width, heads, kv_heads, width // heads),
            "mlp_norm": random.norm(width),
            "mlp": random.mlp(width, wide),
        }
        if cross:
            weights["cross_norm"] = random.norm(width)
            weights["cross_attention"] = random.attention(width, heads, kv_heads, width // heads, encoder_hidden)
        return weights

    first = 0 if crossed is None else shape.num_layers - crossed
    return {
        "embed": {"embedding": random.normal(vocab, hidden)},
        "norm": random.norm(hidden),
        "head": random.dense(hidden, vocab),
        "encoder": {
            "embed": {"embedding": random.normal(vocab, encoder_hidden)},
            "norm": random.norm(encoder_hidden),
            **{
                f"layers_{i}": one(encoder_hidden, encoder.num_heads, encoder.num_heads, False)
                for i in range(encoder.num_layers)
            },
        },
        **{f"layers_{i}": one(hidden, shape.num_heads, kv_heads, i >= first) for i in range(shape.num_layers)},
    }
