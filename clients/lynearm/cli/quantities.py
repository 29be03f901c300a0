"""Durations and sizes as people write them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lynearm.wire.errors import ConfigError

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def parse_seconds(text: str) -> int:
    """A duration, 90s, 15m, 12h, 7d or 2w, in seconds; a number alone is seconds.

    Raises:
        ConfigError: if it is none.
    """
    return _parse(text, _SECONDS, default="s", example="12h or 7d")


def parse_bytes(text: str) -> int:
    """A size, 500MB, 1.5GB or 2TB, in bytes; a number alone is bytes.

    Raises:
        ConfigError: if it is none.
    """
    return _parse(text, _BYTES, default="b", example="500MB or 2TB")


def _parse(text: str, units: Mapping[str, int], *, default: str, example: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-z]*)", text.strip().lower())
    unit = units.get(match[2] or default) if match else None
    if match is None or unit is None:
        raise ConfigError(f"{text!r} is not understood, expected for example {example}")
    return round(float(match[1]) * unit)
