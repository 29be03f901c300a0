"""The service's methods as calls on a channel, sync or aio, and the options of such a channel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, TypeAlias, TypeVar

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from lynearm.client.calls import Call
from lynearm.v1 import teacher_service_pb2 as teacher_pb
from lynearm.v1 import trace_service_pb2 as pb

KEEPALIVE_SECONDS = 10
"""A peer that froze is noticed after this and `PING_TIMEOUT_SECONDS`; without both, after a minute."""

PING_TIMEOUT_SECONDS = 5

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", PING_TIMEOUT_SECONDS * 1000),
    ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_SECONDS * 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    # Between two tries to connect, calls fail without one: that must be over before a single call gives up.
    ("grpc.max_reconnect_backoff_ms", 500),
    # Otherwise a channel opened after a fork would use the connection of its parent's.
    ("grpc.use_local_subchannel_pool", 1),
)

_SERVICE = "/lynearm.v1.TraceService/"
_TEACHER_SERVICE = "/lynearm.v1.TeacherService/"

_Response_co = TypeVar("_Response_co", covariant=True)


class ResponseStream(Protocol[_Response_co]):
    """A call whose responses are iterated; what grpc returns, of which its stubs name no type."""

    def __iter__(self) -> Iterator[_Response_co]:
        """The call itself."""
        ...

    def __next__(self) -> _Response_co:
        """The next response; raises grpc.RpcError when the call failed."""
        ...

    def cancel(self) -> bool:
        """End the call."""
        ...


# Any: sync and aio channels have these factories in common and no type for it, and the stubs of neither can
# type a method without serialisers. What comes out is annotated where it is called.
AnyChannel: TypeAlias = Any
AnyMethod: TypeAlias = Any


def publish_method(channel: AnyChannel) -> AnyMethod:
    """Publish, its requests framed by hand."""
    return channel.stream_stream(
        _SERVICE + "Publish",
        request_serializer=None,
        response_deserializer=pb.PublishResponse.FromString,
    )


def subscribe_method(channel: AnyChannel) -> AnyMethod:
    """Subscribe, its responses left as bytes."""
    return channel.stream_stream(
        _SERVICE + "Subscribe",
        request_serializer=pb.SubscribeRequest.SerializeToString,
        response_deserializer=None,
    )


def fetch_method(channel: AnyChannel) -> AnyMethod:
    """FetchBlocks, its responses left as bytes."""
    return channel.unary_stream(
        _SERVICE + "FetchBlocks",
        request_serializer=pb.FetchBlocksRequest.SerializeToString,
        response_deserializer=None,
    )


def score_method(channel: AnyChannel) -> AnyMethod:
    """A teacher's Score."""
    return channel.stream_stream(
        _TEACHER_SERVICE + "Score",
        request_serializer=_serialize,
        response_deserializer=teacher_pb.ScoreResponse.FromString,
    )


def generate_method(channel: AnyChannel) -> AnyMethod:
    """A teacher's Generate."""
    return channel.unary_stream(
        _TEACHER_SERVICE + "Generate",
        request_serializer=_serialize,
        response_deserializer=teacher_pb.GenerateResponse.FromString,
    )


def call_method(channel: AnyChannel, call: Call[Any]) -> AnyMethod:
    """A method with one answer, in one response or several."""
    make = channel.unary_stream if call.streamed else channel.unary_unary
    return make(
        f"/{call.service}/{call.method}",
        request_serializer=_serialize,
        response_deserializer=call.answer.FromString,
    )


def health_method(channel: AnyChannel) -> AnyMethod:
    """The health check, which tells by its status whether the service is serving."""
    return channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )


HEALTH_REQUEST = health_pb2.HealthCheckRequest()


def is_serving(response: health_pb2.HealthCheckResponse) -> bool:
    """What the answer of a health check means."""
    return response.status == health_pb2.HealthCheckResponse.SERVING


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()
