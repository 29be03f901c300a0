"""The calls about consumers and lag bounds: what each sends, and what its answer means; no I/O."""

from __future__ import annotations

from dataclasses import dataclass

from lynearm.client.calls import Call
from lynearm.v1 import consumer_pb2 as pb
from lynearm.v1 import trace_service_pb2
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


def commit_cursor(stream: str, name: str, cursor: Cursor, *, allow_backwards: bool) -> Call[ConsumerInfo]:
    """CommitCursor."""
    request = pb.CommitCursorRequest(
        stream=check_name(stream),
        consumer=check_name(name, what="consumer"),
        cursor=pb.Cursor(offset=cursor.offset, trace_index=cursor.trace_index),
        allow_backwards=allow_backwards,
    )
    return Call("CommitCursor", request, pb.CommitCursorResponse, _read_consumer)


def get_consumer(stream: str, name: str) -> Call[ConsumerInfo]:
    """GetConsumer."""
    request = pb.GetConsumerRequest(stream=check_name(stream), name=check_name(name, what="consumer"))
    return Call("GetConsumer", request, pb.GetConsumerResponse, _read_consumer)


def list_consumers(stream: str) -> Call[list[ConsumerInfo]]:
    """ListConsumers."""
    request = pb.ListConsumersRequest(stream=check_name(stream))
    return Call("ListConsumers", request, pb.ListConsumersResponse, _read_consumers)


def delete_consumer(stream: str, name: str) -> Call[None]:
    """DeleteConsumer."""
    request = pb.DeleteConsumerRequest(stream=check_name(stream), name=check_name(name, what="consumer"))
    return Call("DeleteConsumer", request, pb.DeleteConsumerResponse, _read_nothing)


def set_max_lag(stream: str, *, blocks: int, traces: int) -> Call[StreamInfo]:
    """ConfigureStream."""
    request = trace_service_pb2.ConfigureStreamRequest(
        name=check_name(stream), max_lag=pb.MaxLag(blocks=blocks, traces=traces)
    )
    return Call("ConfigureStream", request, trace_service_pb2.ConfigureStreamResponse, _read_stream)


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
