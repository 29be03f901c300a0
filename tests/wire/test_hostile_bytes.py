"""Blocks whose checksum holds and whose content lies: refused, soon, and without taking memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from random import Random

import numpy as np
import pytest
import zstandard
from wire.building import build_trace
from wire.hostile import (
    HERE,
    KINDS,
    MODES,
    VOCAB_SIZE,
    at_most,
    codec_of,
    encode,
    small_traces,
)
from wire.mutation import put_together, rejoin, spoil_block, spoil_bytes, write_rows_part

from lynearm.wire.blocks import split_block
from lynearm.wire.codec import decode_block, decode_rows
from lynearm.wire.dictionaries import Dictionary, DictionaryReader
from lynearm.wire.dictionary_training import train_dictionary
from lynearm.wire.errors import CodecError, CorruptBlockError, LynearmError, UnsupportedFormatError
from lynearm.wire.row_layout import (
    FOUR_LANES,
    KEPT_VARIES,
    ORDER_OF_DICTIONARY,
    OWN_TABLES,
    SAMPLED_APART,
    TAIL_DRAWS,
)
from lynearm.wire.specs import CodecMode


@KINDS
@pytest.mark.parametrize("with_dictionary", [False, True])
def test_a_spoilt_block_is_refused_or_still_traces(
    mode: CodecMode, tail_draws: int, with_dictionary: bool
) -> None:
    traces = small_traces(mode, tail_draws)
    dictionary = train_dictionary([traces], codec=codec_of(mode, tail_draws), vocab_size=VOCAB_SIZE)
    reader = DictionaryReader(lambda _: dictionary.encoded)
    pieces = encode(traces, mode, dictionary if with_dictionary else None)
    others = [pieces, encode(traces, mode, None if with_dictionary else dictionary)]
    others.append(encode([build_trace(3, positions=66, k=1, vocab_size=VOCAB_SIZE)], "exact"))
    rng = Random(7)
    refused = 0
    for _ in range(1500):
        block = spoil_block(pieces, others, rng)
        try:
            decoded = decode_block(block, dictionaries=reader)
        except LynearmError:
            refused += 1
            continue
        assert len(decoded) == split_block(block)[0].trace_count
        for trace in decoded:
            assert trace.top_k.token_ids.min(initial=0) >= 0
            assert trace.top_k.token_ids.max(initial=0) < 1 << 20
            if trace.top_k.tail_draws is not None:
                assert trace.top_k.tail_draws.min(initial=0) >= -1
                assert trace.top_k.tail_draws.max(initial=0) < 1 << 20
    assert 700 < refused < 1500


@KINDS
def test_every_flipped_bit_of_the_rows_is_refused_or_still_traces(mode: CodecMode, tail_draws: int) -> None:
    pieces = encode(small_traces(mode, tail_draws), mode)
    rows = write_rows_part(pieces)
    for bit in range(len(rows) * 8):
        changed = bytearray(rows)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            decode_rows(put_together(pieces, bytes(changed)))
        except (CorruptBlockError, UnsupportedFormatError):
            continue


@KINDS
def test_every_truncation_is_refused(mode: CodecMode, tail_draws: int) -> None:
    pieces = encode(small_traces(mode, tail_draws), mode)
    rows = write_rows_part(pieces)
    for size in range(len(rows)):
        with pytest.raises(CorruptBlockError):
            decode_block(put_together(pieces, rows[:size]))
    with pytest.raises(CorruptBlockError):
        decode_block(put_together(pieces, rows + b"\0"))


@MODES
@pytest.mark.parametrize("field", ["trace_count", "prompt_token_count", "completion_token_count"])
@pytest.mark.parametrize("change", [-1, 1, 1 << 15])
def test_a_header_that_counts_wrong_is_refused(mode: CodecMode, field: str, change: int) -> None:
    pieces = encode(small_traces(mode), mode)
    header = dataclasses.replace(pieces.header, **{field: getattr(pieces.header, field) + change})
    with pytest.raises(CorruptBlockError):
        decode_block(put_together(dataclasses.replace(pieces, header=header)))


def test_lanes_that_changed_places_or_sizes_are_refused_or_other_rows() -> None:
    pieces = encode([build_trace(3, positions=66, k=3, vocab_size=VOCAB_SIZE)], "exact")
    assert len(pieces.streams) == 5
    numbers, *lanes = pieces.streams
    right = decode_rows(put_together(pieces)).positions
    for order in ((1, 0, 2, 3), (3, 2, 1, 0), (0, 0, 2, 3)):
        swapped = dataclasses.replace(pieces, streams=(numbers, *(lanes[i] for i in order)))
        try:
            rows = decode_rows(put_together(swapped)).positions
        except CorruptBlockError:
            continue
        assert not np.array_equal(rows.token_ids, right.token_ids)
    joined = dataclasses.replace(pieces, flags=pieces.flags ^ FOUR_LANES, streams=(b"".join(pieces.streams),))
    moved = dataclasses.replace(pieces, streams=(numbers, lanes[0] + lanes[1], b"", *lanes[2:]))
    shifted = dataclasses.replace(pieces, streams=(numbers + lanes[0], *lanes[1:], b""))
    for wrong in (joined, moved, shifted):
        with pytest.raises(CorruptBlockError):
            decode_rows(put_together(wrong))


@pytest.mark.parametrize(
    "flag", [OWN_TABLES, KEPT_VARIES, SAMPLED_APART, FOUR_LANES, ORDER_OF_DICTIONARY, TAIL_DRAWS]
)
@KINDS
def test_every_wrong_flag_is_refused(mode: CodecMode, tail_draws: int, flag: int) -> None:
    pieces = encode(small_traces(mode, tail_draws), mode)
    rows = bytearray(write_rows_part(pieces))
    rows[0] ^= flag
    # What is no number of draws may be one in a later format.
    with pytest.raises((CorruptBlockError, UnsupportedFormatError)):
        decode_block(put_together(pieces, bytes(rows)))


@pytest.mark.parametrize("mode", ["exact", "standard"])
def test_a_spoilt_block_of_version_1_is_refused_or_still_traces(mode: str) -> None:
    header, payload = split_block((HERE / "golden" / f"version1-{mode}.block").read_bytes())
    content = zstandard.ZstdDecompressor().decompress(payload)
    rng = Random(7)
    refused = 0
    for _ in range(1500):
        changed = spoil_bytes(content, rng)
        packed = zstandard.ZstdCompressor(level=1).compress(changed)
        try:
            decode_block(
                rejoin(dataclasses.replace(header, uncompressed_size_bytes=max(len(changed), 1)), packed)
            )
        except LynearmError:
            refused += 1
    assert 700 < refused < 1500


def failing_inputs() -> list[Path]:
    return sorted(path for path in (HERE / "failing").glob("*.*") if path.suffix in (".block", ".dictionary"))


@pytest.mark.parametrize("path", failing_inputs(), ids=lambda path: path.name)
def test_what_failed_once_is_refused_or_decodes(path: Path) -> None:
    """Inputs of fuzzing and of review that were let in or took gigabytes; `.decodes` ones were refused."""
    data = path.read_bytes()
    dictionaries = [encoded.read_bytes() for encoded in (HERE / "failing").glob("*.dictionary")]
    found = {Dictionary.decode(encoded).digest: encoded for encoded in dictionaries if encoded}

    def find(digest: bytes) -> bytes:
        if digest not in found:
            raise CodecError(f"no dictionary {digest.hex()}")
        return found[digest]

    for decode in (decode_block, decode_rows) if path.suffix == ".block" else ():
        with at_most(256):
            try:
                decode(data, dictionaries=DictionaryReader(find))
            except LynearmError:
                assert ".decodes." not in path.name
