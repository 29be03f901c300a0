"""The methods of consumers: stored cursors, and how far publishers may run ahead of them."""

from __future__ import annotations

from lynearm.traces.backend import Backend
from lynearm.traces.calls import Context
from lynearm.traces.consumer_records import ConsumerRecord, MaxLag
from lynearm.v1 import consumer_pb2 as pb
from lynearm.v1 import trace_service_pb2
from lynearm.wire.errors import InvalidInputError
from lynearm.wire.protobuf import stream_to_proto
from lynearm.wire.specs import check_name
from lynearm.wire.traces import Cursor

_MAX_BOUND = 1 << 62
"""SQL integers are signed."""


class ConsumerCalls:
    """Answers calls about consumers from a backend.

    Args:
        backend: What the calls work on.
    """

    def __init__(self, backend: Backend) -> None:
        self._catalog = backend.catalog
        self._lag = backend.lag

    async def configure_stream(
        self, request: trace_service_pb2.ConfigureStreamRequest, _: Context
    ) -> trace_service_pb2.ConfigureStreamResponse:
        """ConfigureStream."""
        await self._catalog.set_max_lag(request.name, read_max_lag(request.max_lag))
        record = await self._catalog.get_stream(request.name)
        self._lag.changed(record.stream_id)
        return trace_service_pb2.ConfigureStreamResponse(stream=stream_to_proto(record.info))

    async def commit_cursor(self, request: pb.CommitCursorRequest, _: Context) -> pb.CommitCursorResponse:
        """CommitCursor."""
        consumer = await self._catalog.commit_cursor(
            request.stream,
            check_name(request.consumer, what="consumer"),
            Cursor(min(request.cursor.offset, _MAX_BOUND), request.cursor.trace_index),
            allow_backwards=request.allow_backwards,
        )
        await self._wake_publishers(request.stream)
        return pb.CommitCursorResponse(consumer=_consumer_to_proto(consumer))

    async def get_consumer(self, request: pb.GetConsumerRequest, _: Context) -> pb.GetConsumerResponse:
        """GetConsumer."""
        name = check_name(request.name, what="consumer")
        consumer = await self._catalog.get_consumer(request.stream, name)
        return pb.GetConsumerResponse(consumer=_consumer_to_proto(consumer))

    async def list_consumers(self, request: pb.ListConsumersRequest, _: Context) -> pb.ListConsumersResponse:
        """ListConsumers."""
        found = await self._catalog.list_consumers(request.stream)
        return pb.ListConsumersResponse(consumers=[_consumer_to_proto(consumer) for consumer in found])

    async def delete_consumer(
        self, request: pb.DeleteConsumerRequest, _: Context
    ) -> pb.DeleteConsumerResponse:
        """DeleteConsumer."""
        await self._catalog.delete_consumer(request.stream, check_name(request.name, what="consumer"))
        await self._wake_publishers(request.stream)
        return pb.DeleteConsumerResponse()

    async def _wake_publishers(self, stream_name: str) -> None:
        self._lag.changed((await self._catalog.get_stream(stream_name)).stream_id)


def read_max_lag(message: pb.MaxLag) -> MaxLag:
    """The bound in a message.

    Raises:
        InvalidInputError: it is too large to be stored.
    """
    if max(message.blocks, message.traces) > _MAX_BOUND:
        raise InvalidInputError(
            f"max_lag of {message.blocks} blocks and {message.traces} traces, expected at most {_MAX_BOUND}",
            "say 0 for no bound",
        )
    return MaxLag(message.blocks, message.traces)


def _consumer_to_proto(consumer: ConsumerRecord) -> pb.Consumer:
    return pb.Consumer(
        stream=consumer.stream_name,
        name=consumer.name,
        cursor=pb.Cursor(offset=consumer.cursor.offset, trace_index=consumer.cursor.trace_index),
        lag_blocks=consumer.lag.blocks,
        lag_traces=consumer.lag.traces,
        lag_bytes=consumer.lag.size_bytes,
        updated_unix_nano=consumer.updated_unix_nano,
    )
