"""`lynearm.client.subscription` for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Self

import grpc

from lynearm.client.async_connection import AsyncConnection, AsyncResponses, is_being_cancelled, is_end
from lynearm.client.reading_position import FetchPosition, ReceivedBlock, SubscriptionPosition
from lynearm.client.retries import Retries, client_closed, service_hung_up
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.wire.errors import ServiceUnavailableError


class AsyncSubscription:
    """An async iterator of `ReceivedBlock`. Made by `AsyncTraceClient.subscribe`; use it with `async with`.

    One task iterates; any may call `close`, which ends the iteration. An iteration that is cancelled, by
    `asyncio.timeout` for one, has taken nothing: the next one gives the block.
    """

    def __init__(
        self,
        connection: AsyncConnection,
        position: SubscriptionPosition,
        *,
        retries: Retries,
        find_start: Callable[[], Awaitable[int]] | None,
    ) -> None:
        self.stream = position.stream
        self._connection = connection
        self._generation = connection.generation
        self._position = position
        self._retries = retries
        self._find_start = find_start
        self._closed = asyncio.Event()
        self._call: AsyncResponses[bytes] | None = None
        self._reading: asyncio.Task[bytes] | None = None
        self._target = ""
        self._requests: asyncio.Queue[pb.SubscribeRequest | None] = asyncio.Queue()

    def __repr__(self) -> str:
        return f"<AsyncSubscription to {self.stream!r}: next offset {self.next_offset}>"

    async def __aenter__(self) -> Self:
        """The subscription itself."""
        await self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        await self.close()

    def __aiter__(self) -> Self:
        """The subscription itself."""
        return self

    async def __anext__(self) -> ReceivedBlock:
        """The next block; waits for it.

        Raises:
            StreamNotFoundError, OffsetNotFoundError, …: what the service said.
            ServiceUnavailableError: if it stayed away longer than the client's patience.
        """
        await self._start()
        while not self._has_ended():
            try:
                data = await self._read()
            except (grpc.RpcError, ServiceUnavailableError) as failure:
                await self._hang_up()
                if self._has_ended():
                    break
                await self._pause(self._retries.failed(failure, self._target))
                continue
            if data is None:
                await self._hang_up()
                break
            received = self._take(data)
            if received is not None:
                return received
        raise StopAsyncIteration

    @property
    def next_offset(self) -> int:
        """Every block before it was given, or held nothing wanted."""
        return self._position.next_offset

    @property
    def damaged_offsets(self) -> tuple[int, ...]:
        """Offsets of the blocks that were skipped, being damaged; none unless that was asked for."""
        return tuple(self._position.damaged_offsets)

    @property
    def waiting_reason(self) -> str:
        """Why nothing can be received right now; empty while connected."""
        return self._retries.waiting_reason

    async def close(self) -> None:
        """End the subscription; a task that waits in it sees the iteration end."""
        self._closed.set()
        await self._hang_up()

    async def _start(self) -> None:
        if self._find_start is not None:
            self._position.next_offset = await self._find_start()
            self._find_start = None

    def _has_ended(self) -> bool:
        return self._closed.is_set() or self._generation != self._connection.generation

    async def _read(self) -> bytes | None:
        """What comes next; None at the end. When cancelled, the next read goes on with it.

        Raises:
            grpc.RpcError, ServiceUnavailableError: if the call failed.
        """
        reading = self._reading
        if reading is None:
            # A task of its own, since grpc ends a call when a read of it is cancelled.
            self._reading = reading = asyncio.create_task(self._connected().read())
        await asyncio.wait((reading,))
        self._reading = None
        if reading.cancelled():  # by `_hang_up`, or grpc, when the channel was closed
            raise service_hung_up(self._target)
        data = reading.result()
        return None if is_end(data) else data

    def _connected(self) -> AsyncResponses[bytes]:
        call = self._call
        if call is None:
            self._requests = requests = asyncio.Queue[pb.SubscribeRequest | None]()
            requests.put_nowait(self._position.open())
            self._target = self._connection.endpoints.current
            self._call = call = self._connection.subscribe(self._target, _until_none(requests))
        return call

    def _take(self, data: bytes) -> ReceivedBlock | None:
        received = self._position.take(data)
        self._retries.succeeded()
        granted = self._position.grant()
        if granted is not None:
            self._requests.put_nowait(granted)
        return received

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._closed.wait()
        except TimeoutError:
            return

    async def _hang_up(self) -> None:
        call, self._call = self._call, None
        reading, self._reading = self._reading, None
        self._requests.put_nowait(None)
        if call is not None:
            call.cancel()
        if reading is not None:
            reading.cancel()
            await asyncio.wait((reading,))
            if not reading.cancelled():
                reading.exception()  # asyncio complains of one that nobody looked at


async def fetch_blocks(
    connection: AsyncConnection, position: FetchPosition, *, retries: Retries, timeout_seconds: float
) -> AsyncIterator[ReceivedBlock]:
    """The blocks of a range, across the loss of a server.

    Args:
        connection: To the service.
        position: The range.
        retries: Decides what a failure means.
        timeout_seconds: How long one block may take.
    """
    while not position.is_complete:
        generation, target = connection.generation, connection.endpoints.current
        try:
            call = connection.fetch(target, position.open(), timeout_seconds)
            try:
                while not is_end(data := await call.read()):
                    received = position.take(data)
                    retries.succeeded()
                    yield received
            finally:
                call.cancel()
            return
        except grpc.RpcError as failure:
            pause_seconds = position.failed(failure, target, retries)
        except asyncio.CancelledError as error:
            if is_being_cancelled() or generation == connection.generation:
                raise
            raise client_closed("fetch") from error
        if pause_seconds is None:
            return
        await asyncio.sleep(pause_seconds)


async def _until_none(
    requests: asyncio.Queue[pb.SubscribeRequest | None],
) -> AsyncIterator[pb.SubscribeRequest]:
    while (request := await requests.get()) is not None:
        yield request
