"""Policies and codecs by name."""

from __future__ import annotations

import pytest

from kvjax import codecs, policies
from kvjax.choices import parse_codec, parse_policy
from kvjax.errors import ConfigError


@pytest.mark.parametrize(
    "text, policy",
    [
        ("full", policies.Full()),
        ("SlidingWindow:8", policies.SlidingWindow(8)),
        ("sliding-window:window=8", policies.SlidingWindow(8)),
        ("streaming_llm:4,60", policies.StreamingLLM(4, 60)),
        ("h2o:heavy=3,recent=5", policies.H2O(3, 5)),
        ("tova:7", policies.TOVA(7)),
    ],
)
def test_a_policy_is_found_by_name_and_given_its_arguments(text: str, policy: policies.Policy) -> None:
    assert parse_policy(text) == policy


def test_a_codec_is_found_by_name_and_given_its_arguments() -> None:
    assert parse_codec("int8") == codecs.Int8()
    assert parse_codec("dense:bfloat16") == codecs.Dense("bfloat16")


@pytest.mark.parametrize("text", ["", "nothing", "policy", "read", "h2o:1", "h2o:heavy=1,light=2", "tova:-1", "full:3"])
def test_what_names_no_policy_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_policy(text)
