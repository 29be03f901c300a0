"""The table of columns inside a payload: what each column is called, how its elements lie, and where.

A column has an id (what it holds) and an encoding (how). A reader meets an id that it does not know in
one of two ways: ids from `OPTIONAL_FROM` on may be skipped, lower ones mean that the block cannot be
understood. Later writers can so add either kind without a new format version.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from lynearm.wire.errors import CorruptBlockError, UnsupportedFormatError
from lynearm.wire.traces import Float32Array
from lynearm.wire.version1.integers import Int64Array, decode_numbers

OPTIONAL_FROM = 0x8000

_COUNT = struct.Struct("<I")
_ENTRY = struct.Struct("<HHII")
_Scalar = TypeVar("_Scalar", bound=np.generic)


class Column(IntEnum):
    """What a column holds; docs/format-v1.md gives the number of elements of each."""

    VOCAB_SIZE = 1
    PROMPT_IDS = 2
    PROMPT_LENGTHS = 3
    COMPLETION_LENGTHS = 4
    TOP_K_WIDTHS = 5
    FINISH_REASONS = 6
    SAMPLE_INDICES = 7
    SAMPLING_FLOATS = 8
    SAMPLING_INTEGERS = 9
    SEEDED = 10
    SEEDS = 11
    SPAN_COUNTS = 12
    SPAN_KINDS = 13
    SPAN_BOUNDS = 14
    TAG_COUNTS = 15
    TAG_STRINGS = 16
    PROMPT_TOKENS = 17
    KEPT = 18
    SAMPLED_RANKS = 19
    OUTSIDE_TOKENS = 20
    OUTSIDE_LOGPROBS = 21
    TAIL_MASS = 22
    DICTIONARY_SIZES = 23
    DICTIONARY_TOKENS = 24
    ENTRY_TOKENS = 25
    ENTRY_LOGPROBS = 26
    COMPLETION_TEXTS = OPTIONAL_FROM


class Encoding(IntEnum):
    """How the elements of a column lie in its bytes; everything is little-endian."""

    UINT8 = 1
    UINT16 = 2
    UINT32 = 3
    INT64 = 4
    FLOAT64 = 5
    FLOAT32_PLANES = 6
    """First bytes of all elements, then second bytes, and so on: like bytes lie together."""
    NUMBERS = 7
    """See `lynearm.wire.version1.integers`."""
    STRINGS = 8
    """UTF-8: the size of each string in bytes as UINT32, then all strings without separators."""


_DTYPES: dict[Encoding, str] = {
    Encoding.UINT8: "<u1",
    Encoding.UINT16: "<u2",
    Encoding.UINT32: "<u4",
    Encoding.INT64: "<i8",
    Encoding.FLOAT64: "<f8",
}


class ColumnReader:
    """Finds columns in the content of a payload and checks every size before it believes it.

    Raises:
        CorruptBlockError: if the table does not describe the content exactly, or (from any method) a
            column is missing, has another element count than asked for, or other bytes than its
            count needs.
        UnsupportedFormatError: if a column that may not be skipped, or an encoding, is unknown.
    """

    def __init__(self, content: bytes) -> None:
        view = memoryview(content)
        self._columns: dict[Column, tuple[int, int, memoryview]] = {}
        column_count = _COUNT.unpack_from(content)[0] if len(content) >= _COUNT.size else 0
        position = _COUNT.size + column_count * _ENTRY.size
        if position > len(content):
            raise CorruptBlockError(f"{len(content)} bytes hold no table of {column_count} columns")
        for index in range(column_count):
            number, encoding, count, size_bytes = _ENTRY.unpack_from(
                content, _COUNT.size + index * _ENTRY.size
            )
            if size_bytes > len(content) - position:
                raise CorruptBlockError(f"column {number} of {size_bytes} bytes leaves the payload")
            self._add(number, encoding, count, view[position : position + size_bytes])
            position += size_bytes
        if position != len(content):
            raise CorruptBlockError(f"{len(content) - position} bytes follow the last column")

    def has(self, column: Column) -> bool:
        """Whether the column is there."""
        return column in self._columns

    def count(self, column: Column) -> int:
        """How many elements the table says a column has, for columns that set their own length."""
        if column not in self._columns:
            raise CorruptBlockError(f"{column.name} is missing")
        return self._columns[column][1]

    def numbers(self, column: Column, count: int) -> Int64Array:
        """Non-negative integers below 2^32, shape [count]."""
        return decode_numbers(self._find(column, count, Encoding.NUMBERS), count)

    def lengths(self, column: Column, count: int, total: int) -> list[int]:
        """Non-negative integers that must add up to `total`."""
        values = self.numbers(column, count)
        if int(values.sum()) != total:
            raise CorruptBlockError(f"{column.name} add up to {values.sum()}, expected {total}")
        return [int(value) for value in values]

    def small_integers(self, column: Column, count: int) -> list[int]:
        """UINT8 elements."""
        values: list[int] = self._words(column, count, Encoding.UINT8, np.uint8).tolist()
        return values

    def unsigned(self, column: Column) -> int:
        """The only element of a UINT32 column."""
        return int(self._words(column, 1, Encoding.UINT32, np.uint32)[0])

    def integers(self, column: Column, count: int) -> list[int]:
        """INT64 elements."""
        values: list[int] = self._words(column, count, Encoding.INT64, np.int64).tolist()
        return values

    def doubles(self, column: Column, count: int) -> list[float]:
        """FLOAT64 elements."""
        values: list[float] = self._words(column, count, Encoding.FLOAT64, np.float64).tolist()
        return values

    def tokens(self, column: Column, count: int, vocab_size: int) -> npt.NDArray[np.int32]:
        """Token ids, each below `vocab_size`, shape [count]; UINT16 or UINT32 by `token_encoding`."""
        encoding = token_encoding(vocab_size)
        values = self._words(column, count, encoding, np.uint16 if encoding == Encoding.UINT16 else np.uint32)
        if count and values.max() >= vocab_size:
            raise CorruptBlockError(f"{column.name}: token id {values.max()} in {vocab_size} tokens")
        return values.astype(np.int32)

    def floats(self, column: Column, count: int) -> Float32Array:
        """float32 values, shape [count]."""
        data = self._find(column, count, Encoding.FLOAT32_PLANES, width=4)
        return np.frombuffer(data, np.uint8).reshape(4, count).T.copy().view("<f4").ravel().astype(np.float32)

    def strings(self, column: Column, count: int) -> list[str]:
        """Text."""
        data = self._find(column, count, Encoding.STRINGS)
        if count * 4 > len(data):
            raise CorruptBlockError(f"{column.name}: {count} strings in {len(data)} bytes")
        ends = np.frombuffer(data, "<u4", count).cumsum(dtype=np.int64) + count * 4
        if (int(ends[-1]) if count else 0) != len(data):
            raise CorruptBlockError(f"{column.name}: the sizes do not add up to {len(data)} bytes")
        starts = [count * 4, *ends.tolist()]
        try:
            return [str(data[starts[i] : starts[i + 1]], "utf-8") for i in range(count)]
        except UnicodeDecodeError as error:
            raise CorruptBlockError(f"{column.name}: not UTF-8: {error.reason}") from error

    def _add(self, number: int, encoding: int, count: int, data: memoryview) -> None:
        try:
            column = Column(number)
        except ValueError as error:
            if number >= OPTIONAL_FROM:
                return
            raise UnsupportedFormatError(
                f"column {number} is not known to this reader", "upgrade lynearm"
            ) from error
        if column in self._columns:
            raise CorruptBlockError(f"{column.name} is there twice")
        self._columns[column] = (encoding, count, data)

    def _find(self, column: Column, count: int, encoding: Encoding, width: int = 0) -> memoryview:
        if column not in self._columns:
            raise CorruptBlockError(f"{column.name} is missing")
        found_encoding, found_count, data = self._columns[column]
        if found_encoding != encoding:
            raise UnsupportedFormatError(
                f"{column.name} has encoding {found_encoding}, this reader knows {encoding.name}",
                "upgrade lynearm",
            )
        if found_count != count:
            raise CorruptBlockError(f"{column.name} has {found_count} elements, expected {count}")
        if width and found_count * width != len(data):
            raise CorruptBlockError(f"{column.name}: {found_count} elements in {len(data)} bytes")
        return data

    def _words(
        self, column: Column, count: int, encoding: Encoding, scalar: type[_Scalar]
    ) -> npt.NDArray[_Scalar]:
        dtype = np.dtype(_DTYPES[encoding])
        data = self._find(column, count, encoding, width=dtype.itemsize)
        return np.frombuffer(data, dtype).astype(scalar)


def token_encoding(vocab_size: int) -> Encoding:
    """Width of token ids outside the dictionary: UINT16 when they fit, else UINT32."""
    return Encoding.UINT16 if vocab_size <= 1 << 16 else Encoding.UINT32
