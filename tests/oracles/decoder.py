"""A decoder for one sequence in float64 NumPy, whose cache is a Python list of entries per layer and KV head.

It reads kvjax's parameter tree. The prompt is one full attention matrix per layer under the policy's mask, followed by
one selection per layer; every later token is fed alone. A layer that reads another's keys and values sees the very list
of that layer, its owner; the owner's weights alone are scored, and what they evict leaves once all have read.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.oracles import variants
from tests.oracles.codecs import Dense, OracleCodec
from tests.oracles.policies import Decision, Entry, Full, OraclePolicy, Row, StreamingLLM
from tests.oracles.variants import dense, rms_norm, to_float64

if TYPE_CHECKING:
    from kvjax.config import ModelConfig

__all__ = ["Decoder", "Positions", "Result", "dense", "rms_norm", "rotate", "run", "to_float64"]

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
      routing: the same for the choice of experts.
    """

    logits: np.ndarray
    prompt_length: int
    kept: list[Positions]
    attended: list[Positions]
    scores: list[list[list[dict[int, float]]]]
    margin: float
    routing: float = math.inf

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
    return Result(np.concatenate(logits), len(prompt), kept, attended, scores, decoder.margin, decoder.routing)


class Decoder:
    """The network's weights and the live cache of one sequence."""

    def __init__(self, params: dict[str, Any], config: ModelConfig, policy: OraclePolicy, codec: OracleCodec) -> None:
        if isinstance(policy, StreamingLLM):
            narrowest = min((window for window in config.windows if window), default=math.inf)
            if policy.sinks + policy.window > narrowest:
                raise ValueError(f"what in-cache positions mean to a layer that sees {narrowest} is nowhere defined")
        self.params = to_float64(params)
        self.config = config
        self.policy = policy
        self.codec = codec
        self.owners = [variants.owner_of(config, layer) for layer in range(config.num_layers)]
        self.kv_heads = variants.kv_heads_of(config)
        own: dict[int, list[list[Entry]]] = {owner: [[] for _ in range(self.kv_heads)] for owner in self.owners}
        # Layers that share keys and values share the list itself.
        self.cache: list[list[list[Entry]]] = [own[owner] for owner in self.owners]
        self.decisions: dict[int, Decision] = {}
        self.attended: Positions = []
        self.seen = 0
        self.margin = math.inf
        self.routing = math.inf

    def kept(self) -> Positions:
        """Positions held now, per layer of the model: a reader's are its owner's."""
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
        config = self.config
        positions = list(range(self.seen, self.seen + len(tokens)))
        x = variants.embed(config, self.params, tokens)
        self.attended = []
        for layer in range(config.num_layers):
            weights = self.params[f"layers_{layer}"]
            attention = functools.partial(self._attention, layer, weights["attention"], positions)
            x = variants.block(config, weights, "attention", x, attention)
            x, routing = variants.feed_forward_block(config, layer, weights, x)
            self.routing = min(self.routing, routing)
        for owner, decision in self.decisions.items():
            self.margin = min(self.margin, decision.margin)
            for entries, kept in zip(self.cache[owner], decision.kept, strict=True):
                entries[:] = [e for e in entries if e.position in kept]
        self.seen += len(tokens)
        return variants.logits_of(config, self.params, x)

    def _attention(self, layer: int, weights: dict[str, Any], positions: list[int], x: np.ndarray) -> np.ndarray:
        """x [T, hidden] -> [T, hidden]; an owner writes, attends, and decides what it keeps; a reader attends."""
        config, policy = self.config, self.policy
        group = config.num_heads // self.kv_heads
        query = variants.queries(config, weights, x)
        owns = self.owners[layer] == layer
        if owns:
            self._write(layer, weights, x, positions)

        out, rows = [], []
        for t, position in enumerate(positions):
            row: list[dict[int, float]] = []
            mixed = []
            for h in range(config.num_heads):
                visible = self._visible(layer, h // group, position)
                weight, values = self._weights(layer, weights, h, query[t, h], position, visible)
                mixed.append(weight @ values)
                row.append({e.position: float(w) for w, e in zip(weight, visible, strict=True)})
                for w, e in zip(weight, visible, strict=True):
                    e.score += float(w) * owns
            out.append(np.concatenate(mixed))
            rows.append(row)
        self.attended.append([tuple(sorted(rows[-1][head * group])) for head in range(self.kv_heads)])
        if owns:
            self._decide(layer, policy, rows, positions[-1])
        return dense(np.stack(out), weights["o"])

    def _write(self, layer: int, weights: dict[str, Any], x: np.ndarray, positions: list[int]) -> None:
        """Appends the new tokens' entries."""
        config, codec = self.config, self.codec
        key, value = variants.keys_and_values(config, weights, x)
        key = variants.turn(config, layer, key, positions)
        for head, entries in enumerate(self.cache[layer]):
            # The first new token evicts what it must not see; a prompt starts from nothing.
            entries[:] = [e for e in entries if self.policy.visible(positions[0], e.position)]
            for t, position in enumerate(positions):
                stored = codec.roundtrip(key[t, head])
                # A latent is stored once, so what is read as its value is the key as it was coded.
                read = stored[: config.latent.kv_lora_rank] if config.latent else codec.roundtrip(value[t, head])
                entries.append(Entry(position, stored, read))

    def _decide(self, layer: int, policy: OraclePolicy, rows: list[Row], query: int) -> None:
        """What stays once every reader has read."""
        self.decisions[layer] = policy.keep(self.cache[layer], rows, query)

    def _visible(self, layer: int, head: int, position: int) -> list[Entry]:
        """Entries that the token at `position` attends to: what the policy and the layer's own window leave."""
        window = None if isinstance(self.policy, StreamingLLM) else self.config.windows[layer]
        return [
            e
            for e in self.cache[layer][head]
            if self.policy.visible(position, e.position) and (window is None or e.position > position - window)
        ]

    def _weights(
        self,
        layer: int,
        weights: dict[str, Any],
        h: int,
        query: np.ndarray,
        position: int,
        visible: list[Entry],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Softmax weights [n] of query head h, not yet rotated, over n entries, and their values [n, D]."""
        config = self.config
        coordinates, own = self.policy.coordinates([e.position for e in visible], position)
        stored = np.stack([e.key for e in visible])
        moved = [new - e.position for new, e in zip(coordinates, visible, strict=True)]
        stored = variants.turn(config, layer, stored, moved, stretch=False)
        keys, values = variants.expand(config, weights, h, stored, np.stack([e.value for e in visible]))
        turned = variants.turn(config, layer, query[None], [own])[0]
        return variants.attend(config, weights, h, turned, keys), values


def rotate(x: np.ndarray, positions: Sequence[int], theta: float) -> np.ndarray:
    """RoPE of n vectors [n, D]: pair (i, i + D/2) turns by position * theta^(-2i/D) (Su et al. 2021, 2104.09864)."""
    half = x.shape[-1] // 2
    angles = np.array(positions, np.float64)[:, None] * variants.plain_frequencies(x.shape[-1], theta)
    first, second = x[:, :half], x[:, half:]
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)], axis=-1
    )
