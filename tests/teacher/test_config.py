"""Configs that are refused, with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from lynearm.teacher.config import TeachConfig
from lynearm.wire.errors import ConfigError


def make_config(**overrides: Any) -> TeachConfig:
    values: dict[str, Any] = {"model": "m", "prompts": "p", "stream": "s", "license": "Apache-2.0"}
    return TeachConfig(**(values | overrides))


def test_the_defaults_are_accepted() -> None:
    assert make_config().top_k == 64


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ({"stream": "No Caps"}, "stream name"),
        ({"producer_id": ""}, "producer id"),
        ({"prompts": ""}, "prompts"),
        ({"limit": -1}, "limit"),
        ({"model": ""}, "model"),
        ({"codec": "zip"}, "codec"),
        ({"top_k": 1025}, "top_k"),
        ({"temperature": -0.1}, "temperature"),
        ({"logprobs_temperature": 0.0}, "logprobs_temperature"),
        ({"logprobs_temperature": float("nan")}, "logprobs_temperature"),
        ({"logprobs_temperature": 101.0}, "logprobs_temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 257}, "min_tokens 257 is above max_tokens 256"),
        ({"min_tokens": -1}, "min_tokens -1 is negative"),
        ({"presence_penalty": 2.5}, r"presence_penalty 2\.5 is outside -2\.\.2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0 is not above 0"),
        ({"stop": ("",)}, "a stop string is empty"),
        ({"stop_token_ids": (-1,)}, r"stop tokens \(-1,\)"),
        ({"completions": 0}, "completions"),
        ({"block_bytes": 0}, "block_bytes"),
        ({"flush_seconds": 0.0}, "flush_seconds"),
        ({"completions": 100, "max_tokens": 2000}, "exceed a block"),
    ],
)
def test_a_value_out_of_range_is_named(override: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        make_config(**override)
