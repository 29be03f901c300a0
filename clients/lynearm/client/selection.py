"""What a subscription asks for, and whether what comes is what is due; no I/O.

Invariants: of the blocks from the start on, each is delivered once, in offset order, or passed over because
it holds no trace that is wanted. The position moves over what was passed over, so that a reader who resumes
does not see it again.
"""

from __future__ import annotations

from dataclasses import dataclass

from lynearm.v1 import consumer_pb2
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.wire.errors import InternalError
from lynearm.wire.frames import SkippedBlocks, SubscribedBlock
from lynearm.wire.labels import TraceFilter, filter_to_proto
from lynearm.wire.traces import Cursor


@dataclass(frozen=True, slots=True)
class Selection:
    """The part of a stream that a subscription reads."""

    stream: str
    start: Cursor
    follow: bool
    """Wait for more until the stream is sealed."""
    credit_bytes: int
    wanted: TraceFilter | None = None
    """Only blocks in which a trace may match; None: all."""
    skip_damaged: bool = False
    """Leave out blocks that are damaged in the service's store."""

    def open(self, next_offset: int) -> pb.SubscribeRequest:
        """First message of a connection that goes on at `next_offset`."""
        opening = pb.SubscribeOpen(
            stream=self.stream,
            follow=self.follow,
            credit_bytes=self.credit_bytes,
            skip_damaged=self.skip_damaged,
        )
        if self.start.trace_index and next_offset == self.start.offset:
            cursor = consumer_pb2.Cursor(offset=self.start.offset, trace_index=self.start.trace_index)
            opening.cursor.CopyFrom(cursor)
        else:
            opening.start_offset = next_offset
        if self.wanted is not None:
            opening.filter.CopyFrom(filter_to_proto(self.wanted))
        return pb.SubscribeRequest(open=opening)


def advance(stream: str, next_offset: int, received: SubscribedBlock | SkippedBlocks) -> int:
    """The offset that is due after a message.

    Args:
        stream: Name of the stream.
        next_offset: The offset that was due before.
        received: The message.

    Raises:
        InternalError: it is not what was due.
    """
    due = next_offset + received.skipped
    if received.offset != due:
        raise InternalError(f"stream {stream!r}: block {received.offset} came where {due} was due")
    return due + isinstance(received, SubscribedBlock)
