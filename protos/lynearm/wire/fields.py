"""Walks and writes the outer fields of a protobuf message without copying what they hold.

The two hot methods carry blocks of up to 3 MiB. A generated message would copy each block twice on
its way through a process; a memoryview over the received bytes copies nothing. What comes out is
ordinary protobuf, readable by generated code in any language.
Encoding: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from lynearm.wire.errors import CorruptBlockError, InvalidInputError

VARINT = 0
FIXED64 = 1
LENGTH_DELIMITED = 2
FIXED32 = 5

FieldValue: TypeAlias = "int | memoryview"

_FIXED_SIZES = {FIXED64: 8, FIXED32: 4}
_MAX_VARINT_BYTES = 10


def read_fields(data: bytes | memoryview) -> Iterator[tuple[int, FieldValue]]:
    """The fields of a message in the order in which they lie there.

    Args:
        data: One serialised message.

    Yields:
        (field number, value): an int for varint and fixed fields, a view into `data` otherwise.

    Raises:
        InvalidInputError: if the bytes are not a protobuf message.
    """
    view = memoryview(data)
    position = 0
    while position < len(view):
        key, position = _read_varint(view, position)
        number, wire_type = key >> 3, key & 7
        if number == 0:
            raise _malformed("field number 0")
        if wire_type == VARINT:
            value, position = _read_varint(view, position)
            yield number, value
            continue
        if wire_type == LENGTH_DELIMITED:
            size, position = _read_varint(view, position)
        elif wire_type in _FIXED_SIZES:
            size = _FIXED_SIZES[wire_type]
        else:
            raise _malformed(f"wire type {wire_type}")
        if size > len(view) - position:
            raise _malformed(f"field {number} of {size} bytes where {len(view) - position} are left")
        piece = view[position : position + size]
        position += size
        yield number, piece if wire_type == LENGTH_DELIMITED else int.from_bytes(piece, "little")


def expect_bytes(number: int, value: FieldValue) -> memoryview:
    """The value of a field that must be length-delimited.

    Raises:
        InvalidInputError: if it is a number.
    """
    if isinstance(value, int):
        raise _malformed(f"field {number} is a number, expected bytes")
    return value


def expect_int(number: int, value: FieldValue) -> int:
    """The value of a field that must be a number.

    Raises:
        InvalidInputError: if it is bytes.
    """
    if not isinstance(value, int):
        raise _malformed(f"field {number} is bytes, expected a number")
    return value


def varint(value: int) -> bytes:
    """A non-negative integer below 2^64 as a varint."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def int_field(number: int, value: int) -> bytes:
    """A varint field; empty for 0, which is proto3's default."""
    return varint(number << 3 | VARINT) + varint(value) if value else b""


def bytes_prefix(number: int, size_bytes: int) -> bytes:
    """What stands before the `size_bytes` bytes of a length-delimited field."""
    return varint(number << 3 | LENGTH_DELIMITED) + varint(size_bytes)


def _read_varint(view: memoryview, position: int) -> tuple[int, int]:
    result = 0
    for index in range(_MAX_VARINT_BYTES):
        if position + index >= len(view):
            raise _malformed("the message ends inside a number")
        byte = view[position + index]
        result |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            if result >= 1 << 64:
                break
            return result, position + index + 1
    raise _malformed("a number has more than 64 bits")


def _malformed(what: str) -> InvalidInputError:
    return InvalidInputError(f"not a protobuf message of lynearm.v1: {what}")


class ByteReader:
    """Reads bytes and varints from the front of a payload, and refuses to read behind its end."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._position = 0

    def byte(self) -> int:
        """One byte."""
        return self.take(1)[0]

    def varint(self) -> int:
        """One varint, below 2^64."""
        try:
            value, self._position = _read_varint(self._data, self._position)
        except InvalidInputError as error:
            raise CorruptBlockError(f"the payload does not decode: {error}") from error
        return value

    def take(self, size: int) -> memoryview:
        """The next bytes, as a view."""
        if size > len(self._data) - self._position:
            raise CorruptBlockError(
                f"a part of the payload has {size} bytes, {len(self._data) - self._position} are left"
            )
        piece = self._data[self._position : self._position + size]
        self._position += size
        return piece

    def rest(self) -> memoryview:
        """Everything that is left."""
        return self.take(len(self._data) - self._position)
