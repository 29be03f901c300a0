"""Configs that are refused, with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lynearm.teacher.config import TeachConfig
from lynearm.wire.errors import ConfigError


def make_config(**overrides: Any) -> TeachConfig:
    values: dict[str, Any] = {"model": "m", "prompts": Path("p"), "stream": "s", "license": "Apache-2.0"}
    return TeachConfig(**(values | overrides))


def test_the_defaults_are_accepted() -> None:
    assert make_config().top_k == 64


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ({"stream": "No Caps"}, "stream name"),
        ({"producer_id": ""}, "producer id"),
        ({"license": ""}, "license"),
        ({"model": ""}, "model"),
        ({"codec": "zip"}, "codec"),
        ({"top_k": 1025}, "top_k"),
        ({"temperature": -0.1}, "temperature"),
        ({"logprobs_temperature": 0.0}, "logprobs_temperature"),
        ({"logprobs_temperature": float("nan")}, "logprobs_temperature"),
        ({"logprobs_temperature": 101.0}, "logprobs_temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"completions": 0}, "completions"),
        ({"block_bytes": 0}, "block_bytes"),
        ({"flush_seconds": 0.0}, "flush_seconds"),
        ({"completions": 100, "max_tokens": 2000}, "exceed a block"),
    ],
)
def test_a_value_out_of_range_is_named(override: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        make_config(**override)
