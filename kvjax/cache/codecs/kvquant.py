"""KVQuant: keys before RoPE on calibrated ranges, values on their own, uneven levels, outliers kept apart."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache.codecs.calibration import BITS, HOW, Calibration
from kvjax.cache.codecs.packed import FINITE, pack, unpack
from kvjax.cache.codecs.protocol import Apart, Encoded
from kvjax.errors import ConfigError

Tables = dict[str, jax.Array]
"""What a layer's coding goes by, float32: center, half [K, D] of key channels, key_levels, value_levels [2^bits]."""


@dataclasses.dataclass(frozen=True)
class KVQuant:
    """Codes of 2 to 4 bits on levels learnt from the model's own text (Hooper et al. 2024, 2401.18079).

    x' = (x - (max + min) / 2) / ((max - min) / 2) goes to the nearest of 2^bits levels, a table per layer for keys and
    one for values, found by Fisher-weighted k-means (`kvjax.calibrate`). Keys are coded before RoPE, by ranges
    calibrated for each channel, and turned when they are read; values by the range of each token and head, kept in
    float32. Of each vector ceil(outliers * D) channels stay in float16 beside the codes, with their index: of a key
    those farthest out of range, of a value the largest, which its range leaves out. The first `first` tokens, which
    most others attend to, stay in float16 whole, beside the pages (what their slots hold is never read). All is read
    back as stored, prompt and current token included; an element is off by at most half the gap of two levels times
    half the range.

    Three bits are packed as two and one, eight codes in three bytes. With heads of 128 and the defaults a key takes 54
    bytes and a value 62: 3.6 bits an element. The tables belong to the model and are not counted.

    A pool is read a block of pages at a time in plain XLA on every device: no kernel turns keys.

    Attributes:
      bits: 2, 3 or 4. outliers: share of a vector's channels, 0 to 1. first: number of tokens.
      calibration: of the model, or the path of its file; None: enough to plan with.
    """

    bits: int = 3
    outliers: float = 0.01
    first: int = 1
    calibration: Calibration | str | os.PathLike[str] | None = None
    calibrated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in BITS:
            raise ConfigError(f"codecs.KVQuant(bits) must be one of {BITS}, got {self.bits!r}")
        share = self.outliers
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ConfigError(f"codecs.KVQuant(outliers) must be a share from 0 to 1, got {share!r}")
        if not isinstance(self.first, int) or isinstance(self.first, bool) or self.first < 0:
            raise ConfigError(f"codecs.KVQuant(first) must be an integer of at least 0, got {self.first!r}")
        given = self.calibration
        if isinstance(given, str | os.PathLike):
            object.__setattr__(self, "calibration", Calibration.load(os.fspath(given)))
        elif given is not None and not isinstance(given, Calibration):
            raise ConfigError(
                f"codecs.KVQuant(calibration) must be a Calibration or the path of its file, got {given!r:.80}; "
                f"make one by {HOW}"
            )
        found = self.calibration
        if isinstance(found, Calibration) and self.bits not in found.key_levels:
            raise ConfigError(
                f"codecs.KVQuant(bits={self.bits}): {found!r} has levels for {sorted(found.key_levels)} bits only; "
                f"make it again by {HOW}"
            )

    def apart(self, width: int) -> int:
        """Channels of a vector of `width` that stay in float16: ceil(outliers * width), the share as it is written."""
        return math.ceil(Fraction(str(self.outliers)) * width)

    def check_width(self, width: int) -> None:
        """Raises ConfigError for vectors whose codes fill no whole number of bytes."""
        whole = {2: 4, 3: 8, 4: 2}[self.bits]
        if width % whole:
            raise ConfigError(
                f"codecs.KVQuant(bits={self.bits}) packs {whole} codes at a time, and this model's vectors have "
                f"{width} channels; choose bits for which that is a multiple (2: 4, 3: 8, 4: 2)"
            )

    def check_model(self, layers: int, kv_heads: int, key_dim: int, value_in_key: bool) -> None:
        """Raises ConfigError for a model other than the one that was calibrated."""
        found = self.calibration
        if not isinstance(found, Calibration):
            return
        shape = (layers, kv_heads, key_dim)
        if found.key_least.shape != shape or (not value_in_key and self.bits not in found.value_levels):
            raise ConfigError(
                f"codecs.KVQuant(calibration): {found!r} is of another model; this one has {layers} layers of "
                f"{kv_heads} heads with keys of {key_dim}{' that hold the values' if value_in_key else ''}; "
                f"make its own by {HOW}"
            )

    def tables(self, layers: Sequence[int]) -> Tables:
        """Tables of these layers, stacked: center, half [L, K, D], key_levels, value_levels [L, 2^bits].

        Raises:
          ConfigError: nothing was calibrated.
        """
        found = self.calibration
        if not isinstance(found, Calibration):
            raise ConfigError(
                f"codecs.KVQuant(bits={self.bits}) needs a calibration of this model to code anything: make one by "
                f'{HOW} and give calibration="calibration.npz"'
            )
        chosen = np.array(layers)
        least, greatest = found.key_least[chosen], found.key_greatest[chosen]
        tables = {"center": (greatest + least) / 2, "half": (greatest - least) / 2}
        tables["key_levels"] = found.key_levels[self.bits][chosen]
        if self.bits in found.value_levels:
            tables["value_levels"] = found.value_levels[self.bits][chosen]
        return {name: jnp.asarray(table, jnp.float32) for name, table in tables.items()}

    def encode(self, x: jax.Array) -> Encoded:
        """Never: a vector needs its layer, head and part."""
        raise NotImplementedError("KVQuant codes keys and values apart: encode_keys, encode_values")

    def decode(self, stored: Encoded, dtype: Any) -> jax.Array:
        """Never: the same."""
        raise NotImplementedError("KVQuant reads keys and values apart: decode_keys, decode_values")

    def encode_keys(self, x: jax.Array, tables: Tables) -> Encoded:
        """Unrotated keys [..., K, D] -> packed codes uint8[..., K, D * bits / 8] and what is apart [..., K, n]."""
        wide = x.astype(jnp.float32)
        normed = _normal(wide, tables["center"], tables["half"])
        index = _largest(normed, self.apart(x.shape[-1]))
        return Encoded(self._packed(normed, tables["key_levels"]), apart=_taken(wide, index))

    def encode_values(self, x: jax.Array, tables: Tables) -> Encoded:
        """Values [..., D] -> the same, and scale (half the range) and minimum float32[...] of what is not apart."""
        wide = x.astype(jnp.float32)
        index = _largest(wide, self.apart(x.shape[-1]))
        least, half = _range_of_rest(wide, index)
        normed = _normal(wide, (least + half)[..., None], half[..., None])
        return Encoded(self._packed(normed, tables["value_levels"]), half, least, _taken(wide, index))

    def decode_keys(self, stored: Encoded, tables: Tables, dtype: Any) -> jax.Array:
        """Unrotated keys [..., D]; center and half broadcast to that."""
        found = self._levels(stored.values, tables["key_levels"]) * tables["half"] + tables["center"]
        return _returned(found, stored.apart).astype(dtype)

    def decode_values(self, stored: Encoded, tables: Tables, dtype: Any) -> jax.Array:
        """Values [..., D]."""
        assert stored.scale is not None
        assert stored.minimum is not None
        half, center = stored.scale[..., None], (stored.minimum + stored.scale)[..., None]
        found = self._levels(stored.values, tables["value_levels"]) * half + center
        return _returned(found, stored.apart).astype(dtype)

    def normed_keys(self, x: jax.Array, center: jax.Array, half: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """For calibration, keys [..., K, D] on [-1, 1], half of each one's range, and which would be apart."""
        normed = _normal(x, center, half)
        return normed, jnp.broadcast_to(half, x.shape), _marked(_largest(normed, self.apart(x.shape[-1])), x.shape[-1])

    def normed_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The same of values [..., D]."""
        index = _largest(x, self.apart(x.shape[-1]))
        least, half = (part[..., None] for part in _range_of_rest(x, index))
        return _normal(x, least + half, half), jnp.broadcast_to(half, x.shape), _marked(index, x.shape[-1])

    def bytes_per_key(self, width: int, dtype: Any) -> int:
        """`bits` an element, and of each outlier two bytes and an index of one, of two beyond 256 channels."""
        return width * self.bits // 8 + self.apart(width) * (2 + _index_dtype(width).itemsize)

    def bytes_per_vector(self, width: int, dtype: Any) -> int:
        """Of a value: those of a key, and eight for its range."""
        return self.bytes_per_key(width, dtype) + 8

    def _packed(self, normed: jax.Array, levels: jax.Array) -> jax.Array:
        middle = (levels[1:] + levels[:-1]) / 2
        # One comparison a level, which fuse; between two levels the lower one is nearest.
        code = sum((normed > middle[i]).astype(jnp.uint8) for i in range(2**self.bits - 1))
        assert isinstance(code, jax.Array)
        if self.bits != 3:
            return pack(code, self.bits)
        return jnp.concatenate([pack(code & 3, 2), pack(code >> 2, 1)], axis=-1)

    def _levels(self, packed: jax.Array, levels: jax.Array) -> jax.Array:
        """The level of each code, float32[..., D]: a tree of selections, for a gather would not fuse."""
        if self.bits == 3:
            wide = packed.shape[-1] // 3 * 2
            code = unpack(packed[..., :wide], 2) | (unpack(packed[..., wide:], 1) << jnp.uint8(2))
        else:
            code = unpack(packed, self.bits)
        found = list(levels)
        for bit in range(self.bits):
            on = (code >> jnp.uint8(bit)) & 1 == 1
            found = [jnp.where(on, high, low) for low, high in zip(found[::2], found[1::2], strict=True)]
        return found[0]


def _index_dtype(width: int) -> np.dtype:
    return np.dtype(np.uint8 if width <= 256 else np.uint16)


def _normal(x: jax.Array, center: jax.Array, half: jax.Array) -> jax.Array:
    """[center - half, center + half] to [-1, 1]; a range of one point to 0."""
    return jnp.where(half == 0, 0.0, (x - center) / jnp.where(half == 0, 1.0, half))


def _largest(x: jax.Array, count: int) -> jax.Array:
    """Channels of the `count` largest |x| [..., D], the lower one of equals: int32[..., count]."""
    return jax.lax.top_k(jnp.abs(x), count)[1]


def _marked(index: jax.Array, width: int) -> jax.Array:
    """Channels int32[..., n] as bool[..., width]."""

    def mark(i: jax.Array | int, marked: jax.Array) -> jax.Array:
        return marked | (jax.lax.dynamic_index_in_dim(index, i, axis=-1) == jnp.arange(width))

    return _for_each(index.shape[-1], mark, jnp.zeros((*index.shape[:-1], width), bool))


def _for_each(count: int, body: Callable[[Any, jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`body` for 0 .. count - 1: few of them fuse with what is around, and no number of them makes temporaries."""
    return jax.lax.fori_loop(0, count, body, x, unroll=count <= 8) if count else x


def _range_of_rest(x: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least of the channels of x [..., D] that are not in index, and half their range, [...]; 0 if none is left."""
    inside = ~_marked(index, x.shape[-1])
    some = jnp.any(inside, axis=-1)
    least = jnp.where(some, jnp.min(jnp.where(inside, x, jnp.inf), axis=-1), 0)
    greatest = jnp.where(some, jnp.max(jnp.where(inside, x, -jnp.inf), axis=-1), 0)
    return least, (greatest - least) / 2


def _taken(x: jax.Array, index: jax.Array) -> Apart:
    """These channels of x, in float16."""
    exact = jnp.clip(jnp.take_along_axis(x, index, axis=-1), -FINITE, FINITE).astype(jnp.float16)
    return Apart(index.astype(_index_dtype(x.shape[-1])), exact)


def _returned(x: jax.Array, apart: Apart | None) -> jax.Array:
    """x [..., D] with the channels that were apart in their places."""
    assert apart is not None
    channels = jnp.arange(x.shape[-1], dtype=apart.channel.dtype)
    index, exact = apart

    def put(i: jax.Array | int, x: jax.Array) -> jax.Array:
        number, value = (jax.lax.dynamic_index_in_dim(part, i, axis=-1) for part in (index, exact))
        return jnp.where(number == channels, value.astype(x.dtype), x)

    return _for_each(index.shape[-1], put, x)
