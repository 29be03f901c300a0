"""Reading one entry of a row, inlined into `lynearm.wire.row_kernels`: its token code and its level."""

from __future__ import annotations

import numpy as np

from lynearm.wire.alphabet import LONG_STEP, STEP_CLASSES, SYMBOL_BITS, step_context
from lynearm.wire.jit import Scalar, inlined, load32, load64
from lynearm.wire.number_kernels import CODE_MASK
from lynearm.wire.prefix_codes import MAX_CODE_LENGTH

U64 = np.uint64

STEP_ESCAPE_TOTAL = 31
"""Marks an escape in a decoding table: a code and its open bits have 30 bits at most."""


@inlined
def read_entry(
    stream_at: Scalar,
    position: Scalar,
    table_at: Scalar,
    plain_at: Scalar,
    long_steps_at: Scalar,
    level_shift: Scalar,
    previous: Scalar,
    level: Scalar,
) -> tuple[Scalar, Scalar, Scalar]:
    """One entry: the bit behind it, its token code, and its level.

    Where no code fits, tables hold a token code, or a step, that no block may have: that is noticed later.

    Whether a step is long is a coin's toss for a row's first entries: to look up a number that is not there
    costs less than to guess wrong, which undoes the work of four rows. The mask is loaded, too, since LLVM
    makes a branch of one that is computed.
    """
    position, code, step, word = _read_symbol(stream_at, position, table_at, plain_at, previous)
    table_at = _long_step_table(long_steps_at, level_shift, level)
    number = load64(table_at + ((word & CODE_MASK) << U64(3))) & load64(plain_at + (step << U64(3)))
    total = number & U64(63)
    if total > U64(27):
        word = load64(stream_at + (position >> U64(3))) >> (position & U64(7))
    step += (number >> U64(10)) + ((word & ((U64(1) << total) - U64(1))) >> ((number >> U64(6)) & U64(15)))
    return position + total, code, level + step


@inlined
def read_late_entry(
    stream_at: Scalar,
    position: Scalar,
    table_at: Scalar,
    plain_at: Scalar,
    long_steps_at: Scalar,
    level_shift: Scalar,
    previous: Scalar,
    level: Scalar,
) -> tuple[Scalar, Scalar, Scalar]:
    """As `read_entry`, where long steps are rare: one test finds them and the escapes, also long."""
    word = load64(stream_at + (position >> U64(3))) >> (position & U64(7))
    entry = load32(table_at + ((word & CODE_MASK) << U64(2)))
    total = entry & U64(31)
    step = (entry >> U64(9)) & U64(3)
    if step == U64(LONG_STEP):
        if total == U64(STEP_ESCAPE_TOTAL):
            position, entry, word = _read_escaped(stream_at, position, plain_at, entry, word)
            total = entry & U64(31)
            step = (entry >> U64(9)) & U64(3)
        if step == U64(LONG_STEP):
            behind = position + total
            table_at = _long_step_table(long_steps_at, level_shift, level)
            number = load64(table_at + (((word >> total) & CODE_MASK) << U64(3)))
            number_total = number & U64(63)
            number_word = load64(stream_at + (behind >> U64(3))) >> (behind & U64(7))
            level += (number >> U64(10)) + (
                (number_word & ((U64(1) << number_total) - U64(1))) >> ((number >> U64(6)) & U64(15))
            )
            position += number_total
    code = (entry >> U64(11)) + ((word & ((U64(1) << total) - U64(1))) >> ((entry >> U64(5)) & U64(15)))
    code += previous if step == U64(0) else U64(0)
    return position + total, code, level + step


@inlined
def _long_step_table(long_steps_at: Scalar, level_shift: Scalar, level: Scalar) -> Scalar:
    return long_steps_at + (step_context(level, level_shift) << U64(MAX_CODE_LENGTH + 3))


@inlined
def _read_symbol(
    stream_at: Scalar, position: Scalar, table_at: Scalar, plain_at: Scalar, previous: Scalar
) -> tuple[Scalar, Scalar, Scalar, Scalar]:
    """An entry's symbol: the bit behind it, its token code, its step, and at least 27 of the bits behind."""
    word = load64(stream_at + (position >> U64(3))) >> (position & U64(7))
    entry = load32(table_at + ((word & CODE_MASK) << U64(2)))
    total = entry & U64(31)
    if total == U64(STEP_ESCAPE_TOTAL):
        position, entry, word = _read_escaped(stream_at, position, plain_at, entry, word)
        total = entry & U64(31)
    step = (entry >> U64(9)) & U64(3)
    code = (entry >> U64(11)) + ((word & ((U64(1) << total) - U64(1))) >> ((entry >> U64(5)) & U64(15)))
    code += previous if step == U64(0) else U64(0)
    return position + total, code, step, word >> total


@inlined
def _read_escaped(
    stream_at: Scalar, position: Scalar, plain_at: Scalar, entry: Scalar, word: Scalar
) -> tuple[Scalar, Scalar, Scalar]:
    """A symbol without a code: where its open bits begin, its element, and the bits there."""
    length = (entry >> U64(5)) & U64(15)
    symbol = (word >> length) & U64((1 << SYMBOL_BITS) - 1)
    position += length + U64(SYMBOL_BITS)
    return (
        position,
        load32(plain_at + U64(8 * STEP_CLASSES) + (symbol << U64(2))),
        load64(stream_at + (position >> U64(3))) >> (position & U64(7)),
    )
