"""Codecs: how a key or value vector becomes bytes. One file each."""

from kvjax.cache.codecs.calibration import Calibration
from kvjax.cache.codecs.dense import Dense
from kvjax.cache.codecs.fp8 import FP8
from kvjax.cache.codecs.int4 import Int4
from kvjax.cache.codecs.int8 import Int8
from kvjax.cache.codecs.kivi import KIVI
from kvjax.cache.codecs.kvquant import KVQuant
from kvjax.cache.codecs.protocol import Codec, Encoded

__all__ = ["FP8", "KIVI", "Calibration", "Codec", "Dense", "Encoded", "Int4", "Int8", "KVQuant"]
