"""A decoder for one sequence in float64 NumPy, whose cache is a Python list of entries per layer and KV head.

It reads kvjax's parameter tree. The prompt is one full attention matrix per layer under the policy's mask, followed by
one selection per layer; every later token is fed alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.oracles.codecs import Dense, OracleCodec
from tests.oracles.policies import Entry, Full, OraclePolicy, Row, StreamingLLM

if TYPE_CHECKING:
    from kvjax.config import ModelConfig

# positions[layer][kv_head]: ascending token positions.
Positions = list[list[tuple[int, ...]]]


@dataclasses.dataclass
class Result:
    """What `run` saw, T prompt tokens and F forced ones.

    Attributes:
      logits: float64[T + F, V], after each token.
      prompt_length: T.
      kept: 1 + F times kept[layer][kv_head], held after the prompt and after each forced token, evictions decided.
      attended: 1 + F times attended[layer][kv_head], what the last prompt token and each forced token attended to.
      scores: 1 + F times scores[layer][kv_head] = {position: accumulated weight} of what is held.
      margin: least distance in score between something kept and something dropped in its stead, over all decisions.
        Sets can be compared with an implementation whose weights are off by much less than this.
    """

    logits: np.ndarray
    prompt_length: int
    kept: list[Positions]
    attended: list[Positions]
    scores: list[list[list[dict[int, float]]]]
    margin: float

    @property
    def prompt_logits(self) -> np.ndarray:
        """float64[T, V], after each prompt token."""
        return self.logits[: self.prompt_length]

    @property
    def step_logits(self) -> np.ndarray:
        """float64[1 + F, V], after the last prompt token and after each forced one: aligned with `kept`."""
        return self.logits[self.prompt_length - 1 :]


def run(
    params: dict[str, Any],
    config: ModelConfig,
    prompt: Sequence[int],
    forced: Sequence[int] = (),
    policy: OraclePolicy | None = None,
    codec: OracleCodec | None = None,
) -> Result:
    """Feeds `prompt` at once and `forced` one token at a time."""
    decoder = Decoder(params, config, policy or Full(), codec or Dense())
    logits = [decoder.feed_prompt(prompt)]
    kept, attended, scores = [decoder.kept()], [decoder.attended], [decoder.scores()]
    for token in forced:
        logits.append(decoder.feed(token))
        kept.append(decoder.kept())
        attended.append(decoder.attended)
        scores.append(decoder.scores())
    return Result(np.concatenate(logits), len(prompt), kept, attended, scores, decoder.margin)


class Decoder:
    """The network's weights and the live cache of one sequence."""

    def __init__(self, params: dict[str, Any], config: ModelConfig, policy: OraclePolicy, codec: OracleCodec) -> None:
        if config.rope_scaling.kind != "default":
            raise ValueError(f"the oracle rotates by plain RoPE, got rope scaling {config.rope_scaling.kind!r}")
        if isinstance(policy, StreamingLLM) and any(config.windows):
            raise ValueError("what in-cache positions mean to a layer with a window of its own is nowhere defined")
        self.params = to_float64(params)
        self.config = config
        self.policy = policy
        self.codec = codec
        self.cache: list[list[list[Entry]]] = [
            [[] for _ in range(config.num_kv_heads)] for _ in range(config.num_layers)
        ]
        self.attended: Positions = []
        self.seen = 0
        self.margin = math.inf

    def kept(self) -> Positions:
        """Positions held now."""
        return [[tuple(sorted(e.position for e in entries)) for entries in heads] for heads in self.cache]

    def scores(self) -> list[list[dict[int, float]]]:
        """Accumulated weights of what is held now."""
        return [[{e.position: e.score for e in entries} for entries in heads] for heads in self.cache]

    def feed_prompt(self, prompt: Sequence[int]) -> np.ndarray:
        """All prompt tokens at once into an empty cache -> logits [T, V]."""
        if not len(prompt) or self.seen:
            raise ValueError("the prompt must have a token, and comes first")
        return self._forward(prompt)

    def feed(self, token: int) -> np.ndarray:
        """One more token -> logits [1, V]."""
        return self._forward([token])

    def _forward(self, tokens: Sequence[int]) -> np.ndarray:
        positions = list(range(self.seen, self.seen + len(tokens)))
        x = self.params["embed"]["embedding"][list(tokens)]
        self.attended = []
        for layer in range(self.config.num_layers):
            weights = self.params[f"layers_{layer}"]
            normed = rms_norm(x, weights["attention_norm"]["scale"], self.config.norm_eps)
            x = x + self._attention(layer, weights["attention"], normed, positions)
            normed = rms_norm(x, weights["mlp_norm"]["scale"], self.config.norm_eps)
            gate, up = dense(normed, weights["mlp"]["gate"]), dense(normed, weights["mlp"]["up"])
            x = x + dense(gate / (1.0 + np.exp(-gate)) * up, weights["mlp"]["down"])
        self.seen += len(tokens)
        x = rms_norm(x, self.params["norm"]["scale"], self.config.norm_eps)
        if self.config.tie_word_embeddings:
            return x @ self.params["embed"]["embedding"].T
        return x @ self.params["head"]["kernel"]

    def _attention(self, layer: int, weights: dict[str, Any], x: np.ndarray, positions: list[int]) -> np.ndarray:
        """x [T, hidden] -> [T, hidden]; writes, attends, and decides what the layer keeps."""
        config, policy = self.config, self.policy
        group = config.num_heads // config.num_kv_heads
        query, key, value = self._project(weights, x)

        for head, entries in enumerate(self.cache[layer]):
            # The first new token evicts what it must not see; a prompt starts from nothing.
            entries[:] = [e for e in entries if policy.visible(positions[0], e.position)]
            for t, position in enumerate(positions):
                rotated = rotate(key[t, head][None], [position], config.rope_theta)[0]
                entries.append(Entry(position, self.codec.roundtrip(rotated), self.codec.roundtrip(value[t, head])))

        out = np.zeros((len(positions), config.num_heads, config.width))
        rows: list[Row] = []
        for t, position in enumerate(positions):
            row: list[dict[int, float]] = []
            for head in range(config.num_kv_heads):
                visible = self._visible(layer, head, position)
                for h in range(head * group, (head + 1) * group):
                    weight = self._weights(query[t, h], position, visible)
                    out[t, h] = weight @ np.stack([e.value for e in visible])
                    row.append({e.position: float(w) for w, e in zip(weight, visible, strict=True)})
                    for w, e in zip(weight, visible, strict=True):
                        e.score += float(w)
            rows.append(row)
        self.attended.append([tuple(sorted(rows[-1][head * group])) for head in range(config.num_kv_heads)])

        decision = policy.keep(self.cache[layer], rows, positions[-1])
        self.margin = min(self.margin, decision.margin)
        for entries, kept in zip(self.cache[layer], decision.kept, strict=True):
            entries[:] = [e for e in entries if e.position in kept]
        return dense(out.reshape(len(positions), -1), weights["o"])

    def _project(self, weights: dict[str, Any], x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x [T, hidden] -> query [T, H, D], key and value [T, K, D], not rotated."""
        config = self.config
        query = dense(x, weights["q"]).reshape(len(x), config.num_heads, config.width)
        key = dense(x, weights["k"]).reshape(len(x), config.num_kv_heads, config.width)
        value = dense(x, weights["v"]).reshape(len(x), config.num_kv_heads, config.width)
        if config.qk_norm:
            query = rms_norm(query, weights["q_norm"]["scale"], config.norm_eps)
            key = rms_norm(key, weights["k_norm"]["scale"], config.norm_eps)
        return query, key, value

    def _visible(self, layer: int, head: int, position: int) -> list[Entry]:
        """Entries that the token at `position` attends to: what the policy and the layer's own window leave."""
        window = self.config.windows[layer]
        return [
            e
            for e in self.cache[layer][head]
            if self.policy.visible(position, e.position) and (window is None or e.position > position - window)
        ]

    def _weights(self, query: np.ndarray, position: int, visible: list[Entry]) -> np.ndarray:
        """Softmax weights [n] of one query head, not yet rotated, over n entries."""
        theta = self.config.rope_theta
        coordinates, own = self.policy.coordinates([e.position for e in visible], position)
        raw = rotate(np.stack([e.key for e in visible]), [-e.position for e in visible], theta)
        logits = rotate(raw, coordinates, theta) @ rotate(query[None], [own], theta)[0] / math.sqrt(self.config.width)
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()


def rotate(x: np.ndarray, positions: Sequence[int], theta: float) -> np.ndarray:
    """RoPE of n vectors [n, D]: pair (i, i + D/2) turns by position * theta^(-2i/D) (Su et al. 2021, 2104.09864)."""
    half = x.shape[-1] // 2
    frequencies = np.array([theta ** (-2.0 * i / x.shape[-1]) for i in range(half)])
    angles = np.array(positions, np.float64)[:, None] * frequencies
    first, second = x[:, :half], x[:, half:]
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)], axis=-1
    )


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean x^2 + eps) * scale over the last axis (Zhang and Sennrich 2019, 1910.07467)."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def dense(x: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    """x [..., in] -> [..., out]."""
    return x @ weights["kernel"] + weights.get("bias", 0.0)


def to_float64(tree: Any) -> Any:
    """Every leaf as a float64 NumPy array."""
    if isinstance(tree, dict):
        return {name: to_float64(value) for name, value in tree.items()}
    return np.asarray(tree).astype(np.float64)
