"""Where a reader of a stream is, and what it tells the service; no I/O, no locks.

Invariants: blocks are taken in offset order without gaps, each once. The service sends no further ahead of
the reader than the credit, which is renewed as blocks are taken.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import grpc

from lynearm.client.retries import Retries, is_deadline
from lynearm.client.selection import Selection, advance
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.wire.errors import InternalError, OffsetNotFoundError
from lynearm.wire.frames import SubscribedBlock, parse_fetch_response, parse_subscribe_response

logger = logging.getLogger(__name__)

DEFAULT_CREDIT_BYTES = 8 << 20
"""Thirty blocks of 256 KB."""


@dataclass(frozen=True, slots=True)
class ReceivedBlock:
    """A block as it came from the service."""

    offset: int
    block: memoryview
    """A serialised block; `lynearm.wire.codec.decode_block` reads it."""
    next_offset: int
    """The stream's next offset when this was sent; 0 for a fetched block."""
    used_traces: int = 0
    """Traces of this block that the cursor at which the subscription began has used."""

    def __repr__(self) -> str:
        return f"ReceivedBlock(offset={self.offset}, {len(self.block)} bytes)"


class SubscriptionPosition:
    """The next block of a subscription, and the credit that its connection has left.

    Args:
        selection: What is read.
    """

    def __init__(self, selection: Selection) -> None:
        self.stream = selection.stream
        self.next_offset = selection.start.offset
        """Every block before it was given, or held nothing wanted."""
        self._selection = selection
        self._taken_bytes = 0
        self.damaged_offsets: list[int] = []
        """Of the blocks that were skipped."""

    def open(self) -> pb.SubscribeRequest:
        """First message of a connection."""
        self._taken_bytes = 0
        return self._selection.open(self.next_offset)

    def take(self, data: bytes) -> ReceivedBlock | None:
        """The block in a response, the next one being due then; None where blocks were only passed over.

        A damaged block that is skipped is passed over too.

        Raises:
            InternalError: if it is not the block that is due.
        """
        received = parse_subscribe_response(data)
        self.next_offset = advance(self.stream, self.next_offset, received)
        if not isinstance(received, SubscribedBlock):
            return None
        if received.damage:
            logger.error("skipping a block: %s", received.damage)
            self.damaged_offsets.append(received.offset)
            return None
        self._taken_bytes += len(received.block)
        return ReceivedBlock(received.offset, received.block, received.next_offset, received.used_traces)

    def grant(self) -> pb.SubscribeRequest | None:
        """What renews the credit, when it is time to."""
        # A message for each block would cost as much as the block: renew half at a time, while the other half
        # is on its way.
        if self._taken_bytes * 2 < self._selection.credit_bytes:
            return None
        taken, self._taken_bytes = self._taken_bytes, 0
        return pb.SubscribeRequest(credit_bytes=taken)


class FetchPosition:
    """How much of a range of blocks has come.

    Args:
        stream: Name of the stream.
        offset: Of the first block.
        count: Of blocks.
    """

    def __init__(self, stream: str, offset: int, count: int) -> None:
        self.stream = stream
        self._offset = offset
        self._count = count
        self._has_progressed = False
        self._has_started = False

    @property
    def is_complete(self) -> bool:
        """Whether every block came."""
        return self._has_started and self._count <= 0

    def open(self) -> pb.FetchBlocksRequest:
        """What asks for the rest."""
        self._has_progressed = False
        return pb.FetchBlocksRequest(stream=self.stream, offset=self._offset, count=self._count)

    def take(self, data: bytes) -> ReceivedBlock:
        """The block in a response.

        Raises:
            InternalError: if it is not the block that is due.
        """
        fetched = parse_fetch_response(data)
        if fetched.offset != self._offset:
            raise InternalError(
                f"stream {self.stream!r}: block {fetched.offset} came where {self._offset} was due"
            )
        self._offset += 1
        self._count -= 1
        self._has_progressed = self._has_started = True
        return ReceivedBlock(fetched.offset, fetched.block, fetched.next_offset)

    def failed(self, failure: grpc.RpcError, target: str, retries: Retries) -> float | None:
        """What to do after a failure: wait so many seconds and ask for the rest, or end.

        Raises:
            LynearmError: as for `Retries.failed`.
        """
        if self._has_progressed and is_deadline(failure):
            return 0.0  # the deadline of a call that takes long, not of a service that hangs
        try:
            return retries.failed(failure, target)
        except OffsetNotFoundError:
            if self._has_started:  # the stream ends where the call broke off
                return None
            raise
