"""`lynearm.client.publisher` for asyncio: a task in place of its thread."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

import grpc

from lynearm.client.async_connection import AsyncConnection, AsyncResponses, is_being_cancelled, is_end
from lynearm.client.producer_window import (
    FAREWELL_SECONDS,
    OPEN_SECONDS,
    Finished,
    ProducerWindow,
    check_block,
    too_late,
)
from lynearm.client.pulse import Pulse
from lynearm.client.retries import Retries, client_closed, service_hung_up
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.wire.errors import InternalError, LynearmError
from lynearm.wire.labels import TagSummary
from lynearm.wire.work import FinishedWork

logger = logging.getLogger(__name__)


class AsyncPublisher:
    """A producer of one stream. Made by `AsyncTraceClient.publisher`; use it with `async with`.

    Blocks are stored in the order in which their `publish` returns. A `publish` that is cancelled has handed
    over nothing. A task of the publisher's own, begun with its first use, sends and reads.
    """

    def __init__(self, connection: AsyncConnection, window: ProducerWindow, *, retries: Retries) -> None:
        self.stream = window.stream
        self.producer_id = window.producer_id
        self._connection = connection
        self._generation = connection.generation
        self._retries = retries
        self._changed = Pulse()
        self._window = window
        self._waiting_seconds = 0.0
        self._closing = False
        self._error: LynearmError | None = None
        self._call: AsyncResponses[pb.PublishResponse] | None = None
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<AsyncPublisher {self.producer_id!r} of {self.stream!r}: {self._window.progress}>"

    async def __aenter__(self) -> Self:
        """The publisher itself."""
        self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait until all is durable; after an exception for some seconds, after a cancellation not at all."""
        if error is None:
            await self.close()
            return
        if isinstance(error, asyncio.CancelledError):
            await self._leave(at_once=True)
        else:
            with suppress(LynearmError):  # the exception that is on its way matters more
                await self.close(timeout_seconds=FAREWELL_SECONDS)
        if not self._window.is_empty:
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

    async def publish(
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
        self._start()
        started = time.monotonic()
        try:
            await self._wait(lambda: self._closing or self._window.has_room(len(block)), None)
        finally:
            self._waiting_seconds += time.monotonic() - started
        if self._closing:
            raise too_late(self.stream)
        self._window.add(block, Finished(finished_prompt_ids, finished_work, tags))
        self._changed.send()

    async def flush(self, timeout_seconds: float | None = None) -> None:
        """Wait until every block is durable.

        Raises:
            DeadlineError: if that took longer than `timeout_seconds`.
            LynearmError: as for `publish`.
        """
        if not await self._wait(lambda: self._window.is_empty, timeout_seconds):
            raise self._window.overdue(timeout_seconds, self.waiting_reason)

    async def close(self, timeout_seconds: float | None = None) -> None:
        """Flush, then leave. Idempotent. When cancelled, it leaves at once.

        Raises:
            LynearmError: as for `flush`; the connection is given up all the same.
        """
        try:
            await self.flush(timeout_seconds)
        except BaseException:
            await self._leave(at_once=True)
            raise
        await self._leave(at_once=False)

    async def _leave(self, *, at_once: bool) -> None:
        self._closing = True
        self._changed.send()
        if self._call is not None and (at_once or not self._window.is_open):
            self._call.cancel()
        task = self._task
        if task is not None and not task.done():
            await asyncio.wait((task,), timeout=FAREWELL_SECONDS)
            task.cancel()

    def _start(self) -> None:
        if self._task is None and not self._closing:
            self._task = asyncio.create_task(self._run(), name=f"publish-{self.stream}")

    async def _wait(self, is_done: Callable[[], bool], timeout_seconds: float | None) -> bool:
        done = await self._changed.wait_until(lambda: self._error is not None or is_done(), timeout_seconds)
        if self._error is not None:
            raise self._error
        return done

    async def _run(self) -> None:
        try:
            while (pause_seconds := await self._connect_once()) is not None:
                if await self._changed.wait_until(lambda: self._closing, pause_seconds):
                    return
        except LynearmError as error:
            self._fail(error)
        except Exception as error:
            # Whatever it is, those who wait have to hear of it, or they wait for ever.
            logger.exception("stream %s: the publisher failed", self.stream)
            self._fail(InternalError(f"the publisher to stream {self.stream!r} failed: {error!r}"))

    def _fail(self, error: LynearmError) -> None:
        if not self._closing:
            self._error = error
        self._changed.send()

    async def _connect_once(self) -> float | None:
        """One connection, from opening to end; the seconds to wait before the next, None for the last."""
        self._check_client()
        target = self._connection.endpoints.current
        finished = asyncio.Event()
        call = self._connection.publish(target, self._requests(self._window.reopen(), finished))
        self._call = call
        try:
            await self._read(call)
        except grpc.RpcError as failure:
            self._check_client()
            return None if self._closing else self._retries.failed(failure, target)
        except TimeoutError:
            pass  # the service hangs
        except asyncio.CancelledError:
            if is_being_cancelled():
                raise
            self._check_client()
        finally:
            finished.set()
            self._changed.send()
            self._call = None  # what refers to it would keep grpc.aio at work
            call.cancel()
        return None if self._closing else self._retries.lost(service_hung_up(target), target)

    async def _read(self, call: AsyncResponses[pb.PublishResponse]) -> None:
        async with asyncio.timeout(OPEN_SECONDS) as patience:
            while not is_end(response := await call.read()):
                patience.reschedule(None)
                if self._window.receive(response):
                    self._retries.succeeded()
                self._changed.send()

    async def _requests(self, opening: bytes, finished: asyncio.Event) -> AsyncIterator[bytes]:
        """What is sent on one connection: the opening, then every block that is not acknowledged."""
        yield opening
        while True:
            await self._changed.wait_for(
                lambda: finished.is_set() or self._closing or self._window.has_more_to_send
            )
            frame = None if finished.is_set() else self._window.take()
            if frame is None:
                return
            yield frame

    def _check_client(self) -> None:
        if self._generation != self._connection.generation and not self._closing:
            raise client_closed(f"publisher to stream {self.stream!r}")
