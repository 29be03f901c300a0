"""Publishes blocks so that each is stored once, whatever happens to the connection.

Invariants: blocks are stored in the order of `publish`. A block stays in memory until the service
says that it is durable; after a lost connection the unacknowledged ones are sent again under the
same sequence numbers, and the service drops those that it has. `publish` waits while too many
bytes are in flight: that is the backpressure on whoever produces.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc

from lynearm.client.connection import Backoff, Connection, ResponseStream, is_transient
from lynearm.v1 import trace_service_pb2
from lynearm.wire.blocks import MAX_BLOCK_BYTES
from lynearm.wire.errors import DeadlineError, InternalError, InvalidInputError, LynearmError
from lynearm.wire.frames import PublishOpen, frame_publish_block, frame_publish_open

logger = logging.getLogger(__name__)

DEFAULT_IN_FLIGHT_BYTES = 16 << 20
"""Sixty blocks of 256 KB: more than a group commit takes in one go."""

_MAX_MESSAGE_BYTES = (4 << 20) - 1024
"""gRPC's default limit of a message."""

_OPEN_SECONDS = 30.0
"""How long a connected service may take to answer the opening."""

_FAREWELL_SECONDS = 5.0
"""How long an exception may be held up to save blocks that are on their way."""


@dataclass(frozen=True, slots=True)
class _Unacknowledged:
    sequence: int
    frame: bytes


class Publisher:
    """A producer of one stream. Made by `TraceClient.publisher`; use it as a context manager.

    One thread publishes; a thread of the publisher's own sends, and reads what became durable.
    """

    def __init__(
        self,
        connection: Connection,
        stream: str,
        producer_id: str,
        *,
        max_in_flight_bytes: int,
        patience_seconds: float,
    ) -> None:
        self.stream = stream
        self.producer_id = producer_id
        self._connection = connection
        self._max_in_flight_bytes = max_in_flight_bytes
        self._backoff = Backoff(patience_seconds)
        self._changed = threading.Condition()
        # Everything below is guarded by _changed.
        self._unacknowledged: deque[_Unacknowledged] = deque()
        self._in_flight_bytes = 0
        self._last_sequence = 0
        self._sent_sequence = 0
        self._acked_blocks = 0
        self._epoch = 0
        self._waiting_seconds = 0.0
        self._opened = False
        self._closing = False
        self._error: LynearmError | None = None
        self._waiting_reason = ""
        self._call: ResponseStream[trace_service_pb2.PublishResponse] | None = None
        self._thread = threading.Thread(target=self._run, name=f"publish-{stream}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        """The publisher itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait until all is durable; after an exception, for a few seconds only."""
        if error is None:
            self.close()
            return
        try:
            self.close(timeout_seconds=_FAREWELL_SECONDS)
        except LynearmError:
            logger.warning(
                "stream %s: %d blocks were not acknowledged", self.stream, len(self._unacknowledged)
            )

    @property
    def acked_blocks(self) -> int:
        """Blocks of this publisher that are durable."""
        return self._acked_blocks

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of blocks that are not known to be durable yet."""
        return self._in_flight_bytes

    @property
    def waiting_seconds(self) -> float:
        """How long `publish` has waited for room, in all."""
        return self._waiting_seconds

    @property
    def waiting_reason(self) -> str:
        """Why nothing gets through right now; empty again with the next acknowledgement."""
        return self._waiting_reason

    def publish(self, block: bytes, finished_prompt_ids: Sequence[str] = ()) -> None:
        """Hand over a block; returns when it is queued, not when it is durable.

        Args:
            block: A serialised block.
            finished_prompt_ids: Prompts whose last trace is in this block; committed with it.

        Raises:
            InvalidInputError: if block and ids do not fit into one message.
            StreamNotFoundError, StreamSealedError, ProducerFencedError, …: what the service said to
                this block or to an earlier one. The publisher is of no more use then.
        """
        if len(block) > MAX_BLOCK_BYTES:
            raise InvalidInputError(
                f"block of {len(block)} bytes, expected at most {MAX_BLOCK_BYTES}",
                "put fewer traces into one block",
            )
        with self._changed:
            self._wait_for_room(len(block))
            frame = frame_publish_block(self._last_sequence + 1, block, finished_prompt_ids)
            if len(frame) > _MAX_MESSAGE_BYTES:
                raise InvalidInputError(
                    f"a block with its {len(finished_prompt_ids)} prompt ids is {len(frame)} bytes, "
                    f"expected at most {_MAX_MESSAGE_BYTES}",
                    "put fewer traces into one block",
                )
            self._last_sequence += 1
            self._unacknowledged.append(_Unacknowledged(self._last_sequence, frame))
            self._in_flight_bytes += len(frame)
            self._changed.notify_all()

    def flush(self, timeout_seconds: float | None = None) -> None:
        """Wait until every block is durable.

        Raises:
            DeadlineError: if that took longer than `timeout_seconds`.
            LynearmError: as for `publish`.
        """
        with self._changed:
            done = self._changed.wait_for(
                lambda: not self._unacknowledged or self._error is not None, timeout_seconds
            )
            self._raise_error()
            if not done:
                raise DeadlineError(
                    f"stream {self.stream!r}: {len(self._unacknowledged)} blocks were not acknowledged "
                    f"within {timeout_seconds:g} s",
                    self._waiting_reason or "look at the trace service's log",
                )

    def close(self, timeout_seconds: float | None = None) -> None:
        """Flush, then leave. Idempotent.

        Raises:
            LynearmError: as for `flush`; the connection is given up all the same.
        """
        try:
            self.flush(timeout_seconds)
        finally:
            with self._changed:
                self._closing = True
                call = self._call if self._unacknowledged or not self._opened else None
                self._changed.notify_all()
            if call is not None:
                call.cancel()
            self._thread.join(_FAREWELL_SECONDS)

    def _wait_for_room(self, size_bytes: int) -> None:
        started = time.monotonic()
        self._changed.wait_for(
            lambda: (
                self._error is not None
                or self._closing
                or not self._unacknowledged
                or self._in_flight_bytes + size_bytes <= self._max_in_flight_bytes
            )
        )
        self._waiting_seconds += time.monotonic() - started
        self._raise_error()
        if self._closing:
            raise InternalError(f"publish to stream {self.stream!r} after close")

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            pause_seconds = self._connect_once()
            with self._changed:
                if pause_seconds is None or self._changed.wait_for(lambda: self._closing, pause_seconds):
                    return

    def _connect_once(self) -> float | None:
        """One connection, from opening to end; the seconds to wait before the next, None for the last."""
        finished = threading.Event()
        with self._changed:
            # Before there is a call, whose sending thread would else go on where the last one stopped.
            self._opened = False
        call = self._connection.publish(self._requests(finished))
        with self._changed:
            self._call = call
        # A service that hangs would otherwise hold the opening for ever.
        watchdog = threading.Timer(_OPEN_SECONDS, call.cancel)
        watchdog.daemon = True
        watchdog.start()
        try:
            for response in call:
                watchdog.cancel()
                self._receive(response)
        except grpc.RpcError as failure:
            return self._disconnected(failure)
        except LynearmError as error:
            call.cancel()
            self._fail(error)
        finally:
            watchdog.cancel()
            with self._changed:
                finished.set()
                self._changed.notify_all()
        with self._changed:
            closed_by_service = not self._closing and self._error is None
        return self._backoff.failed() if closed_by_service else None

    def _requests(self, finished: threading.Event) -> Iterator[bytes]:
        """What is sent on one connection: the opening, then every block that is not acknowledged."""
        yield frame_publish_open(PublishOpen(self.stream, self.producer_id, self._epoch))
        while True:
            with self._changed:
                self._changed.wait_for(lambda: finished.is_set() or self._closing or self._next_to_send())
                if finished.is_set():
                    return
                pending = self._next_to_send()
                if pending is None:
                    return
                self._sent_sequence = pending.sequence
            yield pending.frame

    def _next_to_send(self) -> _Unacknowledged | None:
        if not self._opened or self._sent_sequence >= self._last_sequence:
            return None
        return self._unacknowledged[self._sent_sequence + 1 - self._unacknowledged[0].sequence]

    def _receive(self, response: trace_service_pb2.PublishResponse) -> None:
        with self._changed:
            if response.WhichOneof("message") == "opened":
                self._epoch = response.opened.epoch
                if response.opened.next_sequence > self._last_sequence + 1:
                    raise InternalError(
                        f"stream {self.stream!r}: the service has block {response.opened.next_sequence - 1} "
                        f"of this producer, which sent {self._last_sequence}"
                    )
                if response.opened.next_sequence <= self._acked_blocks:
                    raise InternalError(
                        f"stream {self.stream!r}: the service has lost blocks of this producer that it had "
                        f"acknowledged: {self._acked_blocks} were, "
                        f"it has {response.opened.next_sequence - 1}",
                        "was its data restored from an older copy? then publish the missing traces anew",
                    )
                self._acknowledge(response.opened.next_sequence - 1)
                self._sent_sequence = response.opened.next_sequence - 1
                self._opened = True
                if not self._unacknowledged:
                    self._progressed()
            else:
                self._acknowledge(response.ack.first_sequence + len(response.ack.offsets) - 1)
            self._changed.notify_all()

    def _acknowledge(self, sequence: int) -> None:
        while self._unacknowledged and self._unacknowledged[0].sequence <= sequence:
            self._in_flight_bytes -= len(self._unacknowledged.popleft().frame)
            self._acked_blocks += 1
            self._progressed()

    def _progressed(self) -> None:
        # Not when a service merely answers: one whose disk is full does, and then refuses the same blocks.
        self._waiting_reason = ""
        self._backoff.succeeded()

    def _disconnected(self, failure: grpc.RpcError) -> float | None:
        error = self._connection.error(failure)
        pause_seconds = self._backoff.failed()
        with self._changed:
            if self._closing:
                return None
            if is_transient(failure) and not self._backoff.spent:
                if not self._waiting_reason:
                    logger.warning("stream %s: waiting to publish: %s", self.stream, error.message)
                self._waiting_reason = error.message
                return pause_seconds
        self._fail(error)
        return None

    def _fail(self, error: LynearmError) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()
