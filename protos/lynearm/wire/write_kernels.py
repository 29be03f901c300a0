"""Writing a block's rows, compiled: entries to symbols, symbols and numbers to bits.

Shape legend: N = positions of a block, K = entries of the widest row.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lynearm.wire.alphabet import (
    ENTRY_STATES,
    LISTS_USED,
    LONG_STEP,
    NEAR_SYMBOLS,
    NUMBER_ESCAPE,
    NUMBER_WIDTHS,
    RANK_START,
    STEP_BASES,
    STEP_ESCAPE,
    STEP_WIDTHS,
    SYMBOL_BITS,
    TOKEN_CLASSES,
    gap_symbol,
    next_state,
    number_symbol,
    step_context,
    token_symbol,
)
from lynearm.wire.jit import Scalar, address_of, compiled, inlined, load8, load32, store64
from lynearm.wire.prefix_codes import MAX_CODE_LENGTH

Int64Array = npt.NDArray[np.int64]
Uint8Array = npt.NDArray[np.uint8]
Uint16Array = npt.NDArray[np.uint16]
Uint32Array = npt.NDArray[np.uint32]

U64 = np.uint64

MAX_ENTRY_BITS = 2 * MAX_CODE_LENGTH + SYMBOL_BITS + 20 + 32
"""Longest that one entry can be."""


@compiled
def name_entries(
    levels_NK: Uint32Array,
    token_codes_NK: Uint32Array,
    kept_N: Uint32Array,
    bucket_of_rank: Uint8Array,
    level_shift: int,
    symbols_NK: Uint16Array,
    open_bits_NK: Uint32Array,
    counts: Int64Array,
    step_counts: Int64Array,
) -> None:
    """Name every entry by a symbol, and count the symbols of each context.

    Args:
        levels_NK: Sorted.
        token_codes_NK: Ascending inside a level.
        kept_N: How many entries of each row count.
        bucket_of_rank: Shape [≥ K].
        level_shift: 2^level_shift levels share a context of long steps.
        symbols_NK: Filled with context · 2^SYMBOL_BITS + symbol.
        open_bits_NK: Filled with what the symbol leaves open.
        counts: Adds to shape [contexts, STEP_SYMBOLS + 1].
        step_counts: Adds the symbols of long steps to shape [LONG_STEP_CONTEXTS, NUMBER_SYMBOLS + 1].
    """
    for t in range(U64(0), U64(kept_N.size)):
        previous_code, previous_level, state = U64(0), U64(0), U64(0)
        for i in range(U64(0), U64(kept_N[t])):
            code, level = U64(token_codes_NK[t, i]), U64(levels_NK[t, i])
            step = level - previous_level if i else U64(0)
            is_gap = U64(step == U64(0)) & U64(i > U64(0))
            # Without a branch on what is as likely as not: gaps and token codes are named by one table.
            value = code - previous_code - U64(1) if is_gap else code
            if value < U64(RANK_START):
                symbol = U64(NEAR_SYMBOLS[is_gap, value])
            else:
                symbol = U64(gap_symbol(np.int64(value)) if is_gap else token_symbol(0, np.int64(value)))
            symbol += U64(0) if is_gap else min(step, U64(LONG_STEP)) * U64(TOKEN_CLASSES)
            context = U64(bucket_of_rank[i]) * U64(ENTRY_STATES) + state
            symbols_NK[t, i] = context << U64(SYMBOL_BITS) | symbol
            open_bits_NK[t, i] = value - U64(STEP_BASES[symbol])
            counts[context, symbol] += 1
            if step >= U64(LONG_STEP):
                long_context = step_context(previous_level, U64(level_shift))
                step_counts[long_context, number_symbol(np.int64(step) - LONG_STEP)] += 1
            previous_code = code
            previous_level = level
            state = next_state(state, code, U64(LISTS_USED))


@inlined
def _put(
    at: Scalar, waiting: Scalar, count: Scalar, value: Scalar, width: Scalar
) -> tuple[Scalar, Scalar, Scalar]:
    """Append at most 56 bits: where the stream stands, the bits that wait for a whole byte, how many."""
    waiting |= U64(value) << count
    count += U64(width)
    store64(at, waiting)
    whole = count >> U64(3)
    return at + whole, waiting >> (whole << U64(3)), count & U64(7)


@inlined
def _put_number(
    at: Scalar, waiting: Scalar, count: Scalar, number: Scalar, codes_at: Scalar, widths_at: Scalar
) -> tuple[Scalar, Scalar, Scalar]:
    """Append a number by its code, or by an escape."""
    symbol = U64(number_symbol(number))
    code = load32(codes_at + (symbol << U64(2)))
    width = load8(widths_at + symbol)
    if code == U64(0):
        code = load32(codes_at + U64(4 * NUMBER_ESCAPE))
        width = U64(32)
    at, waiting, count = _put(at, waiting, count, code & U64(0xFFFF), code >> U64(16))
    return _put(at, waiting, count, U64(number) & ((U64(1) << width) - U64(1)), width)


@compiled
def write_numbers(
    out: Uint8Array, start: int, numbers: Uint32Array, contexts: Uint8Array, codes: Uint32Array
) -> int:
    """Append numbers, each by the code of its context.

    Args:
        out: Has room for 43 bits a number, and for eight bytes more.
        start: Bit at which to begin.
        numbers: Shape [n].
        contexts: Row of `codes` for each, shape [n].
        codes: Code and length · 65536 of each symbol, 0 for none, shape [contexts, NUMBER_SYMBOLS + 1].

    Returns:
        The bit behind the last.
    """
    codes_at, widths_at = address_of(codes), address_of(NUMBER_WIDTHS)
    at, waiting, count = address_of(out) + (U64(start) >> U64(3)), U64(0), U64(start) & U64(7)
    waiting = load8(at) & ((U64(1) << count) - U64(1))
    for index in range(numbers.size):
        row_at = codes_at + U64(contexts[index]) * U64(4 * (NUMBER_ESCAPE + 1))
        at, waiting, count = _put_number(at, waiting, count, np.int64(numbers[index]), row_at, widths_at)
    return int(((at - address_of(out)) << U64(3)) + count)


@compiled
def write_fixed(out: Uint8Array, start: int, numbers: Uint32Array, width: int) -> int:
    """Append numbers of `width` bits, at most 32; as `write_numbers`."""
    at, waiting, count = address_of(out) + (U64(start) >> U64(3)), U64(0), U64(start) & U64(7)
    waiting = load8(at) & ((U64(1) << count) - U64(1))
    for index in range(numbers.size):
        at, waiting, count = _put(at, waiting, count, U64(numbers[index]), U64(width))
    return int(((at - address_of(out)) << U64(3)) + count)


@compiled
def write_rows(
    out: Uint8Array,
    start: int,
    first_row: int,
    lanes: int,
    levels_NK: Uint32Array,
    symbols_NK: Uint16Array,
    open_bits_NK: Uint32Array,
    kept_N: Uint32Array,
    level_shift: int,
    codes: Uint32Array,
    step_codes: Uint32Array,
) -> int:
    """Append every `lanes`-th row from `first_row` on.

    Args:
        out: Has room for `MAX_ENTRY_BITS` an entry, and for eight bytes more.
        start: Bit at which to begin.
        first_row: First row.
        lanes: Distance of the rows.
        levels_NK: As given to `name_entries`.
        symbols_NK: From `name_entries`.
        open_bits_NK: From `name_entries`.
        kept_N: How many entries of each row count.
        level_shift: As given to `name_entries`.
        codes: Code and length · 65536 of each symbol in each context, 0 for none.
        step_codes: The same for long steps, by context.

    Returns:
        The bit behind the last.
    """
    step_codes_at, widths_at = address_of(step_codes), address_of(NUMBER_WIDTHS)
    at, waiting, count = address_of(out) + (U64(start) >> U64(3)), U64(0), U64(start) & U64(7)
    waiting = load8(at) & ((U64(1) << count) - U64(1))
    for t in range(first_row, kept_N.size, lanes):
        level = np.int64(levels_NK[t, 0]) if kept_N[t] else np.int64(0)
        for i in range(np.int64(kept_N[t])):
            context = U64(symbols_NK[t, i]) >> U64(SYMBOL_BITS)
            symbol = U64(symbols_NK[t, i]) & U64((1 << SYMBOL_BITS) - 1)
            code = U64(codes[context, symbol])
            width = U64(STEP_WIDTHS[symbol])
            value = U64(open_bits_NK[t, i])
            if code == U64(0):
                code = U64(codes[context, STEP_ESCAPE])
                value = value << U64(SYMBOL_BITS) | symbol
                width += U64(SYMBOL_BITS)
            length = code >> U64(16)
            at, waiting, count = _put(
                at, waiting, count, (code & U64(0xFFFF)) | (value << length), length + width
            )
            step = np.int64(levels_NK[t, i]) - level
            if step >= LONG_STEP:
                context = step_context(U64(level), U64(level_shift))
                row_at = step_codes_at + context * U64(4 * (NUMBER_ESCAPE + 1))
                at, waiting, count = _put_number(at, waiting, count, step - LONG_STEP, row_at, widths_at)
            level += step
    return int(((at - address_of(out)) << U64(3)) + count)
