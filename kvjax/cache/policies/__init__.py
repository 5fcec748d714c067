"""Policies: which slot a new token takes, and what is kept of a prompt. One file each."""

from kvjax.cache.policies.dmc import DMC
from kvjax.cache.policies.fastgen import FastGen
from kvjax.cache.policies.full import Full
from kvjax.cache.policies.h2o import H2O
from kvjax.cache.policies.kvmerger import KVMerger
from kvjax.cache.policies.lm_infinite import LMInfinite
from kvjax.cache.policies.protocol import Policy, Read
from kvjax.cache.policies.pyramid_infer import PyramidInfer
from kvjax.cache.policies.pyramidkv import PyramidKV
from kvjax.cache.policies.scissorhands import Scissorhands
from kvjax.cache.policies.sliding_window import SlidingWindow
from kvjax.cache.policies.snapkv import SnapKV
from kvjax.cache.policies.streaming_llm import StreamingLLM
from kvjax.cache.policies.tova import TOVA

__all__ = [
    "DMC",
    "H2O",
    "TOVA",
    "FastGen",
    "Full",
    "KVMerger",
    "LMInfinite",
    "Policy",
    "PyramidInfer",
    "PyramidKV",
    "Read",
    "Scissorhands",
    "SlidingWindow",
    "SnapKV",
    "StreamingLLM",
]
