"""Policies: which slot a new token takes, and what is kept of a prompt. One file each."""

from kvjax.cache.policies.full import Full
from kvjax.cache.policies.h2o import H2O
from kvjax.cache.policies.protocol import Policy, Read
from kvjax.cache.policies.sliding_window import SlidingWindow
from kvjax.cache.policies.streaming_llm import StreamingLLM
from kvjax.cache.policies.tova import TOVA

__all__ = ["H2O", "TOVA", "Full", "Policy", "Read", "SlidingWindow", "StreamingLLM"]
