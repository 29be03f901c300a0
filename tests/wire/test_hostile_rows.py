"""Rows that lie, in blocks whose sizes and checksum hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from wire.building import build_rows
from wire.hostile import (
    OUTSIDE_7,
    VOCAB_SIZE,
    encode,
    no_entries,
    one_row,
    small_traces,
    tables_for,
)
from wire.mutation import Pieces, put_together

from lynearm.v1 import trace_pb2
from lynearm.wire import trace_rows
from lynearm.wire.alphabet import STEP_ESCAPE, STEP_SYMBOLS
from lynearm.wire.code_tables import (
    NUMBER_CONTEXTS,
    CodeTables,
    LevelRule,
    NumberContext,
    SymbolCounts,
    build_tables,
)
from lynearm.wire.codec import decode_block, decode_rows, encode_block
from lynearm.wire.errors import CorruptBlockError, UnsupportedFormatError
from lynearm.wire.prefix_codes import MAX_CODE_LENGTH
from lynearm.wire.row_layout import OWN_TABLES, TAIL_DRAWS
from lynearm.wire.specs import CodecMode
from lynearm.wire.write_kernels import write_numbers

LIES: dict[str, tuple[Callable[[], Pieces], str]] = {
    "sampled entry that is not there": (
        lambda: one_row(columns=[(NumberContext.SAMPLED, 3)], fixed=[]),
        "an entry that is not there",
    ),
    "sampled rank of 32 bits": (
        lambda: one_row(columns=[(NumberContext.SAMPLED, 2**32 - 1)], fixed=[]),
        "an entry that is not there",
    ),
    "outside token beyond the vocabulary": (
        lambda: one_row(columns=[(NumberContext.SAMPLED, 0), (NumberContext.OUTSIDE, VOCAB_SIZE)], fixed=[0]),
        "token rank 300 in a vocabulary of 300",
    ),
    "outside logprob missing": (
        lambda: one_row(columns=OUTSIDE_7, fixed=[], entries=b""),
        "too early",
    ),
    "numbers missing": (lambda: one_row(columns=[], fixed=[], entries=b""), "1 positions in 0 bytes"),
    "no vocabulary": (
        lambda: dataclasses.replace(encode(small_traces("exact"), "exact"), vocab_size=0),
        "vocabulary of 0",
    ),
    "vocabulary beyond any": (
        lambda: dataclasses.replace(encode(small_traces("exact"), "exact"), vocab_size=(1 << 20) + 1),
        "vocabulary of 1048577",
    ),
    "vocabulary below its tokens": (
        lambda: dataclasses.replace(encode(small_traces("exact"), "exact"), vocab_size=20),
        "vocabulary of 20|do not decode",
    ),
    "grid without steps": (
        lambda: dataclasses.replace(encode(small_traces("standard"), "standard"), scale=b"\0\0\0"),
        "grid scale 0",
    ),
    "no draws": (
        lambda: dataclasses.replace(encode(small_traces("sampled"), "sampled"), scale=b"\4\0"),
        "0 draws",
    ),
    "draws beyond any": (
        lambda: dataclasses.replace(encode(small_traces("sampled"), "sampled"), scale=b"\4\x81\x80\4"),
        "65537 draws",
    ),
    "fewer draws than levels": (
        lambda: dataclasses.replace(encode(small_traces("sampled"), "sampled"), scale=b"\4\1"),
        "do not decode",
    ),
    "no draws from each tail": (
        lambda: dataclasses.replace(encode(small_traces("exact", 2), "exact"), draws=0),
        "mode 'exact' with 0 draws from each tail",
    ),
    "draws from tails in a block of draws": (
        lambda: with_draws_from_tails(encode(small_traces("sampled"), "sampled")),
        "mode 'sampled' with 1 draws from each tail",
    ),
    "draw of a token beyond the vocabulary": (
        lambda: one_drawn_row([1 + VOCAB_SIZE]),
        "a draw of token rank 300 in a vocabulary of 300",
    ),
    "further draw beyond the vocabulary": (
        lambda: one_drawn_row([1, VOCAB_SIZE]),
        "a draw of token rank 300 in a vocabulary of 300",
    ),
    "draws of 32 bits": (
        lambda: one_drawn_row([2**32 - 1] * 16),
        f"a draw of token rank {16 * (2**32 - 1) - 1} in a vocabulary of 300",
    ),
    "draws that are not there": (lambda: spoil_draws([1 + 299], slice(-2)), "do not decode|too early"),
    "further draws that are not there": (lambda: spoil_draws([1, 299, 0], slice(-3)), "do not decode|early"),
    "bytes behind the draws": (lambda: spoil_draws([1, 0], slice(None), b"\0"), "bytes follow the numbers"),
    "counts in an exact block": (
        lambda: dataclasses.replace(encode(small_traces("exact"), "exact"), scale=b"\4\6"),
        "mode 'exact' has scale 4",
    ),
    "floats in a block on a grid": (
        lambda: dataclasses.replace(encode(small_traces("standard"), "standard"), scale=b"\1"),
        "mode 'standard' has scale 1",
    ),
}


def one_drawn_row(draws: list[int]) -> Pieces:
    """A block with one row without entries, and the numbers of what was drawn from its tail."""
    return no_entries(one_row(columns=OUTSIDE_7, fixed=[0xBF800000], tail=0, entries=b"", draws=draws))


def spoil_draws(draws: list[int], kept: slice, more: bytes = b"") -> Pieces:
    """The same with other bytes at its end."""
    pieces = one_drawn_row(draws)
    return dataclasses.replace(pieces, streams=(pieces.streams[0][kept] + more,))


def with_draws_from_tails(pieces: Pieces) -> Pieces:
    """The block, which says that it has a draw from each tail."""
    return dataclasses.replace(pieces, flags=pieces.flags | TAIL_DRAWS, draws=1)


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_refused_by_name(name: str) -> None:
    build, message = LIES[name]
    for decode in (decode_block, decode_rows):
        with pytest.raises(CorruptBlockError, match=message):
            decode(put_together(build()))


FLOATS = {"NaN": 0x7FC00000, "negative NaN": 0xFFC12345, "infinity": 0x7F800000, "above 0": 0x3F800000}


@pytest.mark.parametrize("name", FLOATS)
def test_sampled_logprobs_that_cannot_be_are_refused(name: str) -> None:
    block = put_together(no_entries(one_row(columns=OUTSIDE_7, fixed=[FLOATS[name]], tail=0, entries=b"")))
    for decode in (decode_block, decode_rows):
        with pytest.raises(CorruptBlockError, match="NaN or above"):
            decode(block)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("mode", ["exact", "sampled"])
def test_tail_masses_that_cannot_be_are_refused(mode: CodecMode, name: str) -> None:
    # Tails count from 1 − Σ p, which is 1 without entries, and from 0 in sampled blocks. Two is too much.
    bits = 0x40000000 if name == "above 0" else FLOATS[name]
    away = (bits - (0x3F800000 if mode == "exact" else 0) + 2**31) % 2**32 - 2**31
    zigzag = 2 * away if away >= 0 else -2 * away - 1
    pieces = no_entries(one_row(columns=OUTSIDE_7, fixed=[0xBF800000], tail=zigzag, entries=b""))
    if mode == "sampled":
        header = dataclasses.replace(pieces.header, codec_mode="sampled")
        pieces = dataclasses.replace(pieces, scale=b"\4\6", header=header)
    for decode in (decode_block, decode_rows):
        with pytest.raises(CorruptBlockError, match="tail masses"):
            decode(put_together(pieces))


def test_rows_of_our_own_decode() -> None:
    """What the tests above spoil is right but for the lie."""
    pieces = no_entries(one_row(columns=OUTSIDE_7, fixed=[0xBF800000], tail=0, entries=b""))
    (trace,) = decode_block(put_together(pieces))
    assert (trace.completion_token_ids.tolist(), trace.sampled_logprobs.tolist()) == ([7], [-1.0])
    assert trace.top_k.tail_mass.tolist() == [1.0]


def test_draws_of_our_own_decode() -> None:
    (trace,) = decode_block(put_together(one_drawn_row([1 + 7, 0, 292])))
    assert trace.top_k.tail_draws is not None
    assert trace.top_k.tail_draws.tolist() == [[7, 7, 299]]


@pytest.mark.parametrize("draw", [3, 4])
def test_a_draw_that_its_row_keeps_is_refused(monkeypatch: pytest.MonkeyPatch, draw: int) -> None:
    trace = build_rows([[-0.5, -1.5], [-0.5, -np.inf]], [[7, 8], [3, 0]])
    rows = dataclasses.replace(trace.top_k, tail_draws=np.array([[0, 1], [2, draw]], np.int32))
    trace = dataclasses.replace(trace, top_k=rows)
    with monkeypatch.context() as patched:
        # A writer that does not look.
        patched.setattr(trace_rows, "find_kept_draw", lambda *_: -1)
        block = encode_block([trace], codec="exact", vocab_size=VOCAB_SIZE)
    if draw == 4:
        assert decode_rows(block).positions.kept.tolist() == [2, 1]
        return
    for decode in (decode_block, decode_rows):
        with pytest.raises(CorruptBlockError, match="tail of position 1 is one that it keeps"):
            decode(block)


def test_more_draws_than_there_may_be_are_of_a_newer_format() -> None:
    pieces = dataclasses.replace(one_drawn_row([1]), draws=17)
    with pytest.raises(UnsupportedFormatError, match="17 draws from each tail"):
        decode_block(put_together(pieces))


def test_an_oversubscribed_code_is_refused() -> None:
    pieces = encode(small_traces("exact"), "exact")
    tables = CodeTables.from_bytes(pieces.tables)
    tables.step_lengths[0, :3] = 1
    with pytest.raises(CorruptBlockError, match="oversubscribed"):
        decode_block(put_together(dataclasses.replace(pieces, tables=tables.to_bytes())))


def test_an_oversubscribed_code_of_draws_is_refused() -> None:
    pieces = one_drawn_row([1])
    tables = CodeTables.from_bytes(pieces.tables)
    assert tables.draw_lengths is not None
    tables.draw_lengths[1, :3] = 1
    with pytest.raises(CorruptBlockError, match="oversubscribed"):
        decode_block(put_together(dataclasses.replace(pieces, tables=tables.to_bytes())))


@pytest.mark.parametrize("entries", [b"\xff" * 8, b"\0" * 8, bytes(range(8))])
def test_bits_that_no_code_of_an_incomplete_table_has_are_refused(entries: bytes) -> None:
    pieces = encode([build_rows([[-0.5, -1.5]], [[3, 4]])], "exact")
    tables = tables_for(*range(NUMBER_CONTEXTS), holes=True)
    tables.step_lengths[:] = 0
    spoilt = dataclasses.replace(
        pieces, scale=b"\1", tables=tables.to_bytes(), streams=(b"\xff" * 8 + entries,), flags=OWN_TABLES
    )
    with pytest.raises(CorruptBlockError, match="do not decode"):
        decode_block(put_together(spoilt))


@pytest.mark.parametrize("symbol", [88, 42, 53, 54, 65], ids=str)
def test_a_reference_to_a_token_that_is_in_no_list_is_refused(symbol: int) -> None:
    """A first entry that is 512 or more places back in a list of 300, or in a list that there is not."""
    pieces = encode([build_rows([[-0.5]], [[3]])], "exact")
    counts = SymbolCounts.zeros()
    counts.numbers[:] = 1
    counts.steps[:, symbol] = 1
    tables = build_tables(counts, merge=0, level_rule=LevelRule.none(), with_escapes=False)
    out = np.zeros(100, np.uint8)
    column = (np.array([0, 1], np.uint32), np.array([NumberContext.LEVEL, NumberContext.SAMPLED], np.uint8))
    bit = write_numbers(out, 0, *column, tables.number_codes)
    for size in range((bit + 7) // 8 + 2, 14):
        streams = (out[:size].tobytes(),)
        spoilt = dataclasses.replace(
            pieces, scale=b"\1", tables=tables.to_bytes(), streams=streams, flags=OWN_TABLES
        )
        with pytest.raises(CorruptBlockError, match="entries of the block's rows do not decode"):
            decode_rows(put_together(spoilt))


def test_escapes_to_symbols_that_do_not_exist_are_refused() -> None:
    pieces = encode([build_rows([[-0.5, -1.5]], [[3, 4]])], "exact")
    tables = tables_for(*range(NUMBER_CONTEXTS))
    tables.step_lengths[:] = 0
    tables.step_lengths[:, -1] = 1
    for symbol in (STEP_ESCAPE, STEP_ESCAPE + 1, 400, 511):
        entries = (symbol << 1).to_bytes(2, "little") + b"\0" * 6
        columns = [(NumberContext.SAMPLED, 1)]
        spoilt = one_row(columns=columns, fixed=[], entries=entries)
        spoilt = dataclasses.replace(spoilt, tables=tables.to_bytes(), header=pieces.header)
        with pytest.raises(CorruptBlockError, match="entries of the block's rows do not decode"):
            decode_rows(put_together(spoilt))


def test_rows_that_run_on_behind_their_end_are_refused() -> None:
    """Zeros, read as the longest entries that there are, ten kilobytes behind a stream of 128 bytes."""
    pieces = encode([build_rows([[-0.5]], [[3]])], "exact")
    message = trace_pb2.BlockMetadata.FromString(pieces.metadata)
    message.traces[0].top_k = 1024
    tables = tables_for(*range(NUMBER_CONTEXTS))
    # The only code of each table: the rarest token after a long step, and the escape of that step's number.
    tables.step_lengths[:] = 0
    tables.step_lengths[:, STEP_SYMBOLS - 1] = MAX_CODE_LENGTH
    tables.number_lengths[:8] = 0
    tables.number_lengths[:8, -1] = MAX_CODE_LENGTH
    for kept_bytes in (128, 129):
        spoilt = dataclasses.replace(
            one_row(columns=OUTSIDE_7, fixed=[0xBF800000], tail=0, entries=bytes(kept_bytes)),
            metadata=message.SerializeToString(),
            tables=tables.to_bytes(),
        )
        with pytest.raises(CorruptBlockError, match="entries of the block's rows do not decode"):
            decode_rows(put_together(spoilt))
