"""Lists of byte strings as one: how a row holds many prompts."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import zstandard

from lynearm.wire.compression import decompress

BLOCK_BYTES = 256 << 10
"""Contents after which a block of prompts is full. A lease of a few prompts reads one block."""

BLOCK_PROMPTS = 1024
"""Prompts after which it is full, however short they are; whoever looks for prompt n relies on it."""

MAX_BLOCK_BYTES = 4 << 20
"""Of a block's packed contents: one long prompt may come on top of a block that is nearly full."""


def pack(strings: Sequence[bytes]) -> bytes:
    """The count, the sizes (4 bytes each, little endian), the strings."""
    sizes = struct.pack(f"<{len(strings) + 1}I", len(strings), *map(len, strings))
    return b"".join((sizes, *strings))


def unpack(data: bytes) -> list[bytes]:
    """What was packed."""
    (count,) = struct.unpack_from("<I", data)
    sizes = struct.unpack_from(f"<{count}I", data, 4)
    position = 4 * (count + 1)
    strings: list[bytes] = []
    for size in sizes:
        strings.append(data[position : position + size])
        position += size
    return strings


def pack_compressed(strings: Sequence[bytes]) -> bytes:
    """What `pack` gives, compressed."""
    return zstandard.ZstdCompressor(level=3).compress(pack(strings))


def unpack_compressed(data: bytes) -> list[bytes]:
    """What was packed.

    Raises:
        CorruptBlockError: the data was damaged.
    """
    return unpack(decompress(data, limit=MAX_BLOCK_BYTES))


def pack_indices(indices: Iterable[int]) -> bytes:
    """Numbers below 2^32, 4 bytes each, little endian."""
    found = tuple(indices)
    return struct.pack(f"<{len(found)}I", *found)


def unpack_indices(data: bytes) -> tuple[int, ...]:
    """What was packed."""
    return struct.unpack(f"<{len(data) // 4}I", data)
