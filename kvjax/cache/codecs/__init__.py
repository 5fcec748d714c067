"""Codecs: how a key or value vector becomes bytes. One file each."""

from kvjax.cache.codecs.dense import Dense
from kvjax.cache.codecs.int8 import Int8
from kvjax.cache.codecs.protocol import Codec, Encoded

__all__ = ["Codec", "Dense", "Encoded", "Int8"]
