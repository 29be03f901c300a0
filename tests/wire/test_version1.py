"""Blocks of version 1 whose columns lie: what strangers may send for as long as they are read."""

from __future__ import annotations

import dataclasses
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import zstandard
from wire.comparing import assert_equal_exactly
from wire.mutation import rejoin

from lynearm.wire.blocks import MAX_BLOCK_ENTRIES, BlockHeader, split_block
from lynearm.wire.codec import decode_block
from lynearm.wire.errors import CorruptBlockError, UnsupportedFormatError
from lynearm.wire.specs import CodecMode
from lynearm.wire.version1.columns import OPTIONAL_FROM, Column, Encoding
from lynearm.wire.version1.integers import MAX_NUMBER, decode_numbers
from lynearm.wire.version1.metadata import MAX_BLOCK_ITEMS
from lynearm.wire.version1.quantise import MAX_LEVEL, from_levels

GOLDEN = Path(__file__).parent / "golden"
Columns = dict[int, tuple[int, int, bytes]]
"""Encoding, number of elements and bytes of each column."""


def block_of(mode: CodecMode) -> bytes:
    """Two traces: five rows of 4, 2, 3, 3 and 1 entries over a vocabulary of 1000, and no rows."""
    return (GOLDEN / f"version1-{mode}.block").read_bytes()


def unwrap(block: bytes) -> tuple[BlockHeader, Columns]:
    header, payload = split_block(block)
    content = zstandard.ZstdDecompressor().decompress(payload)
    (count,) = struct.unpack_from("<I", content)
    columns: Columns = {}
    position = 4 + 12 * count
    for index in range(count):
        number, encoding, elements, size = struct.unpack_from("<HHII", content, 4 + 12 * index)
        columns[number] = (encoding, elements, content[position : position + size])
        position += size
    return header, columns


def wrap(header: BlockHeader, columns: Columns | list[tuple[int, tuple[int, int, bytes]]]) -> bytes:
    """A block of these columns, with the sizes and the checksum that it needs."""
    pairs = list(columns.items()) if isinstance(columns, dict) else columns
    table = [
        struct.pack("<HHII", number, encoding, elements, len(data))
        for number, (encoding, elements, data) in pairs
    ]
    return wrap_content(
        header, b"".join([struct.pack("<I", len(pairs)), *table, *(data for _, (_, _, data) in pairs)])
    )


def wrap_content(header: BlockHeader, content: bytes) -> bytes:
    payload = zstandard.ZstdCompressor(level=1).compress(content)
    return rejoin(dataclasses.replace(header, uncompressed_size_bytes=len(content)), payload)


def numbers(*values: int) -> tuple[int, int, bytes]:
    return Encoding.NUMBERS, len(values), encode_numbers(values)


def encode_numbers(values: tuple[int, ...]) -> bytes:
    """As version 1 wrote them: a byte for exponent and three bits, then the open bits in planes."""
    opened = [max(value.bit_length() - 4, 0) for value in values]
    classes = [(value >> bits) + (bits << 3) for value, bits in zip(values, opened, strict=True)]
    planes = b""
    for bit in range(max(opened, default=0)):
        plane = [value >> bit & 1 for value, bits in zip(values, opened, strict=True) if bits > bit]
        planes += np.packbits(np.array(plane, np.uint8), bitorder="little").tobytes()
    return bytes(classes) + planes


LIES: dict[str, tuple[CodecMode, Columns]] = {
    "no vocabulary": ("exact", {Column.VOCAB_SIZE: (Encoding.UINT32, 1, bytes(4))}),
    "vocabulary below its ids": ("exact", {Column.VOCAB_SIZE: (Encoding.UINT32, 1, struct.pack("<I", 999))}),
    "vocabulary beyond any": (
        "exact",
        {Column.VOCAB_SIZE: (Encoding.UINT32, 1, struct.pack("<I", (1 << 20) + 1))},
    ),
    "width beyond any": ("exact", {Column.TOP_K_WIDTHS: numbers(1025, 0)}),
    "width below the rows": ("exact", {Column.TOP_K_WIDTHS: numbers(3, 0)}),
    "positions without bytes": ("exact", {Column.KEPT: (Encoding.NUMBERS, 5, b"")}),
    "rows kept beyond the width": ("standard", {Column.KEPT: numbers(5, 1, 3, 3, 1)}),
    "sampled beyond the row": ("standard", {Column.SAMPLED_RANKS: numbers(1, 3, 0, 1, 1)}),
    "outside tokens missing": ("exact", {Column.SAMPLED_RANKS: numbers(1, 0, 0, 1, 1)}),
    "entry behind the dictionary": ("exact", {Column.ENTRY_TOKENS: numbers(*[9] * 13)}),
    "entry far behind the dictionary": ("standard", {Column.ENTRY_TOKENS: numbers(MAX_NUMBER, *[1] * 12)}),
    "dictionary beyond the vocabulary": ("exact", {Column.DICTIONARY_TOKENS: numbers(*[998] * 9)}),
    "dictionary groups too large": ("exact", {Column.DICTIONARY_SIZES: numbers(1, 99)}),
    "dictionary group empty": ("exact", {Column.DICTIONARY_SIZES: numbers(9, 0)}),
    "dictionary larger than the vocabulary": (
        "exact",
        {Column.DICTIONARY_TOKENS: (Encoding.NUMBERS, 1 << 24, bytes(1 << 24))},
    ),
    "level too high": ("standard", {Column.ENTRY_LOGPROBS: numbers(*[MAX_LEVEL] * 13)}),
    "tail level too high": ("standard", {Column.TAIL_MASS: numbers(MAX_LEVEL + 2, 0, 0, 0, 0)}),
    "NaN": ("exact", {Column.ENTRY_LOGPROBS: (Encoding.FLOAT32_PLANES, 13, b"\xff" * 52)}),
    "finish reason 0": ("exact", {Column.FINISH_REASONS: (Encoding.UINT8, 2, b"\0\1")}),
    "seed flag 2": ("exact", {Column.SEEDED: (Encoding.UINT8, 2, b"\2\0")}),
    "span past the end": (
        "exact",
        {
            Column.SPAN_COUNTS: numbers(1, 0),
            Column.SPAN_KINDS: (Encoding.UINT8, 1, b"\1"),
            Column.SPAN_BOUNDS: numbers(1, 6),
        },
    ),
    "more spans than a block may hold": (
        "exact",
        {
            Column.SPAN_COUNTS: numbers(MAX_BLOCK_ITEMS + 1, 0),
            Column.SPAN_KINDS: (Encoding.UINT8, MAX_BLOCK_ITEMS + 1, b"\1" * (MAX_BLOCK_ITEMS + 1)),
        },
    ),
    "same tag twice": (
        "exact",
        {
            Column.TAG_COUNTS: numbers(2, 0),
            Column.TAG_STRINGS: (Encoding.STRINGS, 4, struct.pack("<4I", 1, 1, 1, 1) + b"abac"),
        },
    ),
    "text that is not UTF-8": (
        "exact",
        {Column.PROMPT_IDS: (Encoding.STRINGS, 2, struct.pack("<2I", 1, 0) + b"\xff")},
    ),
    "text of another size": (
        "exact",
        {Column.PROMPT_IDS: (Encoding.STRINGS, 2, struct.pack("<2I", 2, 0) + b"a")},
    ),
    "text without sizes": ("exact", {Column.PROMPT_IDS: (Encoding.STRINGS, 2, b"\2")}),
}


@pytest.mark.parametrize("name", LIES)
def test_a_column_that_lies_is_refused(name: str) -> None:
    mode, lies = LIES[name]
    header, columns = unwrap(block_of(mode))
    assert decode_block(wrap(header, columns))[0].prompt_id == "frage-1-ä"
    spoilt = wrap(header, {**columns, **lies})
    tracemalloc.start()
    try:
        with pytest.raises(CorruptBlockError):
            decode_block(spoilt)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("positions", [MAX_NUMBER, MAX_BLOCK_ENTRIES // 2])
def test_claimed_positions_without_bytes_take_no_memory(positions: int) -> None:
    header, columns = unwrap(block_of("exact"))
    claims: Columns = {
        Column.COMPLETION_LENGTHS: numbers(positions, 0),
        Column.TOP_K_WIDTHS: numbers(1, 0),
        Column.KEPT: (Encoding.NUMBERS, positions, bytes(2)),
    }
    claimed = wrap(dataclasses.replace(header, completion_token_count=positions), {**columns, **claims})
    tracemalloc.start()
    try:
        with pytest.raises(CorruptBlockError):
            decode_block(claimed)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_table_beyond_the_content_is_refused() -> None:
    header, _ = unwrap(block_of("exact"))
    with pytest.raises(CorruptBlockError, match="no table"):
        decode_block(wrap_content(header, b"\xff" * 40))


def test_unknown_columns_are_skipped_when_optional_and_refused_otherwise() -> None:
    header, columns = unwrap(block_of("exact"))
    unknown = (1, 4, b"abcd")
    skipped = decode_block(wrap(header, {**columns, OPTIONAL_FROM + 999: unknown}))
    for actual, expected in zip(skipped, decode_block(block_of("exact")), strict=True):
        assert_equal_exactly(actual, expected)
    with pytest.raises(UnsupportedFormatError, match="upgrade"):
        decode_block(wrap(header, {**columns, 999: unknown}))


def test_a_column_that_is_there_twice_is_refused() -> None:
    header, columns = unwrap(block_of("exact"))
    first = next(iter(columns.items()))
    with pytest.raises(CorruptBlockError, match="twice"):
        decode_block(wrap(header, [first, *columns.items()]))


def test_an_unknown_encoding_is_refused() -> None:
    header, columns = unwrap(block_of("exact"))
    with pytest.raises(UnsupportedFormatError, match="KEPT has encoding 77"):
        decode_block(wrap(header, {**columns, Column.KEPT: (77, 8, bytes(8))}))


def test_numbers_of_every_size_are_read() -> None:
    powers = [1 << bits for bits in range(32)]
    values = (*range(4096), *powers, *(power - 1 for power in powers), MAX_NUMBER)
    data = encode_numbers(values)
    np.testing.assert_array_equal(decode_numbers(memoryview(data), len(values)), values)
    for count, spoilt in ((len(values), data + b"\0"), (len(values), data[:-1]), (1, b"\xf0"), (2, b"\1")):
        with pytest.raises(CorruptBlockError):
            decode_numbers(memoryview(spoilt), count)


def test_levels_stand_for_the_logprobs_that_they_always_did() -> None:
    """Levels are p = (1 − 0.007 · level)² down to level 124, and from there on steps of 0.11 nats."""
    levels = np.arange(MAX_LEVEL + 1)
    likely = 2 * np.log(1 - 0.007 * levels[:124])
    np.testing.assert_allclose(from_levels(levels[:124]), likely, rtol=1e-6)
    np.testing.assert_allclose(np.diff(from_levels(levels[125:2000]).astype(np.float64)), -0.11, atol=1e-4)
