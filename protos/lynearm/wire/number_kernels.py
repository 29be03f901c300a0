"""Reading numbers, compiled.

Nothing here allocates by a number that a block claims, and every read stays inside what the caller says is
there: `positions` checks sizes before it calls.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lynearm.wire.jit import Scalar, address_of, compiled, highest_bit, inlined, load64
from lynearm.wire.prefix_codes import MAX_CODE_LENGTH

Uint8Array = npt.NDArray[np.uint8]
Uint32Array = npt.NDArray[np.uint32]
Uint64Array = npt.NDArray[np.uint64]

U64 = np.uint64

LOOKAHEAD_BYTES = 16
"""What must be readable behind the last bit of a stream while one entry is read."""

LEVEL_DIGITS = 7
"""Most binary digits of a level that contexts tell apart."""

CODE_MASK = U64((1 << MAX_CODE_LENGTH) - 1)
"""Of the bits by which a decoding table is looked into."""


@compiled
def read_numbers(
    stream: Uint8Array,
    bit: int,
    end_bit: int,
    contexts: Uint8Array,
    tables: Uint64Array,
    numbers: Uint32Array,
) -> int:
    """Read numbers that `write_numbers` wrote.

    Args:
        stream: Readable for `LOOKAHEAD_BYTES` behind the end.
        bit: Where the first begins.
        end_bit: Where the stream ends.
        contexts: Table of each number, shape [n].
        tables: Shape [tables · 2^10]: bits in all, length << 6, base << 10.
        numbers: Filled, shape [n].

    Returns:
        The bit behind the last; −1 when a code is not in its table or the stream ends before.
    """
    stream_at, tables_at = address_of(stream), address_of(tables)
    position, end = U64(bit), U64(end_bit)
    for index in range(numbers.size):
        position, number, bad = read_number(stream_at, position, tables_at, U64(contexts[index]))
        if (position > end) | bad:
            return -1
        numbers[index] = number
    # Of int64 and uint64, numba would make a float.
    return int(np.int64(position))


@compiled
def read_numbers_by_level(
    stream: Uint8Array,
    bit: int,
    end_bit: int,
    first_context: int,
    levels: Uint32Array,
    tables: Uint64Array,
    numbers: Uint32Array,
) -> int:
    """As `read_numbers`, where the binary digits of a level each, at most 7, are added to one context."""
    stream_at, tables_at = address_of(stream), address_of(tables)
    position, end = U64(bit), U64(end_bit)
    for index in range(numbers.size):
        digits = min(highest_bit(np.int64(levels[index]) << 1 | 1), LEVEL_DIGITS)
        position, number, bad = read_number(stream_at, position, tables_at, U64(first_context + digits))
        if (position > end) | bad:
            return -1
        numbers[index] = number
    return int(np.int64(position))


@inlined
def read_number(
    stream_at: Scalar, position: Scalar, tables_at: Scalar, context: Scalar
) -> tuple[Scalar, Scalar, Scalar]:
    """One number: the bit behind it, the number, and whether its code is not in the table of its context."""
    word = load64(stream_at + (position >> U64(3))) >> (position & U64(7))
    entry = load64(tables_at + (((context << U64(MAX_CODE_LENGTH)) + (word & CODE_MASK)) << U64(3)))
    total = entry & U64(63)
    open_bits = (word & ((U64(1) << total) - U64(1))) >> ((entry >> U64(6)) & U64(15))
    number = (entry >> U64(10)) + open_bits
    return position + total, number, entry >> U64(42) > U64(0)


@compiled
def read_fixed(stream: Uint8Array, bit: int, end_bit: int, width: int, numbers: Uint32Array) -> int:
    """Read numbers of `width` bits, at most 32; as `read_numbers`."""
    position = U64(bit)
    if position + U64(numbers.size) * U64(width) > U64(end_bit):
        return -1
    stream_at = address_of(stream)
    mask = (U64(1) << U64(width)) - U64(1)
    for index in range(numbers.size):
        numbers[index] = (load64(stream_at + (position >> U64(3))) >> (position & U64(7))) & mask
        position += U64(width)
    return bit + numbers.size * width
