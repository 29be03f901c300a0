"""Fields of parsed JSON, checked: nothing in a file is trusted to have the type that it should."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TypeAlias, cast

from lynearm.wire.errors import InvalidInputError

JsonObject: TypeAlias = Mapping[str, object]


def parse_object(line: bytes) -> JsonObject:
    """The object of one line.

    Raises:
        InvalidInputError: if it is not UTF-8, not JSON or not an object.
    """
    try:
        parsed: object = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"not UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits
        cut = "" if line.endswith(b"\n") else "; the file ends here and may be cut off"
        raise InvalidInputError(f"not JSON: {error}{cut}", "expected one response a line") from error
    if not isinstance(parsed, dict):
        raise InvalidInputError(
            f"expected a JSON object, found {_kind(parsed)}", "expected one response a line"
        )
    return cast("JsonObject", parsed)


def object_of(value: object, name: str) -> JsonObject:
    """The value, an object."""
    if not isinstance(value, dict):
        raise InvalidInputError(f"{name} is {_kind(value)}, expected an object")
    return cast("JsonObject", value)


def list_of(value: object, name: str) -> list[object]:
    """The value, a list."""
    if not isinstance(value, list):
        raise InvalidInputError(f"{name} is {_kind(value)}, expected a list")
    return cast("list[object]", value)


def text_of(value: object, name: str) -> str:
    """The value, a text that UTF-8 can say: JSON may have half a character, as an escape."""
    if not isinstance(value, str):
        raise InvalidInputError(f"{name} is {_kind(value)}, expected a text")
    return value.encode("utf-8", "replace").decode()


def integer_of(value: object, name: str) -> int:
    """The value, a whole number."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidInputError(f"{name} is {_kind(value)}, expected a whole number")
    return value


def number_of(value: object, name: str) -> float:
    """The value, a number that is not NaN; Python's JSON reads NaN and -Infinity as numbers."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InvalidInputError(f"{name} is {_kind(value)}, expected a number")
    try:
        number = float(value)
    except OverflowError as error:
        raise InvalidInputError(f"{name} is beyond any number") from error
    if math.isnan(number):
        raise InvalidInputError(f"{name} is NaN")
    return number


def token_ids_of(value: object, name: str) -> list[int]:
    """The value, a list of token ids."""
    ids = [integer_of(one, f"{name}[{index}]") for index, one in enumerate(list_of(value, name))]
    if ids and not 0 <= min(ids) <= max(ids) < 1 << 31:
        raise InvalidInputError(f"{name} goes from {min(ids)} to {max(ids)}, expected 0 to 2^31 - 1")
    return ids


def _kind(value: object) -> str:
    if value is None:
        return "missing"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    shown = json.dumps(value)
    return shown if len(shown) <= 40 else f"{shown[:40]}…"
