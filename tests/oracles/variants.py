"""What tells today's decoders apart, in float64 NumPy: the parts of a layer, and the network without any cache.

One sequence, kvjax's parameter names. T tokens, H query heads, K KV heads, D channels of a head. A layer's attention is
cut where a cache would cut it: `project` makes queries and what is stored, `turn` rotates either, `expand` makes one
query head's keys and values of what is stored, `attend` weighs them.

Sources: MLA, experts in groups and a shared one DeepSeek-V2 (2405.04434); sigmoid scores and the bias that counts for
the choice alone DeepSeek-V3 (2412.19437); YaRN 2309.00071; LongRoPE 2402.13753; cross-layer attention 2405.12981; soft
caps and sandwich norms Gemma 2 (2408.00118); a rope base of windowed layers Gemma 3 (2503.19786); norms of what a block
gives, and over all heads at once, OLMo 2 (2501.00656); learned sinks and the clamped unit gpt-oss (2508.10925).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from kvjax.config import Experts, ModelConfig

Weights = dict[str, Any]
"""A subtree of parameters, leaves float64."""

KeysAndValues = tuple[np.ndarray, np.ndarray]
"""What is stored of T tokens: keys [T, K, D] and values [T, K, D]."""


class Forward(NamedTuple):
    """What `forward` saw.

    Attributes:
      logits: float64[T, V].
      routing: least distance in score between an expert chosen and one that was not, or a group, over all choices.
    """

    logits: np.ndarray
    routing: float


def forward(params: Weights, config: ModelConfig, tokens: Sequence[int]) -> Forward:
    """All tokens at once under each layer's causal mask."""
    params = to_float64(params)
    x, routing = embed(config, params, tokens), math.inf
    made: dict[int, KeysAndValues] = {}
    for layer in range(config.num_layers):
        weights = params[f"layers_{layer}"]
        x = block(config, weights, "attention", x, functools.partial(whole, config, layer, weights["attention"], made))
        x, margin = feed_forward_block(config, layer, weights, x)
        routing = min(routing, margin)
    return Forward(logits_of(config, params, x), routing)


def whole(
    config: ModelConfig, layer: int, weights: Weights, made: dict[int, KeysAndValues], x: np.ndarray
) -> np.ndarray:
    """A layer's attention of x [T, hidden] to itself, or to what its owner has put into `made`: [T, hidden]."""
    positions = range(len(x))
    query = turn(config, layer, queries(config, weights, x), positions)
    owner = owner_of(config, layer)
    if owner == layer:
        key, value = keys_and_values(config, weights, x)
        made[layer] = turn(config, layer, key, positions), value
    out = []
    for h in range(config.num_heads):
        key, value = (part[:, kv_head(config, h)] for part in made[owner])
        key, value = expand(config, weights, h, key, value)
        mixed = []
        for i in positions:
            seen = slice(first_seen(config, layer, i), i + 1)
            mixed.append(attend(config, weights, h, query[i, h], key[seen]) @ value[seen])
        out.append(np.stack(mixed))
    return dense(np.concatenate(out, axis=-1), weights["o"])


# Around the layers


def embed(config: ModelConfig, params: Weights, tokens: Sequence[int]) -> np.ndarray:
    """[T, hidden]."""
    return params["embed"]["embedding"][list(tokens)] * config.embedding_scale


def logits_of(config: ModelConfig, params: Weights, x: np.ndarray) -> np.ndarray:
    """x [T, hidden] after the last layer -> [T, V]."""
    x = norm(config, params["norm"], x)
    weight = params["embed"]["embedding"] if config.tie_word_embeddings else params["head"]["weight"]
    return capped(x @ weight.T, config.logit_soft_cap)


def block(config: ModelConfig, weights: Weights, name: str, x: np.ndarray, inside: Any) -> np.ndarray:
    """x plus what `inside` gives, with a norm before it, after it, or on both sides."""
    inputs = x if config.norm_placement == "post" else norm(config, weights[f"{name}_norm"], x)
    outputs = inside(inputs)
    return x + (outputs if config.norm_placement == "pre" else norm(config, weights[f"{name}_post_norm"], outputs))


def norm(config: ModelConfig, weights: Weights, x: np.ndarray, eps: float | None = None) -> np.ndarray:
    """RMSNorm by scale, or by 1 + scale."""
    scale = weights["scale"] + (1.0 if config.norm_unit_offset else 0.0)
    return rms_norm(x, scale, config.norm_eps if eps is None else eps)


def capped(x: np.ndarray, cap: float | None) -> np.ndarray:
    """cap * tanh(x / cap)."""
    return x if cap is None else cap * np.tanh(x / cap)


# Attention


def owner_of(config: ModelConfig, layer: int) -> int:
    """The layer whose keys and values this one reads."""
    return config.owners[layer] if config.owners else layer


def kv_heads_of(config: ModelConfig) -> int:
    """K: under latent attention one latent stands for all heads."""
    return 1 if config.latent else config.num_kv_heads


def kv_head(config: ModelConfig, h: int) -> int:
    """The KV head that query head h reads."""
    return h // (config.num_heads // kv_heads_of(config))


def first_seen(config: ModelConfig, layer: int, position: int) -> int:
    """The first position that a token sees."""
    window = config.windows[layer]
    return 0 if window is None else max(0, position - window + 1)


def queries(config: ModelConfig, weights: Weights, x: np.ndarray) -> np.ndarray:
    """x [T, hidden] -> [T, H, D], not rotated; under latent attention each head is [nope | rope]."""
    if config.latent:
        eps = config.latent.norm_eps
        if config.latent.q_lora_rank:
            out = dense(norm(config, weights["q_norm"], dense(x, weights["q_down"]), eps), weights["q_up"])
        else:
            out = dense(x, weights["q"])
        return out.reshape(len(x), config.num_heads, -1)
    return normed_heads(config, weights, "q", dense(x, weights["q"]), config.num_heads)


def keys_and_values(config: ModelConfig, weights: Weights, x: np.ndarray) -> KeysAndValues:
    """x [T, hidden] -> what is stored: keys [T, K, D], not rotated, and values [T, K, D].

    Under latent attention the key is [normed latent | rope] and its first kv_lora_rank columns are the value.
    """
    if config.latent:
        rank = config.latent.kv_lora_rank
        down = dense(x, weights["kv_down"])
        latent = norm(config, weights["kv_norm"], down[:, :rank], config.latent.norm_eps)
        return np.concatenate([latent, down[:, rank:]], axis=-1)[:, None], latent[:, None]
    key = normed_heads(config, weights, "k", dense(x, weights["k"]), config.num_kv_heads)
    return key, dense(x, weights["v"]).reshape(len(x), config.num_kv_heads, config.width)


def normed_heads(config: ModelConfig, weights: Weights, name: str, x: np.ndarray, heads: int) -> np.ndarray:
    """x [T, heads * D] -> [T, heads, D], each head normed, all of them at once, or neither."""
    if config.qk_norm_whole:
        x = norm(config, weights[f"{name}_norm"], x)
    x = x.reshape(len(x), heads, config.width)
    return norm(config, weights[f"{name}_norm"], x) if config.qk_norm else x


def expand(
    config: ModelConfig, weights: Weights, h: int, key: np.ndarray, value: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One KV head's stored [n, .] and [n, .] -> the keys [n, D] and values [n, D'] of query head h."""
    if not config.latent:
        return key, value
    latent = config.latent
    width = latent.qk_nope_head_dim + latent.v_head_dim
    up = value @ weights["kv_up"]["weight"][h * width : (h + 1) * width].T
    nope, rope = up[:, : latent.qk_nope_head_dim], key[:, latent.kv_lora_rank :]
    return np.concatenate([nope, rope], axis=-1), up[:, latent.qk_nope_head_dim :]


def absorb(config: ModelConfig, weights: Weights, h: int, query: np.ndarray) -> np.ndarray:
    """Query head h [D], rotated -> what its product with a stored key [.] is a score."""
    if not config.latent:
        return query
    latent = config.latent
    width = latent.qk_nope_head_dim + latent.v_head_dim
    up = weights["kv_up"]["weight"][h * width : h * width + latent.qk_nope_head_dim]
    return np.concatenate([query[: latent.qk_nope_head_dim] @ up, query[latent.qk_nope_head_dim :]])


def attend(config: ModelConfig, weights: Weights, h: int, query: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Query head h [D], rotated, over keys [n, D], rotated -> weights [n]; they sum to less than 1 beside a sink."""
    scale = len(query) ** -0.5 if config.query_scale is None else config.query_scale
    scores = capped(keys @ query * scale, config.attention_soft_cap)
    if config.attention_sinks:
        scores = np.append(scores, weights["sinks"][h])
    exponentials = np.exp(scores - scores.max())
    return exponentials[: len(keys)] / exponentials.sum()


# Rotation


def turn(config: ModelConfig, layer: int, x: np.ndarray, positions: Sequence[int], stretch: bool = True) -> np.ndarray:
    """Queries or stored keys x [n, ..., D] turned by positions: the last channels of a latent one, else the first ones.

    stretch False leaves out the factor that some scalings put on cos and sin: for keys that have it already.
    """
    width = config.latent.qk_rope_head_dim if config.latent else int(config.width * config.rotary_fraction)
    part = slice(x.shape[-1] - width, None) if config.latent else slice(width)
    frequencies, factor = rope(config, layer, width)
    angles = np.asarray(positions, np.float64)[:, None] * frequencies
    angles = angles.reshape(len(x), *(1,) * (x.ndim - 2), -1)
    cos, sin = np.cos(angles), np.sin(angles)
    interleaved = config.latent.interleaved if config.latent else config.rope_interleaved
    even = np.arange(0, width, 2) if interleaved else np.arange(width // 2)
    odd = even + (1 if interleaved else width // 2)
    turned = np.empty_like(x[..., part])
    turned[..., even] = x[..., part][..., even] * cos - x[..., part][..., odd] * sin
    turned[..., odd] = x[..., part][..., odd] * cos + x[..., part][..., even] * sin
    out = x.copy()
    out[..., part] = turned * (factor if stretch else 1.0)
    return out


def rope(config: ModelConfig, layer: int, width: int) -> tuple[np.ndarray, float]:
    """Radians per position of each pair of `width` channels, and the factor on cos and sin."""
    if config.local_rope_theta is not None and config.windows[layer] is not None:
        return plain_frequencies(width, config.local_rope_theta), 1.0
    plain, scaling = plain_frequencies(width, config.rope_theta), config.rope_scaling
    if scaling.kind == "default":
        return plain, 1.0
    if scaling.kind == "linear":
        return plain / scaling.factor, 1.0
    trained = scaling.original_max_position_embeddings
    if scaling.kind == "longrope":
        own = math.sqrt(1 + math.log(scaling.factor) / math.log(trained))
        divisors = np.array(scaling.long_factor if scaling.long else scaling.short_factor)
        return plain / divisors, own if scaling.attention_factor is None else scaling.attention_factor
    if scaling.kind != "yarn":
        raise ValueError(f"the oracle knows no rope scaling {scaling.kind!r}")

    def pair(turns: float) -> float:
        return width * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    own = 0.1 * math.log(scaling.factor) + 1
    stretched = np.array([min(max((i - low) / (high - low), 0.0), 1.0) for i in range(width // 2)])
    frequencies = plain * (1 - stretched) + plain / scaling.factor * stretched
    return frequencies, own if scaling.attention_factor is None else scaling.attention_factor


def plain_frequencies(width: int, theta: float) -> np.ndarray:
    """theta^(-2i / width) (Su et al. 2021, 2104.09864)."""
    return np.array([theta ** (-2.0 * i / width) for i in range(width // 2)])


# Feed-forward


def feed_forward_block(config: ModelConfig, layer: int, weights: Weights, x: np.ndarray) -> tuple[np.ndarray, float]:
    """x [T, hidden] -> [T, hidden], and the margin of the routing (infinite in a layer without experts)."""
    margins = [math.inf]

    def inside(inputs: np.ndarray) -> np.ndarray:
        if config.experts is None or layer in config.experts.dense_layers:
            return unit(config, inputs, *(weights["mlp"][name] for name in ("gate", "up", "down")))
        outputs, margin = mixture(config, config.experts, weights["mlp"], inputs)
        margins.append(margin)
        return outputs

    return block(config, weights, "mlp", x, inside), min(margins)


def unit(config: ModelConfig, x: np.ndarray, gate: Weights, up: Weights, down: Weights) -> np.ndarray:
    """down(activation(gate x) * up x) (Shazeer 2020, 2002.05202)."""
    return dense(activation(config.activation, dense(x, gate)) * dense(x, up), down)


def activation(name: str, x: np.ndarray) -> np.ndarray:
    """x * logistic(x), or x * Phi(x) of the normal distribution, exact or by tanh (Hendrycks 2016, 1606.08415)."""
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "gelu":
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def clamped_unit(x: np.ndarray, gate: Weights, up: Weights, down: Weights, limit: float) -> np.ndarray:
    """down((up x + 1) * g * logistic(1.702 g)), g = gate x at most `limit`, up x within it on both sides."""
    g = np.minimum(dense(x, gate), limit)
    return dense((np.clip(dense(x, up), -limit, limit) + 1) * g / (1 + np.exp(-1.702 * g)), down)


def mixture(config: ModelConfig, experts: Experts, weights: Weights, x: np.ndarray) -> tuple[np.ndarray, float]:
    """Each token through its experts, one after the other, and through the shared one: [T, hidden], and the margin."""
    out, margin = np.zeros_like(x), math.inf
    for t, token in enumerate(x):
        shares, distance = route(experts, weights["router"], token)
        margin = min(margin, distance)
        for expert, share in shares.items():
            parts = [expert_part(weights, name, expert) for name in ("gate", "up", "down")]
            if experts.limit is None:
                out[t] += share * unit(config, token, *parts)
            else:
                out[t] += share * clamped_unit(token, *parts, experts.limit)
    if experts.shared_intermediate_size:
        out = out + unit(config, x, *(weights["shared"][name] for name in ("gate", "up", "down")))
    return out, margin


def expert_part(weights: Weights, name: str, expert: int) -> Weights:
    """One expert's own projection."""
    part = {"weight": weights[f"experts_{name}"]["kernel"][expert].T}
    bias = weights.get(f"experts_{name}_bias")
    return part if bias is None else part | {"bias": bias["bias"][expert]}


def route(experts: Experts, router: Weights, x: np.ndarray) -> tuple[dict[int, float], float]:
    """One token [hidden] -> the weight of each expert it goes through, and the margin of the choice."""
    logits = dense(x, router["gate"])
    if experts.scoring == "softmax":
        scores = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    else:
        scores = 1 / (1 + np.exp(-logits))
    wanted = scores + router["selection_bias"] if experts.selection_bias else scores
    size = experts.count // experts.groups
    members = [range(group * size, (group + 1) * size) for group in range(experts.groups)]
    best = 1 if experts.group_score == "max" else 2
    merits = {group: sum(sorted((wanted[e] for e in ids), reverse=True)[:best]) for group, ids in enumerate(members)}
    groups, group_margin = highest(merits, experts.groups_per_token)
    eligible = {e: wanted[e] for group in groups for e in members[group]}
    chosen, margin = highest(eligible, experts.per_token)
    total = sum(scores[e] for e in chosen) if experts.normalize else 1.0
    shares = {e: float(scores[e] / total * experts.scaling_factor) for e in chosen}
    return shares, min(margin, group_margin)


def highest(scores: dict[int, float], count: int) -> tuple[list[int], float]:
    """The `count` best, and by how much the last of them beats the next."""
    order = sorted(scores, key=lambda name: scores[name], reverse=True)
    return order[:count], math.inf if count == len(order) else float(scores[order[count - 1]] - scores[order[count]])


# Arithmetic


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean x^2 + eps) * scale over the last axis (Zhang and Sennrich 2019, 1910.07467)."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def dense(x: np.ndarray, weights: Weights) -> np.ndarray:
    """x [..., in] -> [..., out]."""
    return x @ weights["weight"].T + weights.get("bias", 0.0)


def to_float64(tree: Any) -> Any:
    """Every leaf as a float64 NumPy array."""
    if isinstance(tree, dict):
        return {name: to_float64(value) for name, value in tree.items()}
    return np.asarray(tree).astype(np.float64)
