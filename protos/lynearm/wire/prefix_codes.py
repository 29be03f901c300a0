"""Prefix codes: the best code lengths under a limit, canonical codes, and the tables that decode them.

Code lengths are found by package-merge (Larmore and Hirschberg 1990). A code is canonical: of two symbols,
the one with the shorter code, or with equal lengths the lower one, has the smaller code. Codes are written
from their highest bit on, into a stream that fills bytes from their lowest bit on: the tables here hold them
bit-reversed.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from lynearm.wire.errors import CorruptBlockError
from lynearm.wire.jit import compiled

Uint8Array = npt.NDArray[np.uint8]
Uint32Array = npt.NDArray[np.uint32]
Uint64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]
DecodingTables = npt.NDArray[np.uint32] | npt.NDArray[np.uint64]

MAX_CODE_LENGTH: Final = 10
"""Bits: a decoding table has 2^10 elements; those of the likeliest contexts fit a first-level cache.

Of 11, blocks at k = 64 are 0.2 % smaller, and take up to a tenth longer to decode.
"""


_LAST_WORD = (1 << MAX_CODE_LENGTH) - 1
_REVERSED: Uint32Array = np.array(
    [int(f"{word:0{MAX_CODE_LENGTH}b}"[::-1], 2) for word in range(1 << MAX_CODE_LENGTH)], np.uint32
)
"""Each word with its bits the other way round: code words come highest bit first, plain bits lowest first."""


@compiled
def code_lengths(counts: Int64Array) -> Uint8Array:
    """Length of each symbol's code, 0 for a symbol that does not occur.

    Args:
        counts: How often each symbol occurs; at most 2^MAX_CODE_LENGTH symbols do.
    """
    lengths = np.zeros(counts.size, np.uint8)
    used = np.flatnonzero(counts)
    size = used.size
    if size < 2:
        lengths[used] = 1
        return lengths
    order = used[np.argsort(counts[used], kind="mergesort")]
    weights = counts[order]
    # Of each length, the longest first: all symbols, and pairs of what the next longer one has, by weight.
    is_symbol = np.zeros((MAX_CODE_LENGTH, 2 * size), np.bool_)
    items = weights.copy()
    is_symbol[0, :size] = True
    for length in range(1, MAX_CODE_LENGTH):
        pairs = items.size // 2
        merged = np.empty(size + pairs, np.int64)
        symbol = pair = 0
        for index in range(size + pairs):
            weight = items[2 * pair] + items[2 * pair + 1] if pair < pairs else 0
            if pair == pairs or (symbol < size and weights[symbol] <= weight):
                merged[index] = weights[symbol]
                is_symbol[length, index] = True
                symbol += 1
            else:
                merged[index] = weight
                pair += 1
        items = merged
    # The lightest items of the shortest length make the code: each time that a symbol is in them is a bit.
    taken = 2 * size - 2
    for length in range(MAX_CODE_LENGTH - 1, -1, -1):
        symbols = int(is_symbol[length, :taken].sum())
        for index in range(symbols):
            lengths[order[index]] += 1
        taken = 2 * (taken - symbols)
    return lengths


@compiled
def canonical_codes(lengths: Uint8Array) -> Uint32Array:
    """Bit-reversed code of each symbol; 0 where the length is 0. The lengths must fit a code."""
    codes = np.zeros(lengths.size, np.uint32)
    code = 0
    for length in range(1, MAX_CODE_LENGTH + 1):
        for symbol in range(lengths.size):
            if lengths[symbol] == length:
                reversed_code = 0
                for bit in range(length):
                    reversed_code |= ((code >> bit) & 1) << (length - 1 - bit)
                codes[symbol] = reversed_code
                code += 1
        code <<= 1
    return codes


@compiled
def fill_tables(
    lengths: Uint8Array, entries: Uint64Array, absent: int, shift: int, escape: int, tables: DecodingTables
) -> None:
    """Decoding tables of some codes: what the next `MAX_CODE_LENGTH` bits begin with.

    Args:
        lengths: Code lengths, each row of which fits a code, shape [codes, n].
        entries: What to put for each symbol, shape [n]; a code's length is added to it, and is put in at
            `shift` too.
        absent: What to put where no code fits.
        shift: Where the length goes.
        escape: Symbol to whose entry no length is added; −1 for none.
        tables: Filled, shape [codes, 2^10].
    """
    sorted_symbols = np.empty(lengths.shape[1], np.int64)
    ends = np.empty(MAX_CODE_LENGTH + 2, np.int64)
    for row in range(lengths.shape[0]):
        ends[:] = 0
        for symbol in range(lengths.shape[1]):
            ends[lengths[row, symbol] + 1] += 1
        for length in range(1, MAX_CODE_LENGTH + 2):
            ends[length] += ends[length - 1]
        # `ends` holds where each length starts, and is moved to where it ends.
        for symbol in range(lengths.shape[1]):
            length = lengths[row, symbol]
            sorted_symbols[ends[length]] = symbol
            ends[length] += 1
        tables[row, 0] = absent
        code = 0
        for length in range(1, MAX_CODE_LENGTH + 1):
            # One bit more behind the codes so far, whatever it is.
            size = 1 << (length - 1)
            tables[row, size : 2 * size] = tables[row, :size]
            code <<= 1
            for index in range(ends[length - 1], ends[length]):
                symbol = sorted_symbols[index]
                added = length << shift if symbol == escape else length << shift | length
                place = _REVERSED[code & _LAST_WORD] >> (MAX_CODE_LENGTH - length)
                tables[row, place] = entries[symbol] + np.uint64(added)
                code += 1


def check_lengths(lengths: Uint8Array) -> None:
    """Refuse lengths that no prefix code has.

    Args:
        lengths: Shape [..., n]; each row is a code.

    Raises:
        CorruptBlockError: if a row's codes need more room than there is.
    """
    room = np.where(lengths > 0, 1 << (MAX_CODE_LENGTH - lengths.astype(np.int64)), 0).sum(axis=-1)
    if (room > 1 << MAX_CODE_LENGTH).any():
        raise CorruptBlockError("a table of code lengths is oversubscribed")
