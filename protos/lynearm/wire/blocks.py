"""The block: a header that anyone can read, and a payload that only the codec looks into.

A block travels, and is stored, as one serialised `lynearm.v1.Block`. Whoever accepts blocks calls
`verify_block`: it proves that the bytes are whole and within bounds without decoding them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import xxhash
from google.protobuf.message import DecodeError

from lynearm.v1 import trace_pb2
from lynearm.wire.errors import CodecError, CorruptBlockError, InvalidInputError, UnsupportedFormatError
from lynearm.wire.fields import bytes_prefix, expect_bytes, read_fields
from lynearm.wire.specs import CODEC_MODES, CodecMode

FORMAT_VERSION = 2
"""Version of the payload's layout that this package writes, and the newest that it reads."""

MAX_PAYLOAD_BYTES = 3 << 20
"""Leaves room for framing under gRPC's default of 4 MiB a message."""

MAX_BLOCK_BYTES = MAX_PAYLOAD_BYTES + 128
"""Payload, header and framing."""

MAX_UNCOMPRESSED_BYTES = 64 << 20
"""What a reader must be ready to hold for one block."""

MAX_TRACES = 1 << 16

MAX_BLOCK_ENTRIES = 1 << 23
"""Bound on positions times largest K (at least 1) of a block, and on its prompt tokens: what decoding must be
ready to hold."""

DIGEST_BYTES = 4
"""Beginning of a dictionary's SHA-256: enough, since a stream holds 64 at most and no two of one digest."""

MAX_DICTIONARY_BYTES = MAX_PAYLOAD_BYTES
"""For the same reason as a payload."""

MAX_ATTACHMENT_BYTES = MAX_PAYLOAD_BYTES
"""Of what is kept about a stream under a name; for the same reason."""

_HEADER_FIELD = 1
_PAYLOAD_FIELD = 2


@dataclass(frozen=True, slots=True)
class BlockHeader:
    """What can be known about a block without decoding it."""

    format_version: int
    codec_mode: CodecMode
    trace_count: int
    prompt_token_count: int
    completion_token_count: int
    uncompressed_size_bytes: int
    """Version 1: of the payload's content. From version 2 on: of its metadata, 0 where they are stored as
    they are."""
    payload_xxh3: int
    """`checksum` of the payload's bytes as they travel."""
    dictionary_digest: bytes = b""
    """Names the dictionary that the payload needs, `DIGEST_BYTES` bytes; empty without."""


def dictionary_digest(data: bytes) -> bytes:
    """Name of a dictionary: the first `DIGEST_BYTES` of the SHA-256 of its bytes."""
    return hashlib.sha256(data).digest()[:DIGEST_BYTES]


def checksum(payload: bytes | memoryview, format_version: int = FORMAT_VERSION) -> int:
    """XXH3-64, seed 0, of a payload (https://github.com/Cyan4973/xxHash); from version 2 on its lower half.

    Half suffices on the way: who keeps blocks keeps 64 bits of each beside it, as `lynearm.traces` does.
    """
    whole = xxhash.xxh3_64_intdigest(payload)
    return whole if format_version == 1 else whole & 0xFFFFFFFF


def join_block(header: BlockHeader, payload: bytes) -> bytes:
    """A serialised `lynearm.v1.Block`.

    Raises:
        CodecError: if the payload is larger than `MAX_PAYLOAD_BYTES`.
    """
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise CodecError(
            f"a payload of {len(payload)} bytes exceeds the {MAX_PAYLOAD_BYTES} of a block",
            "put fewer traces into one block",
        )
    message = _header_to_proto(header).SerializeToString()
    return b"".join(
        (
            bytes_prefix(_HEADER_FIELD, len(message)),
            message,
            bytes_prefix(_PAYLOAD_FIELD, len(payload)),
            payload,
        )
    )


def split_block(data: bytes | memoryview) -> tuple[BlockHeader, memoryview]:
    """Header and payload of a block; the payload is a view into `data`.

    Reads the header but does not hash the payload: for blocks that were verified before.

    Raises:
        InvalidInputError: if the bytes are not a `lynearm.v1.Block` with both parts, once each.
        UnsupportedFormatError: if the format version or codec mode is not known here.
        CorruptBlockError: if a count or a size is out of bounds.
    """
    parts: dict[int, memoryview] = {}
    for number, value in read_fields(data):
        if number not in (_HEADER_FIELD, _PAYLOAD_FIELD):
            continue
        if number in parts:
            raise InvalidInputError(f"not a block: field {number} is there twice")
        parts[number] = expect_bytes(number, value)
    if len(parts) != 2:
        raise InvalidInputError("not a block: it lacks its header or its payload")
    header = _parse_header(parts[_HEADER_FIELD])
    _check_bounds(header, len(parts[_PAYLOAD_FIELD]))
    return header, parts[_PAYLOAD_FIELD]


def verify_block(data: bytes | memoryview) -> BlockHeader:
    """The header of a block whose payload matches its checksum.

    Raises:
        InvalidInputError: as for `split_block`, or if the block is too large for a message to its readers.
        UnsupportedFormatError: as for `split_block`.
        CorruptBlockError: if a count or size is out of bounds, or the checksum does not match.
    """
    if len(data) > MAX_BLOCK_BYTES:
        raise InvalidInputError(
            f"block of {len(data)} bytes, expected at most {MAX_BLOCK_BYTES}",
            "leave out of it what is neither header nor payload",
        )
    header, payload = split_block(data)
    found = checksum(payload, header.format_version)
    if found != header.payload_xxh3:
        raise CorruptBlockError(
            f"the payload's XXH3 is {found:x}, the header says {header.payload_xxh3:x}",
            "send or fetch the block again",
        )
    return header


MODE_TO_PROTO: dict[CodecMode, trace_pb2.CodecMode.ValueType] = {
    "exact": trace_pb2.CODEC_MODE_EXACT,
    "fine": trace_pb2.CODEC_MODE_FINE,
    "standard": trace_pb2.CODEC_MODE_STANDARD,
    "compact": trace_pb2.CODEC_MODE_COMPACT,
    "sampled": trace_pb2.CODEC_MODE_SAMPLED,
}
MODE_FROM_PROTO: dict[int, CodecMode] = {int(value): mode for mode, value in MODE_TO_PROTO.items()}


_USUAL_MODE = trace_pb2.CODEC_MODE_STANDARD
_USUAL_TRACE_COUNT = 1
"""From version 2 on they take no bytes: a streaming teacher's blocks are small, and mostly these."""


def _header_to_proto(header: BlockHeader) -> trace_pb2.BlockHeader:
    message = trace_pb2.BlockHeader(
        format_version=header.format_version,
        codec_mode=MODE_TO_PROTO[header.codec_mode],
        trace_count=header.trace_count,
        prompt_token_count=header.prompt_token_count,
        completion_token_count=header.completion_token_count,
        uncompressed_size_bytes=header.uncompressed_size_bytes,
        dictionary_digest=header.dictionary_digest,
    )
    if header.format_version == 1:
        message.payload_xxh3 = header.payload_xxh3
        return message
    message.payload_xxh3_low = header.payload_xxh3
    if message.codec_mode == _USUAL_MODE:
        message.ClearField("codec_mode")
    if message.trace_count == _USUAL_TRACE_COUNT:
        message.ClearField("trace_count")
    return message


def _parse_header(data: memoryview) -> BlockHeader:
    try:
        message = trace_pb2.BlockHeader.FromString(bytes(data))
    except DecodeError as error:
        raise InvalidInputError("not a block: its header is not a lynearm.v1.BlockHeader") from error
    if message.format_version == 0:
        raise InvalidInputError("not a block: its header names no format version")
    payload_xxh3 = message.payload_xxh3
    if message.format_version > 1:
        payload_xxh3 = message.payload_xxh3_low
        message.codec_mode = message.codec_mode or _USUAL_MODE
        message.trace_count = message.trace_count or _USUAL_TRACE_COUNT
    if message.format_version > FORMAT_VERSION or message.codec_mode not in MODE_FROM_PROTO:
        raise UnsupportedFormatError(
            f"block of format version {message.format_version}, codec mode {message.codec_mode}; "
            f"this package reads versions up to {FORMAT_VERSION} and modes {', '.join(CODEC_MODES)}",
            "upgrade lynearm",
        )
    return BlockHeader(
        format_version=message.format_version,
        codec_mode=MODE_FROM_PROTO[message.codec_mode],
        trace_count=message.trace_count,
        prompt_token_count=message.prompt_token_count,
        completion_token_count=message.completion_token_count,
        uncompressed_size_bytes=message.uncompressed_size_bytes,
        payload_xxh3=payload_xxh3,
        dictionary_digest=message.dictionary_digest,
    )


def _check_bounds(header: BlockHeader, payload_bytes: int) -> None:
    size = header.uncompressed_size_bytes
    if len(header.dictionary_digest) not in (0, DIGEST_BYTES):
        problem = (
            f"a dictionary digest of {len(header.dictionary_digest)} bytes, expected {DIGEST_BYTES} or none"
        )
    elif not 0 < header.trace_count <= MAX_TRACES:
        problem = f"{header.trace_count} traces, expected 1 to {MAX_TRACES}"
    elif not 0 < payload_bytes <= MAX_PAYLOAD_BYTES:
        problem = f"a payload of {payload_bytes} bytes, expected 1 to {MAX_PAYLOAD_BYTES}"
    elif size > MAX_UNCOMPRESSED_BYTES or (size == 0 and header.format_version == 1):
        problem = f"{size} bytes uncompressed, expected at most {MAX_UNCOMPRESSED_BYTES}, and 1 at least"
    else:
        return
    raise CorruptBlockError(f"block with {problem}")
