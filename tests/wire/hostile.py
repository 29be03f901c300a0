"""Blocks to spoil, and rows whose numbers a test chooses."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from wire.building import build_rows, build_sampled_trace, build_trace, draw_tails
from wire.mutation import Pieces, rejoin, take_apart

from lynearm.v1 import trace_pb2
from lynearm.wire.blocks import BlockHeader
from lynearm.wire.code_tables import (
    NUMBER_CONTEXTS,
    CodeTables,
    DrawContext,
    LevelRule,
    NumberContext,
    SymbolCounts,
    build_tables,
)
from lynearm.wire.codec import encode_block
from lynearm.wire.dictionaries import Dictionary
from lynearm.wire.fields import varint
from lynearm.wire.row_layout import OWN_TABLES, TAIL_DRAWS
from lynearm.wire.specs import CODEC_MODES, CodecMode, CodecSpec
from lynearm.wire.traces import TokenSpan, Trace
from lynearm.wire.write_kernels import write_fixed, write_numbers

HERE = Path(__file__).parent
MODES = pytest.mark.parametrize("mode", CODEC_MODES)
KINDS = pytest.mark.parametrize(
    ("mode", "tail_draws"), [*((mode, 0) for mode in CODEC_MODES), ("exact", 1), ("standard", 3)]
)
VOCAB_SIZE = 300
DRAWS = 6


def small_traces(mode: CodecMode, tail_draws: int = 0) -> list[Trace]:
    if mode == "sampled":
        return [build_sampled_trace(seed, positions=4, draws=DRAWS, vocab_size=VOCAB_SIZE) for seed in (0, 1)]
    said = {"spans": (TokenSpan("answer", 1, 3),), "tags": {"a": "b"}, "completion_text": "text"}
    traces = [
        build_trace(0, positions=4, k=3, vocab_size=VOCAB_SIZE, **said),
        build_trace(1, positions=4, k=5, vocab_size=VOCAB_SIZE, prompt_rows=True, prompt=3),
    ]
    return [draw_tails(trace, tail_draws, VOCAB_SIZE) for trace in traces] if tail_draws else traces


def codec_of(mode: CodecMode, tail_draws: int = 0) -> CodecSpec:
    return CodecSpec(mode, draws=DRAWS if mode == "sampled" else 0, tail_draws=tail_draws)


def encode(traces: list[Trace], mode: CodecMode, dictionary: Dictionary | None = None) -> Pieces:
    codec = codec_of(mode, traces[0].top_k.tail_draw_count)
    return take_apart(encode_block(traces, codec=codec, vocab_size=VOCAB_SIZE, dictionary=dictionary))


@contextmanager
def at_most(mebibytes: float) -> Iterator[None]:
    """Fails if Python and numpy together take more than that."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] <= mebibytes * (1 << 20)
    finally:
        tracemalloc.stop()


# One row of two entries, with codes of our own choice.


def tables_for(*contexts: int, holes: bool = False, draws: bool = False) -> CodeTables:
    """Tables with a code for every number in some contexts; with holes, half of the codes are missing.

    With draws, there are codes of draws from tails too.
    """
    counts = SymbolCounts.zeros()
    counts.numbers[list(contexts)] = 1
    counts.steps[:] = 1
    counts.draws[:] = draws
    tables = build_tables(counts, merge=0, level_rule=LevelRule.none(), with_escapes=True)
    if holes:
        tables.step_lengths[tables.step_lengths > 0] += 1
        tables.number_lengths[tables.number_lengths > 0] += 1
    return tables


def one_row(
    *,
    columns: list[tuple[int, int]],
    fixed: list[int],
    tail: int | None = None,
    entries: bytes = b"\0" * 8,
    draws: list[int] | None = None,
) -> Pieces:
    """A block with one row, whose numbers are given: (context, number) each, words of 32 bits, the tail's.

    The entries' bits lie between the words and the tail, the numbers of draws from it behind that.

    Where there are columns, the level of the row's first entry stands before them, which is 0.
    """
    pieces = encode([build_rows([[-0.5, -1.5]], [[3, 4]])], "exact")
    tables = tables_for(*range(NUMBER_CONTEXTS), draws=draws is not None)
    out = np.zeros(400, np.uint8)

    def write(bit: int, context: int, number: int) -> int:
        column = (np.array([number], np.uint32), np.array([context], np.uint8))
        return write_numbers(out, bit, *column, tables.number_codes)

    bit = 0
    for context, number in [(NumberContext.LEVEL, 0), *columns] if columns else []:
        bit = write(bit, context, number)
    bit = write_fixed(out, bit, np.array(fixed, np.uint32), 32)
    bit = write_fixed(out, bit, np.frombuffer(entries, np.uint8).astype(np.uint32), 8)
    bit = bit if tail is None else write(bit, NumberContext.TAIL, tail)
    if draws is not None and tables.draw_codes is not None:
        contexts = np.array([DrawContext.FIRST, *[DrawContext.GAP] * (len(draws) - 1)], np.uint8)
        bit = write_numbers(out, bit, np.array(draws, np.uint32), contexts, tables.draw_codes)
    stream = out[: (bit + 7) // 8].tobytes()
    flags = OWN_TABLES | (0 if draws is None else TAIL_DRAWS)
    return dataclasses.replace(
        pieces,
        flags=flags,
        draws=len(draws or ()),
        scale=b"\1",
        tables=tables.to_bytes(),
        streams=(stream,),
    )


OUTSIDE_7 = [(NumberContext.SAMPLED, 0), (NumberContext.OUTSIDE, 7)]


def no_entries(pieces: Pieces) -> Pieces:
    """The block with rows of no entries."""
    message = trace_pb2.BlockMetadata.FromString(pieces.metadata)
    message.traces[0].top_k = 0
    return dataclasses.replace(pieces, metadata=message.SerializeToString())


def compressed(header: BlockHeader, stored: bytes, size: int, rows: bytes) -> bytes:
    header = dataclasses.replace(header, uncompressed_size_bytes=size)
    return rejoin(header, varint(len(stored)) + stored + rows)
