"""A decoder for one sequence in float64 NumPy, whose cache is a Python list of entries per layer and KV head.

It reads kvjax's parameter tree. The prompt is one full attention matrix per layer under the policy's mask, followed by
one selection per layer; every later token is fed alone. A layer that reads another's keys and values sees the very list
of that layer, its owner; the owner's weights alone are scored, and what they evict leaves once all have read. Merging
and coding that wait for the end of a step happen then, too.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.oracles import codecs, merging, variants
from tests.oracles.codecs import Dense, OracleCodec
from tests.oracles.policies import Decision, Entry, Full, Moment, OraclePolicy, Row
from tests.oracles.selects import OracleSelect
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
      logits: float64[T + F, V], after each token; NaN after prompt tokens whose hidden states a policy dropped.
      prompt_length: T.
      kept: 1 + F times kept[layer][kv_head], held after the prompt and after each forced token, evictions decided.
      attended: 1 + F times attended[layer][kv_head], what the last prompt token and each forced token attended to:
        under a select, what it read.
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
    select: OracleSelect | None = None,
) -> Result:
    """Feeds `prompt` at once and `forced` one token at a time."""
    decoder = Decoder(params, config, policy or Full(), codec or Dense(), select)
    logits = [decoder.feed_prompt(prompt)]
    kept, attended, scores = [decoder.kept()], [decoder.attended], [decoder.scores()]
    for token in forced:
        logits.append(decoder.feed(token))
        kept.append(decoder.kept())
        attended.append(decoder.attended)
        scores.append(decoder.scores())
    return Result(np.concatenate(logits), len(prompt), kept, attended, scores, decoder.margin, decoder.routing)


class Decoder:
    """The network's weights and the live cache of one sequence.

    Attributes:
      cache: cache[layer][kv_head], the entries held now, in token order; a reader's list is its owner's.
    """

    def __init__(
        self,
        params: dict[str, Any],
        config: ModelConfig,
        policy: OraclePolicy,
        codec: OracleCodec,
        select: OracleSelect | None = None,
    ) -> None:
        self.params = to_float64(params)
        self.config = config
        self.policy = policy
        self.codec = codecs.complete(codec)
        self.select = select
        self.owners = [variants.owner_of(config, layer) for layer in range(config.num_layers)]
        self.kv_heads = variants.kv_heads_of(config)
        own: dict[int, list[list[Entry]]] = {owner: [[] for _ in range(self.kv_heads)] for owner in self.owners}
        # Layers that share keys and values share the list itself.
        self.cache: list[list[list[Entry]]] = [own[owner] for owner in self.owners]
        self.views: dict[int, list[list[list[Entry]]]] = {}
        self.fed: dict[int, list[int]] = {}
        self.decisions: dict[int, Decision] = {}
        self.deciding: dict[int, tuple[OraclePolicy, OracleCodec]] = {}
        self.memory: dict[int, dict[str, Any]] = {owner: {} for owner in own}
        self.attended: Positions = []
        self.tokens: list[int] = []
        self.seen = 0
        self.margin = math.inf
        self.routing = math.inf
        refuse_what_is_undefined(config, policy, self.codec, select)

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
        self.tokens += tokens
        positions = list(range(self.seen, self.seen + len(tokens)))
        x = variants.embed(config, self.params, tokens)
        self.attended = []
        for layer in range(config.num_layers):
            weights = self.params[f"layers_{layer}"]
            attention = functools.partial(self._attention, layer, weights["attention"], positions)
            x = variants.block(config, weights, "attention", x, attention)
            x, positions = self._survivors(layer, x, positions)
            x, routing = variants.feed_forward_block(config, layer, weights, x)
            self.routing = min(self.routing, routing)
        self._settle()
        logits = np.full((len(tokens), config.vocab_size), np.nan)
        logits[np.array(positions) - self.seen] = variants.logits_of(config, self.params, x)
        self.seen += len(tokens)
        return logits

    def _attention(self, layer: int, weights: dict[str, Any], positions: list[int], x: np.ndarray) -> np.ndarray:
        """x [T, hidden] -> [T, hidden]; an owner writes, attends, and decides what it keeps; a reader attends."""
        config, policy = self.config, self.policy
        group = config.num_heads // self.kv_heads
        query = variants.queries(config, weights, x)
        owns = self.owners[layer] == layer
        if owns:
            self.fed[layer] = positions
            self._write(layer, weights, x, positions, query)
        if policy.merges_on_write:
            query = without_last_channel(query)

        out, rows = [], []
        for t, position in enumerate(positions):
            row: list[dict[int, float]] = []
            mixed = []
            for head in range(self.kv_heads):
                visible = self._visible(layer, head, t, position)
                heads = range(head * group, (head + 1) * group)
                chosen, share = self._choose(layer, weights, heads, query[t], position, visible)
                for h in heads:
                    weight, values = self._weights(layer, weights, h, query[t, h], position, chosen)
                    result = weight @ values
                    if share is not None:
                        _, everything = self._weights(layer, weights, h, query[t, h], position, visible)
                        result = share[h % group] * result + (1 - share[h % group]) * everything.mean(axis=0)
                    mixed.append(result)
                    row.append({e.position: float(w) for w, e in zip(weight, chosen, strict=True)})
                    for w, e in zip(weight, chosen, strict=True):
                        e.score += float(w) * owns
            out.append(np.concatenate(mixed))
            rows.append(row)
        self.attended.append([tuple(sorted(rows[-1][head * group])) for head in range(self.kv_heads)])
        if owns:
            self._decide(layer, policy, rows, positions[-1])
        return dense(np.stack(out), weights["o"])

    # Writing

    def _write(
        self, layer: int, weights: dict[str, Any], x: np.ndarray, positions: list[int], query: np.ndarray
    ) -> None:
        """Appends the new tokens' entries, and notes in `views` what each of them finds."""
        key, value = variants.keys_and_values(self.config, weights, x)
        views: list[list[list[Entry]]] = [[] for _ in positions]
        for head, entries in enumerate(self.cache[layer]):
            # The first new token evicts what it must not see; a prompt starts from nothing.
            entries[:] = [e for e in entries if self.policy.visible(positions[0], e.position)]
            if self.policy.merges_on_write:
                group = self.config.num_heads // self.kv_heads
                importance = query[:, head * group : (head + 1) * group]
                alpha, omega, margin = merging.decisions(key[:, head], importance)
                self.margin = min(self.margin, margin)
                for t in range(len(positions)):
                    self._merge(layer, head, positions[t], key[t, head], value[t, head], alpha[t], omega[t])
                    views[t].append(list(entries))
                continue
            for entry in self._entries(layer, head, key[:, head], value[:, head], positions):
                entry.slot = self._slot(entries, entry.position)
                entries.append(entry)
            for view in views:
                view.append(entries)
        self.views[layer] = views

    def _entries(
        self, layer: int, head: int, key: np.ndarray, value: np.ndarray, positions: Sequence[int]
    ) -> list[Entry]:
        """What is read back of unrotated keys [T, D] and values [T, D]."""
        config, codec, owner = self.config, self.codec, self._order(layer)
        if codec.before_rotation:
            read = codec.write(owner, head, "key", key, positions)
            stored = variants.turn(config, layer, read, positions)
        else:
            turned = variants.turn(config, layer, key, positions)
            stored = read = codec.write(owner, head, "key", turned, positions)
        if config.latent:
            # A latent is stored once, so what is read as its value is the key as it was coded.
            values = stored[:, : config.latent.kv_lora_rank]
        else:
            values = codec.write(owner, head, "value", value, positions)
        return [Entry(p, k, v) for p, k, v in zip(positions, stored, values, strict=True)]

    def _merge(
        self,
        layer: int,
        head: int,
        position: int,
        key: np.ndarray,
        value: np.ndarray,
        joins: bool,
        importance: float,
    ) -> None:
        """One token goes into the newest entry, or behind it."""
        entries, total = self.cache[layer][head], importance
        key = without_last_channel(key)
        slot = len(entries)
        if joins and entries:
            last = entries.pop()
            back = variants.turn(self.config, layer, last.key[None], [-last.position], stretch=False)[0]
            # Without the factor too, which storing puts on again.
            back /= variants.turn(self.config, layer, np.ones((1, len(back))), [0])[0]
            slot, total = last.slot, last.importance + importance
            key = (back * last.importance + key * importance) / total
            value = (last.value * last.importance + value * importance) / total
        (entry,) = self._entries(layer, head, key[None], value[None], [position])
        entries.append(dataclasses.replace(entry, slot=slot, importance=float(total)))

    def _slot(self, entries: list[Entry], position: int) -> int:
        """Where a new entry goes."""
        ring = self.policy.slot(position)
        if ring is not None:
            return ring
        taken = {e.slot for e in entries}
        return next(slot for slot in range(len(entries) + 1) if slot not in taken)

    # Deciding

    def _order(self, layer: int) -> int:
        """A layer's place among those that own keys and values."""
        return sorted(self.memory).index(self.owners[layer])

    def _decide(self, layer: int, policy: OraclePolicy, rows: list[Row], query: int) -> None:
        """What stays once every reader has read."""
        self.deciding[layer] = policy, self.codec
        self.decisions[layer] = policy.decide(
            Moment(
                self._order(layer),
                len(self.memory),
                self.tokens,
                self.fed[layer],
                self.cache[layer],
                rows,
                not self.seen,
                self.memory[layer],
            )
        )

    def _survivors(self, layer: int, x: np.ndarray, positions: list[int]) -> tuple[np.ndarray, list[int]]:
        """Hidden states [T, hidden] that go on to the next layer."""
        if not self.policy.drops_hidden_states or self.seen:
            return x, positions
        kept = self.decisions[self.owners[layer]].kept[0]
        alive = [t for t, position in enumerate(positions) if position in kept]
        return x[alive], [positions[t] for t in alive]

    def _settle(self) -> None:
        """Drops, merges and codes what the step left to its end."""
        rank = self.config.latent.kv_lora_rank if self.config.latent else None
        for owner, decision in self.decisions.items():
            policy, codec = self.deciding[owner]
            self.margin = min(self.margin, decision.margin)
            for head, (entries, kept) in enumerate(zip(self.cache[owner], decision.kept, strict=True)):
                entries[:] = [e for e in entries if e.position in kept]
                for entry in entries if decision.merged else ():
                    if entry.position in decision.merged[head]:
                        key, value = decision.merged[head][entry.position]
                        entry.key = codec.roundtrip(key)
                        entry.value = codec.roundtrip(value) if rank is None else entry.key[:rank]
                if not self.seen and policy.slot(0) is None:
                    # What stays of a prompt is stored without gaps.
                    for slot, entry in enumerate(sorted(entries, key=lambda e: e.position)):
                        entry.slot = slot
                codec.settle(sorted(entries, key=lambda e: e.slot), rank)

    # Reading

    def _visible(self, layer: int, head: int, t: int, position: int) -> list[Entry]:
        """Entries that the t-th new token may attend to: what the policy and the layer's own window leave."""
        window = None if self.policy.reach is not None else self.config.windows[layer]
        return [
            e
            for e in self.views[self.owners[layer]][t][head]
            if self.policy.visible(position, e.position) and (window is None or e.position > position - window)
        ]

    def _choose(
        self,
        layer: int,
        weights: dict[str, Any],
        heads: Sequence[int],
        query: np.ndarray,
        position: int,
        visible: list[Entry],
    ) -> tuple[list[Entry], np.ndarray | None]:
        """The entries that a step reads for one KV head, and the share of each query head's output they make up."""
        if self.select is None or not self.seen or self.select.reads_all(layer):
            return visible, None
        config = self.config
        turned = [variants.turn(config, layer, query[h][None], [position])[0] for h in heads]
        absorbed = [variants.absorb(config, weights, h, q) for h, q in zip(heads, turned, strict=True)]
        scale = query.shape[-1] ** -0.5 if config.query_scale is None else config.query_scale
        exact = [[i for i, e in enumerate(visible) if not e.coded[1]]] if self.codec.waits else []
        selection = self.select.choose(visible, np.stack(absorbed), scale, *exact)
        self.margin = min(self.margin, selection.margin)
        return [visible[i] for i in selection.chosen], selection.share

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


def refuse_what_is_undefined(
    config: ModelConfig, policy: OraclePolicy, codec: OracleCodec, select: OracleSelect | None
) -> None:
    """Combinations that no rule gives a meaning.

    Raises:
      ValueError: this is one.
    """
    narrowest = min((window for window in config.windows if window), default=math.inf)
    if policy.reach is not None and policy.reach > narrowest:
        raise ValueError(f"what in-cache positions mean to a layer that sees {narrowest} is nowhere defined")
    if policy.reach is not None and select is not None:
        raise ValueError("by which of its positions a query selects is nowhere defined")
    if codec.waits and not policy.append_only:
        raise ValueError(f"{codec} codes whole groups of slots, which {policy} may write again")
    shares = any(owner != layer for layer, owner in enumerate(config.owners or ()))
    if shares and policy.merges_on_write:
        raise ValueError("what a layer that only reads does with its queries' last channel is nowhere defined")


def without_last_channel(x: np.ndarray) -> np.ndarray:
    """x [..., D] with zeros in its last channel."""
    return np.concatenate([x[..., :-1], np.zeros_like(x[..., -1:])], axis=-1)


def rotate(x: np.ndarray, positions: Sequence[int], theta: float) -> np.ndarray:
    """RoPE of n vectors [n, D]: pair (i, i + D/2) turns by position * theta^(-2i/D) (Su et al. 2021, 2104.09864)."""
    half = x.shape[-1] // 2
    angles = np.array(positions, np.float64)[:, None] * variants.plain_frequencies(x.shape[-1], theta)
    first, second = x[:, :half], x[:, half:]
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)], axis=-1
    )
