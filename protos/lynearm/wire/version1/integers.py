"""Non-negative integers as one class byte each, plus the bits that the class leaves open.

A class is the exponent of a number and its three leading mantissa bits; numbers below 16 are their own
class. The class bytes of like numbers repeat and squeeze well under zstd's entropy coder; the open bits
look random, so they are packed tight and left alone. They lie in planes, bit 0 of every number
that has one, then bit 1, and so on: packing and unpacking are a few vector operations per plane.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lynearm.wire.errors import CorruptBlockError

Int64Array = npt.NDArray[np.int64]
Uint8Array = npt.NDArray[np.uint8]

MANTISSA_BITS = 3
MAX_NUMBER = (1 << 32) - 1
MAX_CLASS = 239
"""Class of `MAX_NUMBER`; higher class bytes are not used."""


def decode_numbers(data: memoryview, count: int) -> Int64Array:
    """The numbers that `encode_numbers` wrote.

    Args:
        data: Exactly the bytes of one call.
        count: How many numbers.

    Returns:
        Shape [count].

    Raises:
        CorruptBlockError: if the bytes are too few, too many, or hold an unused class.
    """
    if count > len(data):
        raise CorruptBlockError(f"{count} numbers in {len(data)} bytes")
    classes = np.frombuffer(data, np.uint8, count)
    if count and classes.max() > MAX_CLASS:
        raise CorruptBlockError(f"number class {classes.max()} is not in use")
    values = _CLASS_BASE[classes]
    open_bits = _CLASS_OPEN_BITS[classes]
    where = np.flatnonzero(open_bits)
    open_bits = open_bits[where]
    position, bit = count, 0
    while where.size:
        size_bytes = (where.size + 7) // 8
        if position + size_bytes > len(data):
            raise CorruptBlockError(f"{count} numbers end inside bit plane {bit}")
        packed = np.frombuffer(data, np.uint8, size_bytes, position)
        plane = np.unpackbits(packed, count=where.size, bitorder="little")
        values[where] |= plane.astype(np.int64) << bit
        position, bit = position + size_bytes, bit + 1
        still_open = open_bits > bit
        where, open_bits = where[still_open], open_bits[still_open]
    if position != len(data):
        raise CorruptBlockError(f"{len(data) - position} bytes follow {count} numbers")
    return values


def _class_tables() -> tuple[Int64Array, Uint8Array]:
    classes = np.arange(256, dtype=np.int64)
    open_bits = np.maximum((classes >> MANTISSA_BITS) - 1, 0)
    base = (classes - (open_bits << MANTISSA_BITS)) << open_bits
    return base, open_bits.astype(np.uint8)


_CLASS_BASE, _CLASS_OPEN_BITS = _class_tables()
