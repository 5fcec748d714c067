"""Policies and codecs by name, for command lines: `full`, `sliding_window:1024`, `h2o:heavy=64,recent=64`."""

from __future__ import annotations

from kvjax.cache.codecs import Codec
from kvjax.cache.named import method_named
from kvjax.cache.policies import Policy


def parse_policy(text: str) -> Policy:
    """A policy by name, its arguments behind a colon, with or without their names.

    Raises:
      ConfigError: an unknown name, or arguments the policy does not take.
    """
    found: Policy = method_named("policy", text, "policy")
    return found


def parse_codec(text: str) -> Codec:
    """A codec by name, its arguments behind a colon, with or without their names.

    Raises:
      ConfigError: an unknown name, or arguments the codec does not take.
    """
    found: Codec = method_named("codec", text, "codec")
    return found
