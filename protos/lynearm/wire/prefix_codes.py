"""Prefix codes: optimal code lengths under a limit, canonical codes, and the tables that decode them.

Code lengths follow Huffman (1952); lengths over the limit are cut and the code is mended by lengthening
the rarest symbols that still can be. A code is canonical: of two symbols, the one with the shorter code, or
with equal lengths the lower one, has the smaller code. Codes are written from their highest bit on, into
a stream that fills bytes from their lowest bit on: the tables here hold them bit-reversed.
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

MAX_CODE_LENGTH: Final = 11
"""Bits: a decoding table has 2^11 elements, and the tables of a stream fit a second-level cache."""


@compiled
def code_lengths(counts: Int64Array) -> Uint8Array:
    """Length of each symbol's code, 0 for a symbol that does not occur.

    Args:
        counts: How often each symbol occurs; at most 2^11 symbols do.
    """
    lengths = np.zeros(counts.size, np.uint8)
    used = np.flatnonzero(counts)
    size = used.size
    if size == 0:
        return lengths
    if size == 1:
        lengths[used[0]] = 1
        return lengths
    order = used[np.argsort(counts[used], kind="mergesort")]
    # Two sorted queues: leaves, and inner nodes in the order in which they were made.
    weights = np.empty(2 * size, np.int64)
    parents = np.zeros(2 * size, np.int64)
    for leaf in range(size):
        weights[leaf] = counts[order[leaf]]
    next_leaf = 0
    next_inner = size
    for inner in range(size, 2 * size - 1):
        weight = 0
        for _ in range(2):
            if next_leaf < size and (next_inner >= inner or weights[next_leaf] <= weights[next_inner]):
                child = next_leaf
                next_leaf += 1
            else:
                child = next_inner
                next_inner += 1
            weight += weights[child]
            parents[child] = inner
        weights[inner] = weight
    depths = np.zeros(2 * size, np.int64)
    space = 0
    for node in range(2 * size - 3, -1, -1):
        depths[node] = depths[parents[node]] + 1
        if node < size:
            depths[node] = min(depths[node], MAX_CODE_LENGTH)
            space += 1 << (MAX_CODE_LENGTH - depths[node])
    # Rarest first: lengthen codes until they fit, then shorten the commonest where room is left.
    full = 1 << MAX_CODE_LENGTH
    while space > full:
        for leaf in range(size):
            if depths[leaf] < MAX_CODE_LENGTH:
                depths[leaf] += 1
                space -= 1 << (MAX_CODE_LENGTH - depths[leaf])
                break
    for leaf in range(size - 1, -1, -1):
        while depths[leaf] > 1 and space + (1 << (MAX_CODE_LENGTH - depths[leaf])) <= full:
            space += 1 << (MAX_CODE_LENGTH - depths[leaf])
            depths[leaf] -= 1
    for leaf in range(size):
        lengths[order[leaf]] = depths[leaf]
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
def fill_table(lengths: Uint8Array, entries: Uint64Array, table: Uint64Array) -> None:
    """Put each symbol's entry wherever the next bits begin with its code.

    Args:
        lengths: Code lengths that fit a code, shape [n].
        entries: What to put, shape [n]; the code's length is in its lowest four bits.
        table: Shape [2^11]; left as it is where no code fits.
    """
    codes = canonical_codes(lengths)
    for symbol in range(lengths.size):
        length = lengths[symbol]
        if length:
            table[codes[symbol] :: 1 << length] = entries[symbol]


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
