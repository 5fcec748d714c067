"""Rotary position embedding (Su et al. 2021, 2104.09864), Hugging Face pairing: channel i turns with i + D/2.

DeepSeek's weights pair neighbours, (2i, 2i + 1). Those are brought apart before they turn and stay so: queries and keys
alike, so that no score notices.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.config import ModelConfig, RopeScaling
from kvjax.errors import ConfigError
from kvjax.typing import Rotate


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> tuple[np.ndarray, float]:
    """Radians per position of each pair, float32[D/2], and the factor on cos and sin (1 but for yarn)."""
    plain = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    plain = plain.astype(np.float32)
    if scaling.kind == "default":
        return plain, 1.0
    if scaling.kind == "inclusive":
        return (1.0 / theta ** np.linspace(0, 1, head_dim // 2, dtype=np.float32)).astype(np.float32), 1.0
    if scaling.kind == "linear":
        return plain / np.float32(scaling.factor), 1.0
    if scaling.kind == "llama3":
        return _llama3(plain, scaling), 1.0
    if scaling.kind == "longrope":
        return _longrope(plain, scaling)
    return _yarn(plain, head_dim, theta, scaling)


def _llama3(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Long wavelengths are stretched, short ones kept, those between blended (Llama 3.1)."""
    wavelength = 2 * math.pi / plain
    turns = scaling.original_max_position_embeddings / wavelength
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return ((1 - smooth) * plain / scaling.factor + smooth * plain).astype(np.float32)


def _longrope(plain: np.ndarray, scaling: RopeScaling) -> tuple[np.ndarray, float]:
    """A divisor per pair, and a factor on cos and sin that grows with the logarithm of the stretch (2402.13753)."""
    divisors = np.asarray(scaling.long_factor if scaling.long else scaling.short_factor, np.float32)
    if divisors.shape != plain.shape:
        raise ConfigError(f"longrope needs {plain.size} factors, one per rotated pair, got {divisors.size}")
    factor = scaling.attention_factor
    if factor is None:
        grown = math.log(max(scaling.factor, 1.0)) / math.log(scaling.original_max_position_embeddings)
        factor = math.sqrt(1 + grown)
    return plain / divisors, factor


def _yarn(plain: np.ndarray, head_dim: int, theta: float, scaling: RopeScaling) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al. 2023, 2309.00071, section 3): a ramp over pair index between kept and stretched."""

    def pair_with(turns: float) -> float:
        """The (fractional) pair that makes this many turns over the original context."""
        context = scaling.original_max_position_embeddings
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    stretched = plain / scaling.factor
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return (stretched * ramp + plain * (1 - ramp)).astype(np.float32), factor


def apply_rotary(x: jax.Array, positions: jax.Array, frequencies: np.ndarray, factor: float) -> jax.Array:
    """Turns x[B, T, heads, D] to positions int32[B, T]; angles in float32, result in x's dtype."""
    angle = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angle)[:, :, None] * factor, jnp.sin(angle)[:, :, None] * factor
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def rotate_part(
    x: jax.Array,
    positions: jax.Array,
    frequencies: np.ndarray,
    factor: float,
    first: int,
    width: int,
    interleaved: bool,
) -> jax.Array:
    """Turns channels first .. first + width of x[B, T, heads, D]; the others have no position."""
    before, part, beyond = jnp.split(x, [first, first + width], axis=-1)
    if interleaved:
        part = jnp.concatenate([part[..., ::2], part[..., 1::2]], axis=-1)
    return jnp.concatenate([before, apply_rotary(part, positions, frequencies, factor), beyond], axis=-1)


@functools.lru_cache(maxsize=64)
def rotary(config: ModelConfig, local: bool = False) -> Rotate:
    """The `rotate(x, positions)` of a model, or of its windowed layers where those turn by a base of their own.

    With latent attention it turns the last `qk_rope_head_dim` channels of whatever it is given, expanded or absorbed.
    """
    theta, scaling = config.rope_theta, config.rope_scaling
    if local and config.local_rope_theta is not None:
        theta, scaling = config.local_rope_theta, RopeScaling()
    width = config.rotary_width
    frequencies, factor = inverse_frequencies(width, theta, scaling)
    if config.latent is not None:
        interleaved = config.latent.interleaved

        def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
            return rotate_part(x, positions, frequencies, factor, x.shape[-1] - width, width, interleaved)

        return rotate
    if width < config.width or config.rope_interleaved:
        pairing = config.rope_interleaved
        return functools.partial(
            rotate_part, frequencies=frequencies, factor=factor, first=0, width=width, interleaved=pairing
        )
    return functools.partial(apply_rotary, frequencies=frequencies, factor=factor)
