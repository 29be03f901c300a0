"""The blocks of a producer between `publish` and their durability; no I/O, no locks.

Invariants: blocks are sent in the order in which they were handed over, under consecutive sequence numbers.
A block stays here until the service says that it is durable; after a lost connection those that are still
here are sent again under the same numbers, and the service drops those that it has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from lynearm.v1 import trace_service_pb2 as pb
from lynearm.wire.blocks import MAX_BLOCK_BYTES
from lynearm.wire.errors import DeadlineError, InternalError, InvalidInputError
from lynearm.wire.frames import PublishOpen, frame_publish_open, publish_block_parts
from lynearm.wire.labels import TagSummary
from lynearm.wire.work import FinishedWork

DEFAULT_IN_FLIGHT_BYTES = 64 << 20
"""Eight groups of the server's: while some are on their way, others are written, committed and acknowledged.
With half of it a publisher waits for acknowledgements on a disk that is idle now and then."""

OPEN_SECONDS = 30.0
"""How long a connected service may take to answer the opening."""

FAREWELL_SECONDS = 5.0
"""How long an exception may be held up to save blocks that are on their way."""

BATCH_BYTES = 1 << 20
"""Blocks that wait are sent together, up to so many bytes. A message costs each side some 100 µs beside its
bytes; from here on that is little beside them."""

_MAX_MESSAGE_BYTES = (4 << 20) - 1024
"""gRPC's default limit of a message."""


@dataclass(frozen=True, slots=True)
class _Unacknowledged:
    sequence: int
    parts: tuple[bytes, ...]
    """Joined they are a message."""
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Finished:
    """What travels with a block and is committed with it."""

    prompt_ids: Sequence[str] = ()
    work: Sequence[FinishedWork] = ()
    tags: TagSummary | None = None


class ProducerWindow:
    """What one producer has handed over, and how far the service is with it.

    Args:
        stream: Name of the stream.
        producer_id: Name of the producer.
        max_in_flight_bytes: Blocks that may be here before `has_room` says no; one always may.
        labels: What the blocks are, for filters.
    """

    def __init__(
        self,
        stream: str,
        producer_id: str,
        max_in_flight_bytes: int,
        *,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        self.stream = stream
        self.producer_id = producer_id
        self.acked_blocks = 0
        self.in_flight_bytes = 0
        self.held_reason = ""
        """Why the service holds the next block back; empty when it does not."""
        self.is_open = False
        """Whether the service has answered the opening of this connection."""
        self._labels = dict(labels or {})
        self._max_in_flight_bytes = max_in_flight_bytes
        self._unacknowledged: deque[_Unacknowledged] = deque()
        self._last_sequence = 0
        self._sent_sequence = 0
        self._epoch = 0

    @property
    def is_empty(self) -> bool:
        """Whether every block is durable."""
        return not self._unacknowledged

    @property
    def has_more_to_send(self) -> bool:
        """Whether `take` gives a frame."""
        return self.is_open and self._sent_sequence < self._last_sequence

    def has_room(self, size_bytes: int) -> bool:
        """Whether a block of that size may be added."""
        return self.is_empty or self.in_flight_bytes + size_bytes <= self._max_in_flight_bytes

    def add(self, block: bytes, finished: Finished) -> None:
        """Take a block over.

        Raises:
            InvalidInputError: if block and ids do not fit into one message.
        """
        parts = publish_block_parts(
            self._last_sequence + 1,
            block,
            finished.prompt_ids,
            finished_work=finished.work,
            tags=finished.tags,
        )
        size_bytes = sum(map(len, parts))
        if size_bytes > _MAX_MESSAGE_BYTES:
            raise InvalidInputError(
                f"a block with the prompts that it finishes is {size_bytes} bytes, "
                f"expected at most {_MAX_MESSAGE_BYTES}",
                "put fewer traces into one block",
            )
        self._last_sequence += 1
        self._unacknowledged.append(_Unacknowledged(self._last_sequence, parts, size_bytes))
        self.in_flight_bytes += size_bytes

    def reopen(self) -> bytes:
        """First message of a new connection; the blocks follow once it is answered."""
        self.is_open = False
        self.held_reason = ""
        return frame_publish_open(PublishOpen(self.stream, self.producer_id, self._epoch, self._labels))

    def take(self) -> bytes | None:
        """Next message to send on this connection; None while there is none."""
        if not self.has_more_to_send:
            return None
        parts: list[bytes] = []
        left_bytes = BATCH_BYTES
        first = self._sent_sequence + 1 - self._unacknowledged[0].sequence
        for pending in islice(self._unacknowledged, first, None):
            left_bytes -= pending.size_bytes
            if parts and left_bytes < 0:
                break
            parts += pending.parts
            self._sent_sequence = pending.sequence
        return b"".join(parts)

    def receive(self, response: pb.PublishResponse) -> bool:
        """Note what the service said.

        Returns:
            Whether that is progress. It is not when a service merely answers: one whose disk is full does,
            and then refuses the same blocks.

        Raises:
            InternalError: if it has blocks that this producer never sent, or lost some that it had.
        """
        before = self.acked_blocks
        if response.WhichOneof("message") == "opened":
            self._opened(response.opened)
            return self.is_empty or self.acked_blocks > before
        if response.WhichOneof("message") == "held":
            self.held_reason = (
                f"consumer {response.held.consumer!r} is {response.held.lag_blocks} blocks and "
                f"{response.held.lag_traces} traces behind, as far as the stream allows"
            )
            return False
        self.held_reason = ""
        self._acknowledge(response.ack.first_sequence + len(response.ack.offsets) - 1)
        return self.acked_blocks > before

    def overdue(self, timeout_seconds: float | None, reason: str) -> DeadlineError:
        """What to raise when the blocks did not become durable in time.

        Args:
            timeout_seconds: How long was waited.
            reason: Why nothing can be sent; empty if something can.
        """
        return DeadlineError(
            f"stream {self.stream!r}: {len(self._unacknowledged)} blocks were not acknowledged "
            f"within {timeout_seconds or 0.0:g} s",
            reason or "look at the trace service's log",
        )

    @property
    def progress(self) -> str:
        """How far it is, in a few words."""
        return f"{self.acked_blocks} blocks durable, {self.in_flight_bytes} bytes in flight"

    def __len__(self) -> int:
        return len(self._unacknowledged)

    def _opened(self, opened: pb.PublishOpened) -> None:
        self._epoch = opened.epoch
        if opened.next_sequence > self._last_sequence + 1:
            raise InternalError(
                f"stream {self.stream!r}: the service has block {opened.next_sequence - 1} "
                f"of this producer, which sent {self._last_sequence}"
            )
        if opened.next_sequence <= self.acked_blocks:
            raise InternalError(
                f"stream {self.stream!r}: the service has lost blocks of this producer that it had "
                f"acknowledged: {self.acked_blocks} were, it has {opened.next_sequence - 1}",
                "was its data restored from an older copy? then publish the missing traces anew",
            )
        self._acknowledge(opened.next_sequence - 1)
        self._sent_sequence = opened.next_sequence - 1
        self.is_open = True

    def _acknowledge(self, sequence: int) -> None:
        while self._unacknowledged and self._unacknowledged[0].sequence <= sequence:
            self.in_flight_bytes -= self._unacknowledged.popleft().size_bytes
            self.acked_blocks += 1


def check_block(block: bytes) -> None:
    """Refuse a block that no service takes.

    Raises:
        InvalidInputError: if it is too large.
    """
    if len(block) > MAX_BLOCK_BYTES:
        raise InvalidInputError(
            f"block of {len(block)} bytes, expected at most {MAX_BLOCK_BYTES}",
            "put fewer traces into one block",
        )


def too_late(stream: str) -> InternalError:
    """What `publish` raises after `close`."""
    return InternalError(f"publish to stream {stream!r} after close")
