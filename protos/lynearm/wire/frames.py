"""Hand framing of the messages that carry blocks, for gRPC methods with identity serialisers.

Each function reads or writes one message of `trace_service.proto`; generated code reads what these
write and writes what these read. The embedded message `Block` is never parsed here: its bytes pass
through as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from lynearm.v1 import trace_service_pb2
from lynearm.wire.errors import InvalidInputError
from lynearm.wire.fields import bytes_prefix, expect_bytes, expect_int, int_field, read_fields
from lynearm.wire.labels import TagSummary, check_producer_labels, parse_summary, summary_to_proto
from lynearm.wire.work import (
    FinishedWork,
    check_prompt_id,
    finished_work_to_proto,
    parse_finished_work,
)

_OPEN_FIELD = 1
_BLOCKS_FIELD = 2
_DAMAGE_FIELD = 15

MAX_FINISHED_PROMPTS = 1 << 16
"""Prompt ids, and samples of leased prompts, that one block may finish."""


@dataclass(frozen=True, slots=True)
class PublishOpen:
    """First message of a publisher: who it is and where its blocks go."""

    stream: str
    producer_id: str
    epoch: int = 0
    """0 asks for the next epoch."""
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    """What the producer's blocks are, for filters."""
    no_wait: bool = False
    """Fail where a block would have to wait for consumers."""


@dataclass(frozen=True, slots=True)
class PublishBlock:
    """One block of a later message of a publisher."""

    sequence: int
    """From 1 without gaps."""
    block: memoryview
    """A serialised `Block`; a view into the received message."""
    finished_prompt_ids: tuple[str, ...] = ()
    finished_work: tuple[FinishedWork, ...] = ()
    """Of different leases."""
    tags: TagSummary | None = None
    """None: not known."""


@dataclass(frozen=True, slots=True)
class SubscribedBlock:
    """A block that a subscription or a fetch delivered."""

    offset: int
    block: memoryview
    """A serialised `Block`; a view into the received message."""
    next_offset: int
    """The stream's next offset when this was sent; 0 in an answer to a fetch."""
    skipped: int = 0
    """Blocks that a filter passed over right before this one."""
    used_traces: int = 0
    """Traces of this block that the cursor at which the subscription began has used."""
    damage: str = ""
    """Why the block is left out, and empty; only for subscribers that asked to skip damaged blocks."""


@dataclass(frozen=True, slots=True)
class SkippedBlocks:
    """Word that a filter passed over blocks, and that no other follows yet."""

    offset: int
    """The first offset that is not passed over."""
    next_offset: int
    """The stream's next offset when this was sent."""
    skipped: int
    """Blocks passed over right before `offset`, since the message before."""


def frame_publish_open(opening: PublishOpen) -> bytes:
    """A `PublishRequest` that opens a producer."""
    message = trace_service_pb2.PublishOpen(
        stream=opening.stream,
        producer_id=opening.producer_id,
        epoch=opening.epoch,
        labels=dict(opening.labels),
        no_wait=opening.no_wait,
    )
    return trace_service_pb2.PublishRequest(open=message).SerializeToString()


def publish_block_parts(
    sequence: int,
    block: bytes,
    finished_prompt_ids: Sequence[str] = (),
    *,
    finished_work: Sequence[FinishedWork] = (),
    tags: TagSummary | None = None,
) -> tuple[bytes, bytes, bytes]:
    """A `PublishRequest` that carries a block, in pieces to be joined.

    Joined with those of other blocks, in their order, they are one request that carries all of them.
    """
    head = int_field(1, sequence) + bytes_prefix(2, len(block))
    parts = [(3, prompt_id.encode()) for prompt_id in finished_prompt_ids]
    parts += [(4, finished_work_to_proto(work).SerializeToString()) for work in finished_work]
    if tags is not None:
        parts.append((5, summary_to_proto(tags).SerializeToString()))
    tail = b"".join(bytes_prefix(number, len(encoded)) + encoded for number, encoded in parts)
    size = len(head) + len(block) + len(tail)
    return bytes_prefix(_BLOCKS_FIELD, size) + head, block, tail


def parse_publish_request(data: bytes) -> PublishOpen | tuple[PublishBlock, ...]:
    """What a publisher sent; views into `data`.

    Raises:
        InvalidInputError: if it is not a `PublishRequest` that holds one open, or else blocks.
    """
    fields = [(number, expect_bytes(number, value)) for number, value in read_fields(data)]
    numbers = {number for number, _ in fields}
    if numbers == {_BLOCKS_FIELD}:
        return tuple(_parse_block(body) for _, body in fields)
    if numbers == {_OPEN_FIELD} and len(fields) == 1:
        return _parse_open(fields[0][1])
    raise InvalidInputError("PublishRequest holds neither an open nor blocks, or both")


def frame_subscribe_response(
    offset: int, block: bytes | memoryview, next_offset: int, *, skipped: int = 0, used_traces: int = 0
) -> bytes:
    """A `SubscribeResponse` that carries a block."""
    head = (int_field(1, offset), bytes_prefix(2, len(block)), block, int_field(3, next_offset))
    if not skipped and not used_traces:
        return b"".join(head)
    return b"".join((*head, int_field(4, skipped), int_field(5, used_traces)))


def frame_skipped(skipped: SkippedBlocks) -> bytes:
    """A `SubscribeResponse` without a block."""
    return int_field(1, skipped.offset) + int_field(3, skipped.next_offset) + int_field(4, skipped.skipped)


def frame_damaged_block(offset: int, damage: str, next_offset: int, *, skipped: int = 0) -> bytes:
    """A `SubscribeResponse` that names a block in place of carrying it."""
    reason = damage.encode()
    head = int_field(1, offset) + int_field(3, next_offset) + int_field(4, skipped)
    return b"".join((head, bytes_prefix(_DAMAGE_FIELD, len(reason)), reason))


def frame_fetch_response(offset: int, block: bytes | memoryview) -> bytes:
    """A `FetchBlocksResponse`: the same fields as a `SubscribeResponse`, without next_offset."""
    return frame_subscribe_response(offset, block, 0)


def parse_subscribe_response(data: bytes) -> SubscribedBlock | SkippedBlocks:
    """A `SubscribeResponse`; the block is a view into `data`.

    Raises:
        InvalidInputError: if the bytes are not such a message, or neither hold nor pass over a block.
    """
    damage = ""
    block: memoryview | None = None
    numbers = dict.fromkeys((1, 3, 4, 5), 0)
    for number, value in read_fields(data):
        if number == 2:
            block = expect_bytes(number, value)
        elif number in numbers:
            numbers[number] = expect_int(number, value)
        elif number == _DAMAGE_FIELD:
            damage = str(expect_bytes(number, value), "utf-8", "replace")
    offset, next_offset, skipped, used_traces = numbers.values()
    if block is not None or damage:
        return SubscribedBlock(offset, block or memoryview(b""), next_offset, skipped, used_traces, damage)
    if not skipped:
        raise InvalidInputError("the response holds no block")
    return SkippedBlocks(offset, next_offset, skipped)


def parse_fetch_response(data: bytes) -> SubscribedBlock:
    """A `FetchBlocksResponse`; `next_offset` is 0.

    Raises:
        InvalidInputError: as for `parse_subscribe_response`.
    """
    fetched = parse_subscribe_response(data)
    if not isinstance(fetched, SubscribedBlock):
        raise InvalidInputError("the response holds no block")
    return fetched


def _parse_open(body: memoryview) -> PublishOpen:
    try:
        message = trace_service_pb2.PublishOpen.FromString(bytes(body))
    except DecodeError as error:
        raise InvalidInputError("PublishRequest.open is not a PublishOpen") from error
    return PublishOpen(
        stream=message.stream,
        producer_id=message.producer_id,
        epoch=message.epoch,
        labels=check_producer_labels(dict(message.labels)),
        no_wait=message.no_wait,
    )


def _parse_block(body: memoryview) -> PublishBlock:
    sequence = 0
    block: memoryview | None = None
    finished: list[str] = []
    work: list[FinishedWork] = []
    tags: TagSummary | None = None
    for number, value in read_fields(body):
        if number == 1:
            sequence = expect_int(number, value)
        elif number == 2:
            block = expect_bytes(number, value)
        elif number == 3:
            finished.append(_prompt_id(expect_bytes(number, value)))
        elif number == 4:
            work.append(parse_finished_work(bytes(expect_bytes(number, value))))
        elif number == 5:
            tags = parse_summary(bytes(expect_bytes(number, value)))
    if sequence == 0 or block is None:
        raise InvalidInputError("PublishBlock lacks its sequence number or its block")
    _check_finished(finished, work)
    return PublishBlock(sequence, block, tuple(finished), tuple(work), tags)


def _check_finished(prompt_ids: Sequence[str], work: Sequence[FinishedWork]) -> None:
    samples = sum(len(prompt.sample_indices) for of_lease in work for prompt in of_lease.prompts)
    if len(prompt_ids) + samples > MAX_FINISHED_PROMPTS:
        raise InvalidInputError(
            f"a block finishes {len(prompt_ids)} prompts and {samples} samples, "
            f"at most {MAX_FINISHED_PROMPTS} may be"
        )
    if len({of_lease.lease.lease_id for of_lease in work}) < len(work):
        raise InvalidInputError("a block names a lease twice", "put all its units into one FinishedWork")


def _prompt_id(data: memoryview) -> str:
    try:
        return check_prompt_id(str(data, "utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidInputError("a prompt id is not UTF-8") from error
