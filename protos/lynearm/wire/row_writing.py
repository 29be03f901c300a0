"""The rows' part of a payload, written: symbols and numbers become bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from lynearm.wire.alphabet import LONG_STEP_CONTEXTS
from lynearm.wire.code_tables import CodeTables, build_tables, plain_draw_bits
from lynearm.wire.dictionaries import Dictionary
from lynearm.wire.fields import varint
from lynearm.wire.row_layout import (
    FOUR_LANES,
    LANES,
    ORDER_OF_DICTIONARY,
    OWN_TABLES,
    SCALE_OF_DICTIONARY,
    SHORT_TABLES,
)
from lynearm.wire.row_naming import NamedRows
from lynearm.wire.row_scales import write_scale
from lynearm.wire.write_kernels import MAX_ENTRY_BITS, write_fixed, write_numbers, write_rows

Uint8Array = npt.NDArray[np.uint8]

_MIN_LANE_ROWS = 64
"""Below it, one lane: the sizes of the others would cost more than they save in time."""

_MOST_SHORT_ROWS = 512
"""Blocks of more rows do not use the codes for short ones, which are the best ones for longer blocks now and
then, but take four times the memory, and so the time, to read."""


def write_positions(rows: NamedRows, *, vocab_size: int, dictionary: Dictionary | None) -> bytes:
    """The rows' part of a payload.

    Args:
        rows: From `name_rows`, with this dictionary.
        vocab_size: V.
        dictionary: Whose codes are used where own ones would cost more.
    """
    tables, encoded_tables = _choose_tables(rows, vocab_size, dictionary)
    four_lanes = rows.kept.size >= _MIN_LANE_ROWS
    flags = rows.flags | (OWN_TABLES if encoded_tables else 0) | (FOUR_LANES if four_lanes else 0)
    flags |= SHORT_TABLES if dictionary is not None and tables is dictionary.short_tables else 0
    known_scale = dictionary is not None and rows.scale == dictionary.grid
    flags |= ORDER_OF_DICTIONARY if dictionary is not None else 0
    flags |= SCALE_OF_DICTIONARY if known_scale else 0
    entry_bits = int(rows.kept.sum(dtype=np.int64)) * MAX_ENTRY_BITS
    columns = rows.columns if rows.tail_draws is None else (*rows.columns, rows.tail_draws)
    number_bits = sum(column.numbers.size for column in columns) * 43
    fixed_bits = sum(numbers.size * width for numbers, width in rows.fixed)
    out = np.empty((entry_bits + number_bits + fixed_bits) // 8 + 64, np.uint8)
    bit = _write_columns(out, rows, tables)
    if four_lanes:
        ends = [_bytes_of(_write_tails(out, bit, rows, tables, vocab_size))]
        for lane in range(LANES):
            ends.append(_bytes_of(_write_lane(out, 8 * ends[-1], rows, tables, lane, LANES)))
    else:
        bit = _write_lane(out, bit, rows, tables, 0, 1)
        ends = [_bytes_of(_write_tails(out, bit, rows, tables, vocab_size))]
    sizes = np.diff(ends, prepend=0).tolist()
    head = [
        bytes((flags,) if rows.tail_draws is None else (flags, rows.tail_draw_count)),
        b"" if known_scale else varint(vocab_size) + write_scale(rows.scale),
        varint(len(encoded_tables)) + encoded_tables if encoded_tables else b"",
        *(varint(size) for size in sizes[:-1]),
    ]
    return b"".join(head) + out[: ends[-1]].tobytes()


def _write_columns(out: Uint8Array, rows: NamedRows, tables: CodeTables) -> int:
    """Begin with all columns but the tails; the bit behind them."""
    bit = 0
    for column in rows.columns[:-1]:
        bit = write_numbers(out, bit, column.numbers, column.contexts, tables.number_codes)
    for numbers, width in rows.fixed:
        bit = write_fixed(out, bit, numbers, width)
    return bit


def _write_tails(out: Uint8Array, bit: int, rows: NamedRows, tables: CodeTables, vocab_size: int) -> int:
    """Go on with the tail masses and what was drawn from the tails; the bit behind them."""
    tails, draws = rows.columns[-1], rows.tail_draws
    bit = write_numbers(out, bit, tails.numbers, tails.contexts, tables.number_codes)
    if draws is None:
        return bit
    if tables.draw_codes is None:
        return write_fixed(out, bit, draws.numbers, plain_draw_bits(vocab_size))
    return write_numbers(out, bit, draws.numbers, draws.contexts, tables.draw_codes)


def _write_lane(out: Uint8Array, bit: int, rows: NamedRows, tables: CodeTables, lane: int, lanes: int) -> int:
    return write_rows(
        out,
        bit,
        lane,
        lanes,
        rows.levels,
        rows.symbols,
        rows.open_bits,
        rows.kept,
        tables.level_rule.step_shift,
        tables.step_codes,
        tables.number_codes[:LONG_STEP_CONTEXTS],
    )


def _choose_tables(
    rows: NamedRows, vocab_size: int, dictionary: Dictionary | None
) -> tuple[CodeTables, bytes]:
    """The codes that make the block smallest, and their bytes; none for the dictionary's."""
    entries = int(rows.kept.sum(dtype=np.int64))
    best: tuple[CodeTables, bytes] | None = None
    best_bits = 0
    if dictionary is not None:
        known = dictionary.tables
        best, best_bits = (known, b""), known.cost_bits(rows.counts, vocab_size=vocab_size)
        short = dictionary.short_tables
        # Rows were named by the level rule of the others.
        if short is not None and short.level_rule == rows.level_rule and rows.kept.size <= _MOST_SHORT_ROWS:
            bits = short.cost_bits(rows.counts, vocab_size=vocab_size)
            if bits < best_bits:
                best, best_bits = (short, b""), bits
    # More codes fit the rows better, and cost about 400 bits each to send.
    merges = (0, 1) if entries < 4096 else (1, 2)
    for merge in merges if best is None or entries >= 2048 else ():
        built = build_tables(rows.counts, merge=merge, level_rule=rows.level_rule, with_escapes=False)
        # The draws of a few rows are not worth codes of their own.
        for tables in (built,) if rows.tail_draws is None else (built, replace(built, draw_lengths=None)):
            encoded = tables.to_bytes()
            bits = tables.cost_bits(rows.counts, vocab_size=vocab_size) + 8 * len(encoded)
            if best is None or bits < best_bits:
                best, best_bits = (tables, encoded), bits
    assert best is not None
    return best


def _bytes_of(bits: int) -> int:
    return (bits + 7) // 8
