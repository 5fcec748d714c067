"""Plain attention to multi-head latent attention (TransMLA: Meng et al. 2025, 2502.07864).

DeepSeek's layout has one rotated key for all heads, and everything else without position in a latent. So the keys of
all heads are first turned among themselves, one rotation for each of RoPE's frequencies, that gathers their energy in
few (RoRoPE): the same for both channels of a pair, so that it commutes with RoPE and changes nothing. RoPE stays on the
strongest of these and is taken off the rest, which is what is lost. The rest and the values, brought to one size, are
then projected jointly to `kv_lora_rank` directions. The rotations go into the key and query weights, the projections
into those that make the latent and expand it.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, NamedTuple

import numpy as np

from kvjax.config import Latent, ModelConfig, RopeScaling
from kvjax.convert.calibration import checked_calibration, losses, moments_of, wide
from kvjax.convert.plain import changed, check_plain, checked_integer
from kvjax.convert.principal import principal
from kvjax.convert.report import Energy, Report, report
from kvjax.errors import ConfigError
from kvjax.model import Model
from kvjax.models.rotary import inverse_frequencies
from kvjax.typing import Params

NOT_LINEAR = {
    "qk_norm": "its keys are normalised head by head before RoPE, which no projection of a latent can say",
    "qk_norm_whole": "its keys are normalised before RoPE, which no projection of a latent can say",
    "attention_sinks": "latent attention has no sinks",
    "local_rope_theta": "latent attention turns all layers by one base",
}
"""Fields that DeepSeek's layout has no place for, and why."""
KEPT_EXTRA = ("dtype", "torch_dtype", "rope_parameters", "hidden_act", "pad_token_id", "initializer_range", "use_cache")
"""Fields of another family's `config.json` that mean the same in DeepSeek's."""


def to_mla(
    model: Model,
    kv_lora_rank: int,
    rope_head_dim: int,
    calibration: Any = None,
    freq_fold: int | None = None,
) -> Model:
    """A model with DeepSeek's latent attention in place of MHA, GQA or MQA (TransMLA, Meng et al. 2025, 2502.07864).

    A token takes kv_lora_rank + rope_head_dim elements a layer in the cache, and decoding absorbs the expansion.
    `kvjax.save(..., "safetensors")` writes it as a DeepSeek directory. Mostly it must be trained on.

    With D the width of a head and n heads, full rank is 2 n D - rope_head_dim. At full rank and rope_head_dim n D
    nothing is lost (nor saved).

    Args:
      kv_lora_rank: width of the latent, 1 to 2 n D - rope_head_dim.
      rope_head_dim: channels that RoPE still turns: an even divisor of D, which keeps every (D / rope_head_dim)-th
        frequency of one head, or a multiple of D up to n D, which keeps all frequencies of so many heads.
      calibration: int32[N, T], text by which directions are chosen (the paper takes 128 rows of 256 tokens). None: from
        the weights alone, which loses more.
      freq_fold: so many neighbouring frequencies are taken as one when energy is gathered (FreqFold); it must divide
        D / 2. None: as many as rope_head_dim leaves one of.

    Raises:
      ConfigError: a size is none of these, the calibration is no text of this model, or the model has attention that
        the layout cannot say.
    """
    return convert(model, kv_lora_rank, rope_head_dim, calibration, freq_fold)[0]


def convert(
    model: Model, kv_lora_rank: int, rope_head_dim: int, calibration: Any = None, freq_fold: int | None = None
) -> tuple[Model, Report]:
    """`to_mla`, and what it did."""
    config = model.config
    _check_model(model)
    sizes = _checked_sizes(config, kv_lora_rank, rope_head_dim, freq_fold)
    tokens = checked_calibration(model, calibration)
    target = latent_config(config, sizes.rank, sizes.rope)
    layers, energies = [], []
    for layer, moments in enumerate(moments_of(model, tokens, None)):
        parts, energy = latent_layer(
            model.params[f"layers_{layer}"]["attention"], config, target, sizes, moments.keys[0]
        )
        layers.append(parts)
        energies.append(energy)
    after = changed(model, target, layers)
    what = f"MLA, a latent of {sizes.rank} and {sizes.rope} rotated channels"
    return after, report(what, energies, config, target, losses(model, after, tokens))


class Sizes(NamedTuple):
    """What the arguments of `to_mla` come to.

    Attributes:
      rank, rope: kv_lora_rank and rope_head_dim.
      slots: for each pair of rotated channels, the frequency, 0 to D / 2 - 1, by which it turns.
      fold: neighbouring frequencies that are taken as one.
    """

    rank: int
    rope: int
    slots: tuple[int, ...]
    fold: int


def _check_model(model: Model) -> None:
    check_plain(model, "to_mla")
    for name, why in NOT_LINEAR.items():
        if getattr(model.config, name):
            raise ConfigError(
                f"to_mla cannot convert a model with {name}={getattr(model.config, name)!r}: {why}; to_gqa can"
            )
    if model.config.rotary_width < model.config.width:
        raise ConfigError(
            f"to_mla converts heads that RoPE turns wholly, got rotary_fraction={model.config.rotary_fraction}; to_gqa "
            "takes such models"
        )


def _checked_sizes(config: ModelConfig, rank: Any, rope: Any, fold: Any) -> Sizes:
    width, heads = config.width, config.num_kv_heads

    def fits(n: int) -> bool:
        return 0 < n <= heads * width and n % 2 == 0 and (width % n == 0 or n % width == 0)

    rule = f"an even divisor of head_dim {width}, or a multiple of it up to {heads * width} (all key-value heads)"
    rope = checked_integer("to_mla rope_head_dim", rope, rule, fits)
    full = 2 * heads * width - rope
    rule = f"1 to 2 * num_kv_heads * head_dim - rope_head_dim = {full}"
    rank = checked_integer("to_mla kv_lora_rank", rank, rule, lambda n: 1 <= n <= full)
    step, half = max(1, width // rope), width // 2
    rule = f"None or a divisor of the {half} frequencies"
    fold = step if fold is None else checked_integer("to_mla freq_fold", fold, rule, lambda n: n > 0 and half % n == 0)
    slots = tuple(range(0, half, step)) * max(1, rope // width)
    return Sizes(rank, rope, slots, fold)


def latent_config(config: ModelConfig, rank: int, rope: int) -> ModelConfig:
    """The config of the converted model: DeepSeek's family, its norm on the latent left out."""
    latent = Latent(
        kv_lora_rank=rank,
        qk_nope_head_dim=config.width,
        qk_rope_head_dim=rope,
        v_head_dim=config.width,
        kv_norm=False,
        q_bias=config.qkv_bias,
    )
    extra = json.loads(config.extra)
    return dataclasses.replace(
        config,
        family="deepseek_v2" if config.mlp_bias else "deepseek_v3",
        latent=latent,
        num_kv_heads=config.num_heads,
        head_dim=rope,
        rope_interleaved=False,
        rope_scaling=_scaling(config, rope),
        query_scale=None,
        extra=json.dumps({name: extra[name] for name in KEPT_EXTRA if name in extra}, sort_keys=True),
    )


def _scaling(config: ModelConfig, rope: int) -> RopeScaling:
    """What turns `rope` channels by the frequencies that stay.

    Mostly the model's own: theta^(-2 i / D) at every c-th i is theta^(-2 j / (D / c)). Where it is not, as of several
    heads beside one another, each pair gets a divisor of its own, which is what longrope is.
    """
    width = config.width
    whole, factor = inverse_frequencies(width, config.rope_theta, config.rope_scaling)
    wanted = np.tile(whole[:: max(1, width // rope)], max(1, rope // width))
    if config.rope_scaling.kind in ("default", "linear", "llama3"):
        found, _ = inverse_frequencies(rope, config.rope_theta, config.rope_scaling)
        if np.allclose(found, wanted, rtol=1e-6, atol=0):
            return config.rope_scaling
    plain = inverse_frequencies(rope, config.rope_theta, RopeScaling())[0]
    divisors = tuple(float(x) for x in plain.astype(np.float64) / wanted)
    return RopeScaling(
        "longrope",
        original_max_position_embeddings=config.max_position_embeddings,
        attention_factor=factor,
        short_factor=divisors,
        long_factor=divisors,
    )


def latent_layer(
    attention: Params, config: ModelConfig, target: ModelConfig, sizes: Sizes, moment: np.ndarray
) -> tuple[Params, Energy]:
    """One layer's new weights. config, target: before and after; moment: of keys before RoPE and values, [2nD, 2nD]."""
    heads, width, latent = config.num_kv_heads, config.width, target.latent
    assert latent is not None
    both = heads * width
    pairs = channel_pairs(width, config.rope_interleaved)
    turned, rest = gather(moment[:both, :both], heads, pairs, sizes)
    joint, ratio = _balanced(moment, rest)
    basis = principal(joint, sizes.rank)

    # From keys and values to the latent, and back to keys without position (their columns first) and values.
    nope = len(rest)
    encode = np.concatenate([basis[:nope].T @ rest / ratio, basis[nope:].T], axis=1)
    expand = np.concatenate([ratio * rest.T @ basis[:nope], basis[nope:]])

    def down(leaf: str) -> np.ndarray:
        stacked = np.concatenate([wide(attention[name][leaf]) for name in ("k", "v")])
        return np.concatenate([encode @ stacked, turned @ stacked[:both]])

    factor = inverse_frequencies(width, config.rope_theta, config.rope_scaling)[1]
    scale = width**-0.5 if config.query_scale is None else config.query_scale
    scale *= latent.qk_head_dim**0.5
    shared = config.num_heads // heads
    blocks = turned.reshape(-1, heads, width)

    def queries(x: Any) -> np.ndarray:
        """[H * D, ...] -> [H * (D + rope_head_dim), ...]; what RoPE no longer turns, it no longer scales either."""
        x = wide(x)
        by_head = x.reshape(heads, shared, width, -1)
        rotated = np.einsum("rkd,kgdx->kgrx", blocks, by_head, optimize=True)
        return scale * np.concatenate([factor**2 * by_head, rotated], axis=2).reshape(-1, *x.shape[1:])

    per_head = [expand[part].reshape(heads, 1, width, -1) for part in (slice(0, both), slice(both, None))]
    up = np.broadcast_to(np.concatenate(per_head, axis=2), (heads, shared, 2 * width, sizes.rank))
    parts: Params = {
        "q": {leaf: queries(x) for leaf, x in attention["q"].items()},
        "kv_down": {leaf: down(leaf) for leaf in attention["k"]},
        "kv_up": {"weight": up.reshape(-1, sizes.rank)},
        "k": None,
        "v": None,
    }
    return parts, _energy(moment, joint, basis, nope, ratio, turned)


def channel_pairs(width: int, interleaved: bool) -> np.ndarray:
    """int[D / 2, 2]: the two channels that each frequency turns."""
    pairs = np.arange(width).reshape(-1, 2) if interleaved else np.arange(width).reshape(2, -1).T
    return np.ascontiguousarray(pairs)


def gather(moment: np.ndarray, heads: int, pairs: np.ndarray, sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """RoRoPE: rows [rope_head_dim, n D] that RoPE goes on turning, pairs side by side, and the rest [.., n D].

    Together an orthogonal matrix. Within `fold` neighbouring frequencies, all heads' pairs are mixed by the
    eigenvectors of their moment, both channels of a pair alike; the strongest go to the slots of these frequencies. The
    paper's damping adds a multiple of the identity to the moment, which moves no eigenvector.

    Args:
      moment: [n D, n D] of keys before RoPE. pairs: `channel_pairs`.
    """
    width = 2 * len(pairs)
    turned = np.zeros((len(sizes.slots), 2, heads * width))
    rest = []
    for first in range(0, len(pairs), sizes.fold):
        few = pairs[first : first + sizes.fold]
        # Of channel 0 and 1 of a pair: where they lie, all heads.
        places = [(np.arange(heads)[:, None] * width + few[:, part]).reshape(-1) for part in (0, 1)]
        mixing = principal(np.sum([moment[np.ix_(place, place)] for place in places], axis=0))
        slots = [slot for slot, frequency in enumerate(sizes.slots) if first <= frequency < first + sizes.fold]
        for part, place in enumerate(places):
            turned[np.ix_(slots, [part], place)] = mixing[:, : len(slots)].T[:, None]
            rows = np.zeros((mixing.shape[1] - len(slots), heads * width))
            rows[:, place] = mixing[:, len(slots) :].T
            rest.append(rows)
    return turned.reshape(-1, heads * width), np.concatenate(rest)


def _balanced(moment: np.ndarray, rest: np.ndarray) -> tuple[np.ndarray, float]:
    """The moment of [keys without position / ratio | values], and the ratio, which gives both the same mean norm.

    Keys are mostly much larger than values, and would have all directions to themselves.
    """
    both = rest.shape[1]
    cross, values = rest @ moment[:both, both:], moment[both:, both:]
    keys = rest @ moment[:both, :both] @ rest.T
    sizes = [np.sqrt(np.maximum(np.diag(part), 0)).mean() if len(part) else 0.0 for part in (keys, values)]
    ratio = float(sizes[0] / sizes[1]) if all(size > 0 for size in sizes) else 1.0
    return np.block([[keys / ratio**2, cross / ratio], [cross.T / ratio, values]]), ratio


def _energy(
    moment: np.ndarray, joint: np.ndarray, basis: np.ndarray, nope: int, ratio: float, turned: np.ndarray
) -> Energy:
    """What the latent and the rotated channels keep of keys and values."""
    # The directions are eigenvectors: what is lost of a column is its energy less its part in theirs.
    lost = np.diag(joint) - basis**2 @ np.einsum("ir,ij,jr->r", basis, joint, basis, optimize=True)
    both = turned.shape[1]
    whole = np.diag(moment)
    keys, values = float(whole[:both].sum()), float(whole[both:].sum())
    rope = float(np.einsum("ri,ij,rj->", turned, moment[:both, :both], turned, optimize=True))

    def share(part: float, of: float) -> float:
        return min(1.0, max(0.0, part / of)) if of > 0 else 1.0

    return Energy(
        share(keys - ratio**2 * float(lost[:nope].sum()), keys),
        share(values - float(lost[nope:].sum()), values),
        share(rope, keys),
    )
