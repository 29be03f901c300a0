"""`lynearm.client.consumers` for asyncio."""

from __future__ import annotations

from lynearm.client import calls, consumer_calls
from lynearm.client.consumer_calls import ConsumerInfo
from lynearm.client.sending import AsyncSendCall
from lynearm.wire.errors import ConsumerNotFoundError
from lynearm.wire.protobuf import StreamInfo
from lynearm.wire.traces import Cursor


class AsyncConsumerClient:
    """The consumers of one service; `AsyncTraceClient.consumers`. As `ConsumerClient`, awaited.

    Args:
        send: Sends calls.
    """

    def __init__(self, send: AsyncSendCall) -> None:
        self._send = send

    async def commit(
        self, stream: str, name: str, cursor: Cursor, *, allow_backwards: bool = False
    ) -> ConsumerInfo:
        """As `ConsumerClient.commit`."""
        call = consumer_calls.commit_cursor(stream, name, cursor, allow_backwards=allow_backwards)
        return await self._send(call)

    async def get(self, stream: str, name: str) -> ConsumerInfo:
        """As `ConsumerClient.get`."""
        return await self._send(consumer_calls.get_consumer(stream, name))

    async def cursor(self, stream: str, name: str) -> Cursor:
        """As `ConsumerClient.cursor`."""
        try:
            return (await self.get(stream, name)).cursor
        except ConsumerNotFoundError:
            return Cursor((await self._send(calls.get_stream(stream))).first_offset)

    async def list(self, stream: str) -> list[ConsumerInfo]:
        """As `ConsumerClient.list`."""
        return await self._send(consumer_calls.list_consumers(stream))

    async def delete(self, stream: str, name: str) -> None:
        """As `ConsumerClient.delete`."""
        await self._send(consumer_calls.delete_consumer(stream, name))

    async def set_max_lag(self, stream: str, *, blocks: int = 0, traces: int = 0) -> StreamInfo:
        """As `ConsumerClient.set_max_lag`."""
        return await self._send(consumer_calls.set_max_lag(stream, blocks=blocks, traces=traces))
