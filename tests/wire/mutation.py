"""Blocks taken apart, spoiled and put together again, with sizes and checksums that hold.

A checksum keeps accidents out, and no malice: whoever writes a block computes it. So everything here that
is changed gets the checksum that it needs, and reaches the decoder.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from random import Random

import zstandard

from lynearm.wire.blocks import BlockHeader, checksum, join_block, split_block
from lynearm.wire.fields import ByteReader, varint
from lynearm.wire.row_layout import FOUR_LANES, OWN_TABLES, SCALE_OF_DICTIONARY, TAIL_DRAWS


@dataclass(frozen=True, slots=True)
class Pieces:
    """A block of version 2, taken apart as docs/format.md divides it."""

    header: BlockHeader
    metadata: bytes
    """Not compressed."""
    flags: int
    draws: int
    """D; written where a flag says so."""
    vocab_size: int
    scale: bytes
    tables: bytes
    """Empty where the dictionary's are used."""
    streams: tuple[bytes, ...]
    """Numbers, then the entries of four lanes; one stream of all of them where there is one lane."""


def take_apart(block: bytes) -> Pieces:
    """The pieces of a block that holds."""
    header, payload = split_block(block)
    reader = ByteReader(payload)
    stored = bytes(reader.take(reader.varint()))
    raw = header.uncompressed_size_bytes == 0
    metadata = stored if raw else zstandard.ZstdDecompressor().decompress(stored)
    flags, vocab_size, scale = reader.byte(), 0, b""
    draws = reader.byte() if flags & TAIL_DRAWS else 0
    if not flags & SCALE_OF_DICTIONARY:
        vocab_size, kind = reader.varint(), reader.byte()
        scale = bytes((kind,)) + b"".join(varint(reader.varint()) for _ in range({0: 2, 4: 1}.get(kind, 0)))
    tables = bytes(reader.take(reader.varint())) if flags & OWN_TABLES else b""
    sizes = [reader.varint() for _ in range(4 if flags & FOUR_LANES else 0)]
    streams = [bytes(reader.take(size)) for size in sizes]
    streams.append(bytes(reader.rest()))
    return Pieces(header, metadata, flags, draws, vocab_size, scale, tables, tuple(streams))


def write_rows_part(pieces: Pieces) -> bytes:
    """What follows the metadata."""
    sized = varint(len(pieces.tables)) + pieces.tables if pieces.flags & OWN_TABLES else b""
    sizes = b"".join(varint(len(stream)) for stream in pieces.streams[:-1])
    vocab_size = b"" if pieces.flags & SCALE_OF_DICTIONARY else varint(pieces.vocab_size)
    draws = bytes((pieces.draws,)) if pieces.flags & TAIL_DRAWS else b""
    head = bytes((pieces.flags,)) + draws + vocab_size + pieces.scale + sized + sizes
    return head + b"".join(pieces.streams)


def put_together(pieces: Pieces, rows_part: bytes | None = None) -> bytes:
    """A block whose sizes and checksum hold; its metadata lies as it is."""
    rows_part = write_rows_part(pieces) if rows_part is None else rows_part
    payload = varint(len(pieces.metadata)) + pieces.metadata + rows_part
    return rejoin(dataclasses.replace(pieces.header, uncompressed_size_bytes=0), payload)


def rejoin(header: BlockHeader, payload: bytes) -> bytes:
    """A block around any payload, with the checksum that it needs."""
    found = checksum(payload, header.format_version)
    return join_block(dataclasses.replace(header, payload_xxh3=found), payload)


_INTERESTING = (0, 1, 2, 3, 7, 8, 15, 16, 31, 63, 64, 127, 128, 255)


def spoil_bytes(data: bytes, rng: Random) -> bytes:
    """The bytes with one to four bits flipped, bytes overwritten, inserted, repeated or cut out."""
    changed = bytearray(data)
    for _ in range(1 if rng.random() < 0.7 else rng.randint(2, 4)):
        if not changed:
            changed += rng.randbytes(4)
        place = int(rng.random() * len(changed))
        kind = int(rng.random() * 9)
        if kind <= 3:
            changed[place] ^= 1 << int(rng.random() * 8)
        elif kind == 4:
            changed[place] = _INTERESTING[int(rng.random() * len(_INTERESTING))]
        elif kind == 5:
            size = rng.randint(1, 8)
            changed[place : place + size] = rng.randbytes(size)
        elif kind == 6:
            del changed[place : place + rng.randint(1, 6)]
        elif kind == 7:
            changed[place:place] = rng.randbytes(rng.randint(1, 6))
        else:
            changed[place:place] = changed[place : place + rng.randint(1, 16)]
    return bytes(changed)


def spoil_block(pieces: Pieces, others: list[Pieces], rng: Random) -> bytes:
    """A block near to one that holds, spoiled where it hurts.

    Args:
        pieces: The block.
        others: Blocks to splice pieces of.
        rng: Source of every choice.
    """
    kind = rng.random()
    if kind < 0.35:
        return put_together(pieces, spoil_bytes(write_rows_part(pieces), rng))
    if kind < 0.65:
        index = int(rng.random() * len(pieces.streams))
        streams = list(pieces.streams)
        streams[index] = spoil_bytes(streams[index], rng)
        return put_together(dataclasses.replace(pieces, streams=tuple(streams)))
    if kind < 0.75 and pieces.tables:
        # Behind the eleven bytes of their head, lengths are nibbles: a change keeps the others in place.
        tables = bytearray(pieces.tables)
        for _ in range(rng.randint(1, 3)):
            tables[int(rng.random() * len(tables))] ^= rng.randint(1, 15) << 4 * rng.randint(0, 1)
        return put_together(dataclasses.replace(pieces, tables=bytes(tables)))
    if kind < 0.81:
        return put_together(_spoil_metadata(pieces, rng))
    if kind < 0.82:
        return _spoil_frame(pieces, rng)
    if kind < 0.83:
        return spoil_bytes(put_together(pieces), rng)
    if kind < 0.93:
        return put_together(_splice(pieces, others[int(rng.random() * len(others))], rng))
    return put_together(_lie(pieces, rng))


def _spoil_metadata(pieces: Pieces, rng: Random) -> Pieces:
    metadata = spoil_bytes(pieces.metadata, rng)
    header = pieces.header
    if rng.random() < 0.5:
        # The counts that most changes contradict, guessed right.
        field = rng.choice(("trace_count", "prompt_token_count", "completion_token_count"))
        value = max(getattr(header, field) + rng.randint(-3, 3), 1)
        header = dataclasses.replace(header, **{field: value})
    return dataclasses.replace(pieces, metadata=metadata, header=header)


def _spoil_frame(pieces: Pieces, rng: Random) -> bytes:
    """The block with its metadata in a zstd frame, spoiled, or of a spoiled content."""
    frame = zstandard.ZstdCompressor(level=1).compress(pieces.metadata)
    if rng.random() < 0.5:
        frame = spoil_bytes(frame, rng)
    else:
        frame = zstandard.ZstdCompressor(level=1).compress(spoil_bytes(pieces.metadata, rng))
    size = len(pieces.metadata) + rng.choice((0, 0, 0, 1, -1, 1 << 20))
    header = dataclasses.replace(pieces.header, uncompressed_size_bytes=max(size, 1))
    return rejoin(header, varint(len(frame)) + frame + write_rows_part(pieces))


def _splice(pieces: Pieces, other: Pieces, rng: Random) -> Pieces:
    kind = rng.randrange(6)
    if kind == 0:
        return dataclasses.replace(pieces, tables=other.tables or pieces.tables)
    if kind == 1:
        return dataclasses.replace(pieces, streams=other.streams)
    if kind == 2:
        return dataclasses.replace(pieces, streams=tuple(rng.sample(pieces.streams, len(pieces.streams))))
    if kind == 3:
        return dataclasses.replace(pieces, metadata=other.metadata, header=other.header)
    if kind == 4:
        return dataclasses.replace(
            pieces,
            scale=other.scale,
            header=dataclasses.replace(pieces.header, codec_mode=other.header.codec_mode),
        )
    digest = other.header.dictionary_digest
    return dataclasses.replace(pieces, header=dataclasses.replace(pieces.header, dictionary_digest=digest))


def _lie(pieces: Pieces, rng: Random) -> Pieces:
    kind = rng.randrange(5)
    if kind == 0:
        draws = pieces.draws or rng.randint(1, 3)
        return dataclasses.replace(pieces, flags=pieces.flags ^ 1 << rng.randrange(8), draws=draws)
    if kind == 4:
        return dataclasses.replace(pieces, flags=pieces.flags | TAIL_DRAWS, draws=rng.randint(0, 20))
    if kind == 1:
        vocab_size = rng.choice((0, 1, 2, 255, pieces.vocab_size - 1, 1 << 12, (1 << 20) + 1, 1 << 40))
        return dataclasses.replace(pieces, vocab_size=vocab_size)
    if kind == 2:
        scale = rng.choice((b"\0\xc8\1\x90\3", b"\1", b"\2", b"\3", b"\4\1", b"\4\x80\x80\4", b"\5"))
        mode = rng.choice(("exact", "standard", "sampled"))
        header = dataclasses.replace(pieces.header, codec_mode=mode)
        return dataclasses.replace(pieces, scale=scale, header=header)
    streams = list(pieces.streams)
    index = rng.randrange(len(streams))
    streams[index] = b"" if rng.random() < 0.3 else streams[index] + rng.randbytes(rng.randint(1, 40))
    return dataclasses.replace(pieces, streams=tuple(streams))
