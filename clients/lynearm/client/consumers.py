"""Consumers: named readers of a stream, whose positions the service keeps.

A trainer keeps its position in its own checkpoint, saved with the weights, and stores it here afterwards:
then publishers know how far they may run ahead, the service what it may drop, and people where it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from lynearm.client.unary_calls import SendCall, UnaryCall
from lynearm.v1 import consumer_pb2 as pb
from lynearm.v1 import trace_service_pb2
from lynearm.wire.errors import ConsumerNotFoundError
from lynearm.wire.protobuf import StreamInfo, stream_from_proto
from lynearm.wire.specs import check_name
from lynearm.wire.traces import Cursor


@dataclass(frozen=True, slots=True)
class ConsumerInfo:
    """A consumer as it was when the service answered."""

    stream: str
    name: str
    cursor: Cursor
    """Everything before it is used."""
    lag_blocks: int
    """From the cursor to the stream's end; a block that is used in part counts."""
    lag_traces: int
    lag_bytes: int
    updated_unix_nano: int
    """When the cursor was stored."""


class ConsumerClient:
    """The consumers of one service; `TraceClient.consumers`. Threads may share it.

    Args:
        send: Sends calls.
    """

    def __init__(self, send: SendCall) -> None:
        self._send = send

    def commit(
        self, stream: str, name: str, cursor: Cursor, *, allow_backwards: bool = False
    ) -> ConsumerInfo:
        """Store how far a consumer is; durable on return. The first time makes the consumer.

        Args:
            stream: That it reads.
            name: Of the consumer in the stream.
            cursor: What it has used.
            allow_backwards: Take a cursor before the stored one, too.

        Raises:
            StreamNotFoundError: there is no such stream.
            OffsetNotFoundError: the stream is not that long.
            CursorBackwardsError: the stored cursor is further.
        """
        request = pb.CommitCursorRequest(
            stream=check_name(stream),
            consumer=check_name(name, what="consumer"),
            cursor=pb.Cursor(offset=cursor.offset, trace_index=cursor.trace_index),
            allow_backwards=allow_backwards,
        )
        return self._send(UnaryCall("CommitCursor", request, _read_consumer))

    def get(self, stream: str, name: str) -> ConsumerInfo:
        """A consumer as it is now.

        Raises:
            StreamNotFoundError, ConsumerNotFoundError: there is no such stream or consumer.
        """
        request = pb.GetConsumerRequest(stream=check_name(stream), name=check_name(name, what="consumer"))
        return self._send(UnaryCall("GetConsumer", request, _read_consumer))

    def cursor(self, stream: str, name: str) -> Cursor:
        """Where a consumer goes on reading; the beginning of the stream if it never stored a cursor.

        Raises:
            StreamNotFoundError: there is no such stream.
        """
        try:
            return self.get(stream, name).cursor
        except ConsumerNotFoundError:
            return Cursor()

    def list(self, stream: str) -> list[ConsumerInfo]:
        """The consumers of a stream, by name.

        Raises:
            StreamNotFoundError: there is no such stream.
        """
        request = pb.ListConsumersRequest(stream=check_name(stream))
        return self._send(UnaryCall("ListConsumers", request, _read_consumers))

    def delete(self, stream: str, name: str) -> None:
        """Forget a consumer; publishers do not wait for it any more.

        Raises:
            StreamNotFoundError, ConsumerNotFoundError: there is no such stream or consumer.
        """
        request = pb.DeleteConsumerRequest(stream=check_name(stream), name=check_name(name, what="consumer"))
        self._send(UnaryCall("DeleteConsumer", request, _read_nothing))

    def set_max_lag(self, stream: str, *, blocks: int = 0, traces: int = 0) -> StreamInfo:
        """Bound how far publishers may run ahead of the slowest consumer. While there is none, nobody waits.

        Args:
            stream: Name of the stream.
            blocks: 0: no bound.
            traces: 0: no bound.

        Raises:
            StreamNotFoundError: there is no such stream.
        """
        request = trace_service_pb2.ConfigureStreamRequest(
            name=check_name(stream), max_lag=pb.MaxLag(blocks=blocks, traces=traces)
        )
        return self._send(UnaryCall("ConfigureStream", request, _read_stream))


def _consumer(message: pb.Consumer) -> ConsumerInfo:
    return ConsumerInfo(
        stream=message.stream,
        name=message.name,
        cursor=Cursor(message.cursor.offset, message.cursor.trace_index),
        lag_blocks=message.lag_blocks,
        lag_traces=message.lag_traces,
        lag_bytes=message.lag_bytes,
        updated_unix_nano=message.updated_unix_nano,
    )


def _read_consumer(answer: pb.CommitCursorResponse | pb.GetConsumerResponse) -> ConsumerInfo:
    return _consumer(answer.consumer)


def _read_consumers(answer: pb.ListConsumersResponse) -> list[ConsumerInfo]:
    return [_consumer(consumer) for consumer in answer.consumers]


def _read_stream(answer: trace_service_pb2.ConfigureStreamResponse) -> StreamInfo:
    return stream_from_proto(answer.stream)


def _read_nothing(_answer: pb.DeleteConsumerResponse) -> None:
    return None
