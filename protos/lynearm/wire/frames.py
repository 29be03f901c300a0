"""Hand framing of the messages that carry blocks, for gRPC methods with identity serialisers.

Each function reads or writes one message of `trace_service.proto`; generated code reads what these
write and writes what these read. The embedded message `Block` is never parsed here: its bytes pass
through as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from lynearm.v1 import trace_service_pb2
from lynearm.wire.errors import InvalidInputError
from lynearm.wire.fields import bytes_prefix, expect_bytes, expect_int, int_field, read_fields

_OPEN_FIELD = 1
_BLOCK_FIELD = 2
_DAMAGE_FIELD = 15

MAX_FINISHED_PROMPTS = 1 << 16
"""Prompt ids that one block may finish."""

MAX_PROMPT_ID_BYTES = 256


@dataclass(frozen=True, slots=True)
class PublishOpen:
    """First message of a publisher: who it is and where its blocks go."""

    stream: str
    producer_id: str
    epoch: int = 0
    """0 asks for the next epoch."""


@dataclass(frozen=True, slots=True)
class PublishBlock:
    """Every later message of a publisher."""

    sequence: int
    """From 1 without gaps."""
    block: memoryview
    """A serialised `Block`; a view into the received message."""
    finished_prompt_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SubscribedBlock:
    """A block that a subscription or a fetch delivered."""

    offset: int
    block: memoryview
    """A serialised `Block`; a view into the received message."""
    next_offset: int
    """The stream's next offset when this was sent; 0 in an answer to a fetch."""
    damage: str = ""
    """Why the block is left out, and empty; only for subscribers that asked to skip damaged blocks."""


def frame_publish_open(opening: PublishOpen) -> bytes:
    """A `PublishRequest` that opens a producer."""
    message = trace_service_pb2.PublishOpen(
        stream=opening.stream, producer_id=opening.producer_id, epoch=opening.epoch
    )
    return trace_service_pb2.PublishRequest(open=message).SerializeToString()


def frame_publish_block(
    sequence: int, block: bytes | memoryview, finished_prompt_ids: Sequence[str] = ()
) -> bytes:
    """A `PublishRequest` that carries a block."""
    head = int_field(1, sequence) + bytes_prefix(2, len(block))
    tail = b"".join(
        bytes_prefix(3, len(encoded)) + encoded for encoded in (one.encode() for one in finished_prompt_ids)
    )
    size = len(head) + len(block) + len(tail)
    return b"".join((bytes_prefix(_BLOCK_FIELD, size), head, block, tail))


def parse_publish_request(data: bytes) -> PublishOpen | PublishBlock:
    """What a publisher sent; views into `data`.

    Raises:
        InvalidInputError: if it is not a `PublishRequest` that holds exactly one message.
    """
    fields = list(read_fields(data))
    if len(fields) != 1 or fields[0][0] not in (_OPEN_FIELD, _BLOCK_FIELD):
        raise InvalidInputError("PublishRequest holds neither an open nor a block, or more than one")
    number, value = fields[0]
    body = expect_bytes(number, value)
    return _parse_open(body) if number == _OPEN_FIELD else _parse_block(body)


def frame_subscribe_response(offset: int, block: bytes | memoryview, next_offset: int) -> bytes:
    """A `SubscribeResponse`."""
    return b"".join((int_field(1, offset), bytes_prefix(2, len(block)), block, int_field(3, next_offset)))


def frame_damaged_block(offset: int, damage: str, next_offset: int) -> bytes:
    """A `SubscribeResponse` that names a block in place of carrying it."""
    reason = damage.encode()
    head = int_field(1, offset) + int_field(3, next_offset)
    return b"".join((head, bytes_prefix(_DAMAGE_FIELD, len(reason)), reason))


def frame_fetch_response(offset: int, block: bytes | memoryview) -> bytes:
    """A `FetchBlocksResponse`: the same fields as a `SubscribeResponse`, without next_offset."""
    return frame_subscribe_response(offset, block, 0)


def parse_subscribe_response(data: bytes) -> SubscribedBlock:
    """A `SubscribeResponse`; the block is a view into `data`.

    Raises:
        InvalidInputError: if the bytes are not such a message or hold no block.
    """
    offset = next_offset = 0
    damage = ""
    block: memoryview | None = None
    for number, value in read_fields(data):
        if number == 1:
            offset = expect_int(number, value)
        elif number == 2:
            block = expect_bytes(number, value)
        elif number == 3:
            next_offset = expect_int(number, value)
        elif number == _DAMAGE_FIELD:
            damage = str(expect_bytes(number, value), "utf-8", "replace")
    if block is None and not damage:
        raise InvalidInputError("the response holds no block")
    return SubscribedBlock(offset, block or memoryview(b""), next_offset, damage)


def parse_fetch_response(data: bytes) -> SubscribedBlock:
    """A `FetchBlocksResponse`; `next_offset` is 0.

    Raises:
        InvalidInputError: as for `parse_subscribe_response`.
    """
    return parse_subscribe_response(data)


def _parse_open(body: memoryview) -> PublishOpen:
    try:
        message = trace_service_pb2.PublishOpen.FromString(bytes(body))
    except DecodeError as error:
        raise InvalidInputError("PublishRequest.open is not a PublishOpen") from error
    return PublishOpen(stream=message.stream, producer_id=message.producer_id, epoch=message.epoch)


def _parse_block(body: memoryview) -> PublishBlock:
    sequence = 0
    block: memoryview | None = None
    finished: list[str] = []
    for number, value in read_fields(body):
        if number == 1:
            sequence = expect_int(number, value)
        elif number == 2:
            block = expect_bytes(number, value)
        elif number == 3:
            finished.append(_prompt_id(expect_bytes(number, value)))
    if sequence == 0 or block is None:
        raise InvalidInputError("PublishBlock lacks its sequence number or its block")
    if len(finished) > MAX_FINISHED_PROMPTS:
        raise InvalidInputError(
            f"a block finishes {len(finished)} prompts, at most {MAX_FINISHED_PROMPTS} may be"
        )
    return PublishBlock(sequence, block, tuple(finished))


def _prompt_id(data: memoryview) -> str:
    if not 0 < len(data) <= MAX_PROMPT_ID_BYTES:
        raise InvalidInputError(f"a prompt id of {len(data)} bytes, expected 1 to {MAX_PROMPT_ID_BYTES}")
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInputError("a prompt id is not UTF-8") from error
