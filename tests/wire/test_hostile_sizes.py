"""Counts and sizes without bytes behind them, and metadata that grows: none takes memory or time."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard
from wire.building import build_rows, build_trace
from wire.hostile import (
    VOCAB_SIZE,
    at_most,
    compressed,
    encode,
    no_entries,
    small_traces,
    tables_for,
)
from wire.mutation import (
    put_together,
    rejoin,
    write_rows_part,
)

from lynearm.v1 import trace_pb2
from lynearm.wire.blocks import MAX_BLOCK_ENTRIES
from lynearm.wire.codec import decode_block, decode_rows, encode_block
from lynearm.wire.errors import CodecError, CorruptBlockError
from lynearm.wire.fields import varint
from lynearm.wire.metadata import MAX_BLOCK_ITEMS
from lynearm.wire.row_layout import OWN_TABLES, TAIL_DRAWS


@pytest.mark.parametrize(
    ("positions", "width"),
    [
        (2**32 - 1, 1),
        (2**32 - 1, 0),
        (MAX_BLOCK_ENTRIES, 1),
        (MAX_BLOCK_ENTRIES, 0),
        (MAX_BLOCK_ENTRIES // 1024, 1024),
    ],
)
def test_claimed_positions_without_bytes_take_no_memory(positions: int, width: int) -> None:
    pieces = encode([build_rows([[-0.5]], [[3]])], "exact")
    message = trace_pb2.BlockMetadata.FromString(pieces.metadata)
    message.traces[0].completion_length = positions
    message.traces[0].top_k = width
    header = dataclasses.replace(pieces.header, completion_token_count=positions)
    claimed = dataclasses.replace(pieces, metadata=message.SerializeToString(), header=header)
    for decode in (decode_block, decode_rows):
        with at_most(1), pytest.raises(CorruptBlockError):
            decode(put_together(claimed))


def test_claimed_entries_without_bytes_take_no_memory() -> None:
    """Positions have their bits, and the entries that each claims do not."""
    pieces = encode([build_rows([[-0.5]], [[3]])], "exact")
    message = trace_pb2.BlockMetadata.FromString(pieces.metadata)
    message.traces[0].completion_length = 8000
    message.traces[0].top_k = 1024
    header = dataclasses.replace(pieces.header, completion_token_count=8000)
    claimed = dataclasses.replace(
        pieces,
        metadata=message.SerializeToString(),
        header=header,
        streams=(bytes(1000),),
    )
    with at_most(1), pytest.raises(CorruptBlockError, match="8192000 entries in 1000 bytes"):
        decode_rows(put_together(claimed))


@pytest.mark.parametrize("draws", [1, 16])
def test_claimed_draws_without_bytes_take_no_memory(draws: int) -> None:
    """Positions have their bits, and what was drawn from the tail of each has none."""
    pieces = encode([build_rows([[-np.inf]], [[0]])], "exact")
    message = trace_pb2.BlockMetadata.FromString(pieces.metadata)
    positions = MAX_BLOCK_ENTRIES // 16
    message.traces[0].completion_length = positions
    header = dataclasses.replace(pieces.header, completion_token_count=positions)
    tables = tables_for(draws=True)
    tables.number_lengths[:, 0] = 1
    for size in (positions // 8, positions // 2):
        claimed = dataclasses.replace(
            pieces,
            metadata=message.SerializeToString(),
            header=header,
            flags=OWN_TABLES | TAIL_DRAWS,
            draws=draws,
            tables=tables.to_bytes(),
            streams=(bytes(size),),
        )
        with at_most(40), pytest.raises(CorruptBlockError):
            decode_rows(put_together(no_entries(claimed)))


def test_more_draws_than_a_block_may_have_are_refused() -> None:
    """Whoever wrote them, and whoever is asked to write them."""
    positions = MAX_BLOCK_ENTRIES // 16 + 1
    trace = build_rows(np.full((positions, 1), -0.5), np.zeros((positions, 1), np.int32))
    drawn = np.full((positions, 16), -1, np.int32)
    trace = dataclasses.replace(trace, top_k=dataclasses.replace(trace.top_k, tail_draws=drawn))
    with pytest.raises(CodecError, match=f"{positions} positions of 16 draws"):
        encode_block([trace], codec="exact", vocab_size=VOCAB_SIZE)
    fewer = dataclasses.replace(trace.top_k, tail_draws=drawn[:, :15])
    pieces = encode([dataclasses.replace(trace, top_k=fewer)], "exact")
    with pytest.raises(CorruptBlockError, match=f"{positions} positions of 16 draws"):
        decode_rows(put_together(dataclasses.replace(pieces, draws=16)))


def test_the_widest_rows_of_the_most_positions_take_what_a_block_may() -> None:
    """Rows of no entries in a wide trace cost a bit each, and their arrays 2^23 entries."""
    positions = MAX_BLOCK_ENTRIES // 1024
    trace = build_rows(np.full((positions, 1024), -np.inf), np.zeros((positions, 1024), np.int32))
    block = encode_block([trace], codec="exact", vocab_size=VOCAB_SIZE)
    assert len(block) < 1 << 17
    with at_most(256):
        assert decode_rows(block).positions.kept.max() == 0


@pytest.mark.parametrize("size", [2**64 - 1, 2**63, 2**32, 1 << 20])
@pytest.mark.parametrize("place", ["metadata", "tables", "numbers", "lane"])
def test_sizes_beyond_the_payload_are_refused(size: int, place: str) -> None:
    pieces = encode([build_trace(3, positions=66, k=2, vocab_size=VOCAB_SIZE)], "exact")
    head = bytes((pieces.flags,)) + varint(VOCAB_SIZE) + pieces.scale
    sizes = [varint(len(stream)) for stream in pieces.streams[:-1]]
    tables = varint(len(pieces.tables)) + pieces.tables
    metadata = varint(len(pieces.metadata))
    if place == "metadata":
        metadata = varint(size)
    elif place == "tables":
        tables = varint(size) + pieces.tables
    else:
        sizes[0 if place == "numbers" else 2] = varint(size)
    rows = head + tables + b"".join(sizes) + b"".join(pieces.streams)
    with at_most(1), pytest.raises(CorruptBlockError):
        decode_block(rejoin(pieces.header, metadata + pieces.metadata + rows))


def test_a_frame_that_hides_or_lies_about_its_size_is_refused() -> None:
    pieces = encode(small_traces("exact"), "exact")
    rows = write_rows_part(pieces)
    content = pieces.metadata + bytes(100)
    stream = zstandard.ZstdCompressor().compressobj()
    frames = {
        "hides its size": stream.compress(content) + stream.flush(),
        "bomb": zstandard.ZstdCompressor(level=1).compress(bytes(256 << 20)),
        "two frames": zstandard.ZstdCompressor().compress(content) * 2,
        "bytes behind": zstandard.ZstdCompressor().compress(content) + b"\0",
        "cut": zstandard.ZstdCompressor().compress(content)[:-1],
        "other size": zstandard.ZstdCompressor().compress(content[:-1]),
        "no frame": b"\x28\xb5\x2f\xfd",
        "skippable": b"\x50\x2a\x4d\x18" + struct.pack("<I", 3) + b"abc",
        "empty": b"",
    }
    assert len(frames["bomb"]) < 1 << 16
    for frame in frames.values():
        with at_most(2), pytest.raises(CorruptBlockError):
            decode_block(compressed(pieces.header, frame, len(content), rows))


def test_a_frame_that_says_less_than_it_holds_is_refused() -> None:
    """`max_output_size` alone would not help: the frame's own size is believed first."""
    pieces = encode(small_traces("exact"), "exact")
    frame = bytearray(zstandard.ZstdCompressor(level=1).compress(bytes(1 << 20)))
    # Single segment, content size in four bytes from byte 5 on.
    assert struct.unpack_from("<I", frame, 5) == (1 << 20,) or struct.unpack_from("<I", frame, 6) == (
        1 << 20,
    )
    place = 5 if struct.unpack_from("<I", frame, 5) == (1 << 20,) else 6
    struct.pack_into("<I", frame, place, 1000)
    with at_most(2), pytest.raises(CorruptBlockError):
        decode_block(compressed(pieces.header, bytes(frame), 1000, write_rows_part(pieces)))


def message_field(number: int, body: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(body)) + body


MIBS = 16 << 20
METADATA_BOMBS: dict[str, Callable[[], bytes]] = {
    "traces": lambda: message_field(1, b"") * (MIBS // 2),
    "tags": lambda: message_field(1, message_field(10, b"") * (MIBS // 2)),
    "spans": lambda: message_field(1, message_field(9, b"") * (MIBS // 2)),
    "sampling, again and again": lambda: message_field(1, message_field(8, b"") * (MIBS // 2)),
    "stop strings": lambda: message_field(1, message_field(8, message_field(11, b"") * (MIBS // 2))),
    "stop tokens one by one": lambda: message_field(1, message_field(8, b"\x60\1" * (MIBS // 2))),
    "prompt tokens one by one": lambda: message_field(1, b"\x10\1" * (MIBS // 2)),
}


@pytest.mark.parametrize("name", METADATA_BOMBS)
def test_bombs_of_empty_messages_take_no_memory(name: str) -> None:
    """Two bytes become an object of a hundred; a thousand of them squeeze into one byte."""
    pieces = encode(small_traces("exact"), "exact")
    metadata = METADATA_BOMBS[name]()
    frame = zstandard.ZstdCompressor().compress(metadata)
    assert len(frame) < 4096
    header = dataclasses.replace(pieces.header, trace_count=1)
    before = resident_mebibytes()
    with at_most(18), pytest.raises(CorruptBlockError, match=r"header says 1|beyond any block"):
        decode_block(compressed(header, frame, len(metadata), write_rows_part(pieces)))
    # Protobuf's memory is not traced.
    assert resident_mebibytes() - before < 64


def resident_mebibytes() -> float:
    """Most that the process has held at once."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def test_more_spans_and_tags_than_a_block_may_hold_are_refused() -> None:
    pieces = encode(small_traces("exact"), "exact")
    header = dataclasses.replace(pieces.header, trace_count=1)
    for number, what in ((9, "spans"), (10, "tags")):
        metadata = message_field(1, message_field(number, b"") * (MAX_BLOCK_ITEMS + 1))
        frame = zstandard.ZstdCompressor().compress(metadata)
        with pytest.raises(CorruptBlockError, match=f"1048577 {what}"):
            decode_block(compressed(header, frame, len(metadata), write_rows_part(pieces)))


def test_more_prompt_tokens_than_a_block_may_hold_are_refused() -> None:
    pieces = encode([build_rows([[-0.5]], [[3]])], "exact")
    count = MAX_BLOCK_ENTRIES + 1
    message = trace_pb2.BlockMetadata.FromString(pieces.metadata).traces[0].SerializeToString()
    metadata = message_field(1, message + message_field(2, b"\1" * count))
    header = dataclasses.replace(pieces.header, prompt_token_count=count)
    frame = zstandard.ZstdCompressor().compress(metadata)
    with pytest.raises(CorruptBlockError, match="prompt tokens are beyond"):
        decode_block(compressed(header, frame, len(metadata), write_rows_part(pieces)))


def set_field(name: str, value: object) -> Callable[[trace_pb2.TraceMetadata], object]:
    return lambda trace: setattr(trace, name, value)


METADATA_LIES: dict[str, Callable[[trace_pb2.TraceMetadata], object]] = {
    "finish reason 9": set_field("finish_reason", 9),
    "rows wider than any": set_field("top_k", 1026),
    "completion longer than the header says": set_field("completion_length", 9),
    "completion shorter than the header says": set_field("completion_length", 1),
    "rows narrower than kept": set_field("top_k", 1),
    "prompt rows without a first token": set_field("prompt_rows", 3),
    "prompt token beyond the vocabulary": lambda trace: trace.prompt_token_ids.__setitem__(0, VOCAB_SIZE),
    "prompt token of 32 bits": lambda trace: trace.prompt_token_ids.__setitem__(0, 2**32 - 1),
    "span of kind 0": lambda trace: setattr(trace.spans[0], "kind", 0),
    "span past the end": lambda trace: setattr(trace.spans[0], "length", 4),
    "span of no tokens": lambda trace: setattr(trace.spans[0], "length", 0),
    "span of 2^32 tokens": lambda trace: setattr(trace.spans[0], "length", 2**32 - 1),
    "same tag twice": lambda trace: trace.tags.add(key="a", value="c"),
}


@pytest.mark.parametrize("name", METADATA_LIES)
def test_metadata_that_cannot_be_is_refused(name: str) -> None:
    pieces = encode(small_traces("exact"), "exact")
    message = trace_pb2.BlockMetadata.FromString(pieces.metadata)
    assert decode_block(put_together(pieces))[0].tags == {"a": "b"}
    METADATA_LIES[name](message.traces[0])
    with pytest.raises(CorruptBlockError):
        decode_block(put_together(dataclasses.replace(pieces, metadata=message.SerializeToString())))


def test_text_that_is_not_utf_8_is_refused() -> None:
    pieces = encode(small_traces("exact"), "exact")
    assert b"text" in pieces.metadata
    spoilt = dataclasses.replace(pieces, metadata=pieces.metadata.replace(b"text", b"te\xfft"))
    with pytest.raises(CorruptBlockError, match="BlockMetadata"):
        decode_block(put_together(spoilt))
