"""Publishes blocks so that each is stored once, whatever happens to the connection.

`ProducerWindow` says what is sent and when; here are the thread that does it, and those who wait for it.
`publish` waits while too many bytes are in flight: that is the backpressure on whoever produces.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self

import grpc

from lynearm.client.connection import Connection
from lynearm.client.interrupts import Interruptible
from lynearm.client.methods import ResponseStream
from lynearm.client.producer_window import (
    FAREWELL_SECONDS,
    OPEN_SECONDS,
    Finished,
    ProducerWindow,
    check_block,
    too_late,
)
from lynearm.client.retries import Retries, client_closed, service_hung_up
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.wire.errors import InternalError, LynearmError, PreconditionError
from lynearm.wire.labels import TagSummary
from lynearm.wire.work import FinishedWork

logger = logging.getLogger(__name__)


class Publisher:
    """A producer of one stream. Made by `TraceClient.publisher`; use it as a context manager.

    One thread publishes; a thread of the publisher's own sends, and reads what became durable. Both live in
    the process that made it.
    """

    def __init__(self, connection: Connection, window: ProducerWindow, *, retries: Retries) -> None:
        self.stream = window.stream
        self.producer_id = window.producer_id
        self._connection = connection
        self._generation = connection.generation
        self._retries = retries
        self._pid = os.getpid()
        self._changed = threading.Condition()
        # Everything below is guarded by _changed.
        self._window = window
        self._waiting_seconds = 0.0
        self._closing = False
        self._error: LynearmError | None = None
        self._call: ResponseStream[pb.PublishResponse] | None = None
        self._thread = threading.Thread(target=self._run, name=f"publish-{window.stream}", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<Publisher {self.producer_id!r} of {self.stream!r}: {self._window.progress}>"

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
            self.close(timeout_seconds=FAREWELL_SECONDS)
        except LynearmError:
            logger.warning("stream %s: %d blocks were not acknowledged", self.stream, len(self._window))

    @property
    def acked_blocks(self) -> int:
        """Blocks of this publisher that are durable."""
        return self._window.acked_blocks

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of blocks that are not known to be durable yet."""
        return self._window.in_flight_bytes

    @property
    def waiting_seconds(self) -> float:
        """How long `publish` has waited for room, in all."""
        return self._waiting_seconds

    @property
    def waiting_reason(self) -> str:
        """Why nothing goes on right now; empty while it does."""
        return self._retries.waiting_reason or self._window.held_reason

    def publish(
        self,
        block: bytes,
        finished_prompt_ids: Sequence[str] = (),
        *,
        finished_work: Sequence[FinishedWork] = (),
        tags: TagSummary | None = None,
    ) -> None:
        """Hand over a block; returns when it is queued, not when it is durable.

        Args:
            block: A serialised block.
            finished_prompt_ids: Prompts whose last trace is in this block; committed with it.
            finished_work: Leased samples whose traces are in this block (`Lease.finish`); committed with it.
            tags: Which tags the block's traces have (`summarise_tags`), for filters; None: not known.

        Raises:
            InvalidInputError: if block and ids do not fit into one message.
            StreamNotFoundError, StreamSealedError, ProducerFencedError, …: what the service said to
                this block or to an earlier one. The publisher is of no more use then.
        """
        check_block(block)
        started = time.monotonic()
        with self._waiting() as interrupt, self._changed:
            self._wait(lambda: self._closing or self._window.has_room(len(block)), None, interrupt)
            self._waiting_seconds += time.monotonic() - started
            if self._closing:
                raise too_late(self.stream)
            if not interrupt.was_interrupted:
                self._window.add(block, Finished(finished_prompt_ids, finished_work, tags))
                self._changed.notify_all()

    def flush(self, timeout_seconds: float | None = None) -> None:
        """Wait until every block is durable.

        Raises:
            DeadlineError: if that took longer than `timeout_seconds`.
            LynearmError: as for `publish`.
        """
        with self._waiting() as interrupt, self._changed:
            if not self._wait(lambda: self._window.is_empty, timeout_seconds, interrupt):
                raise self._window.overdue(timeout_seconds, self.waiting_reason)

    def close(self, timeout_seconds: float | None = None) -> None:
        """Flush, then leave. Idempotent.

        Raises:
            LynearmError: as for `flush`; the connection is given up all the same.
        """
        try:
            self.flush(timeout_seconds)
        finally:
            if self._pid == os.getpid():
                self._leave()

    def _leave(self) -> None:
        with Interruptible():
            with self._changed:
                self._closing = True
                call = None if self._window.is_empty and self._window.is_open else self._call
                self._changed.notify_all()
            if call is not None:
                call.cancel()
            self._thread.join(FAREWELL_SECONDS)

    def _waiting(self) -> Interruptible:
        if self._pid != os.getpid():
            raise PreconditionError(
                f"this publisher to stream {self.stream!r} belongs to process {self._pid}",
                "make a publisher in the process that publishes",
            )
        interrupt = Interruptible()
        interrupt.wake_by(self._wake)
        return interrupt

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _wait(
        self, is_done: Callable[[], bool], timeout_seconds: float | None, interrupt: Interruptible
    ) -> bool:
        """Wait until something is done, or an interrupt, which counts as done; False after the time."""
        done = self._changed.wait_for(
            lambda: self._error is not None or interrupt.was_interrupted or is_done(), timeout_seconds
        )
        if self._error is not None:
            raise self._error
        return done

    def _run(self) -> None:
        try:
            while (pause_seconds := self._connect_once()) is not None:
                with self._changed:
                    if self._changed.wait_for(lambda: self._closing, pause_seconds):
                        return
        except LynearmError as error:
            self._fail(error)
        except Exception as error:
            # Whatever it is, those who wait have to hear of it, or they wait for ever.
            logger.exception("stream %s: the publisher failed", self.stream)
            self._fail(InternalError(f"the publisher to stream {self.stream!r} failed: {error!r}"))

    def _fail(self, error: LynearmError) -> None:
        with self._changed:
            if not self._closing:
                self._error = error
            self._changed.notify_all()

    def _connect_once(self) -> float | None:
        """One connection, from opening to end; the seconds to wait before the next, None for the last."""
        if self._generation != self._connection.generation:
            raise client_closed(f"publisher to stream {self.stream!r}")
        target = self._connection.endpoints.current
        finished = threading.Event()
        with self._changed:
            opening = self._window.reopen()
        call = self._connection.publish(target, self._requests(opening, finished))
        with self._changed:
            self._call = call
        # A service that hangs would otherwise hold the opening for ever.
        watchdog = threading.Timer(OPEN_SECONDS, call.cancel)
        watchdog.daemon = True
        watchdog.start()
        try:
            for response in call:
                watchdog.cancel()
                self._receive(response)
        except grpc.RpcError as failure:
            if self._generation != self._connection.generation:
                raise client_closed(f"publisher to stream {self.stream!r}") from failure
            return None if self._closing else self._retries.failed(failure, target)
        finally:
            watchdog.cancel()
            with self._changed:
                finished.set()
                self._changed.notify_all()
            call.cancel()
        return None if self._closing else self._retries.lost(service_hung_up(target), target)

    def _requests(self, opening: bytes, finished: threading.Event) -> Iterator[bytes]:
        """What is sent on one connection: the opening, then every block that is not acknowledged."""
        yield opening
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: finished.is_set() or self._closing or self._window.has_more_to_send
                )
                frame = None if finished.is_set() else self._window.take()
            if frame is None:
                return
            yield frame

    def _receive(self, response: pb.PublishResponse) -> None:
        with self._changed:
            if self._window.receive(response):
                self._retries.succeeded()
            self._changed.notify_all()
