"""One gRPC channel to a trace service: its options, its methods, and what its errors mean."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from typing import Any, Protocol, TypeVar, cast

import grpc
from grpc_health.v1 import health_pb2

from lynearm.client.credentials import Credentials, open_channel
from lynearm.v1 import trace_service_pb2, trace_service_pb2_grpc
from lynearm.wire.errors import (
    ERROR_NAME_METADATA_KEY,
    REMEDY_METADATA_KEY,
    LynearmError,
    ServiceUnavailableError,
    error_from_status,
)
from lynearm.wire.status import STATUS_METADATA_KEY, StatusDetails, parse_status

KEEPALIVE_SECONDS = 10
"""A peer that froze is noticed after this and `PING_TIMEOUT_SECONDS`; without both, after a minute."""

PING_TIMEOUT_SECONDS = 5

FIRST_RETRY_SECONDS = 0.1
LAST_RETRY_SECONDS = 5.0

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", PING_TIMEOUT_SECONDS * 1000),
    ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_SECONDS * 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 2000),
)

_SERVICE = "/lynearm.v1.TraceService/"

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


class Connection:
    """A lazily opened channel; one for each process that uses it, since gRPC does not survive a fork.

    Args:
        target: host:port.
        credentials: Of the client; None: what the environment says.

    Raises:
        ConfigError: if a token would go out in plain text.
    """

    def __init__(self, target: str, credentials: Credentials | None = None) -> None:
        self.target = target
        self.credentials = Credentials.from_environment() if credentials is None else credentials
        self.credentials.check_target(target)
        self._channel: grpc.Channel | None = None
        self._pid = 0

    @property
    def channel(self) -> grpc.Channel:
        """The channel of this process."""
        if self._channel is None or self._pid != os.getpid():
            self._channel = open_channel(self.target, self.credentials, _OPTIONS)
            self._pid = os.getpid()
        return self._channel

    @property
    def stub(self) -> trace_service_pb2_grpc.TraceServiceStub:
        """The generated stub, for everything but the hot methods."""
        return trace_service_pb2_grpc.TraceServiceStub(self.channel)

    # Any below: the stubs cannot type a method without serialisers.

    def publish(self, requests: Iterator[bytes]) -> ResponseStream[trace_service_pb2.PublishResponse]:
        """Publish with requests framed by hand."""
        method = cast("Any", self.channel).stream_stream(
            _SERVICE + "Publish",
            request_serializer=None,
            response_deserializer=trace_service_pb2.PublishResponse.FromString,
        )
        return cast("ResponseStream[trace_service_pb2.PublishResponse]", method(requests))

    def subscribe(self, requests: Iterator[trace_service_pb2.SubscribeRequest]) -> ResponseStream[bytes]:
        """Subscribe with responses left as bytes."""
        method = cast("Any", self.channel).stream_stream(
            _SERVICE + "Subscribe",
            request_serializer=trace_service_pb2.SubscribeRequest.SerializeToString,
            response_deserializer=None,
        )
        return cast("ResponseStream[bytes]", method(requests))

    def fetch(
        self, request: trace_service_pb2.FetchBlocksRequest, timeout_seconds: float
    ) -> ResponseStream[bytes]:
        """FetchBlocks with responses left as bytes."""
        method = cast("Any", self.channel).unary_stream(
            _SERVICE + "FetchBlocks",
            request_serializer=trace_service_pb2.FetchBlocksRequest.SerializeToString,
            response_deserializer=None,
        )
        return cast("ResponseStream[bytes]", method(request, timeout=timeout_seconds))

    def is_serving(self, timeout_seconds: float) -> bool:
        """Whether the service answers its health check with SERVING."""
        method = cast("Any", self.channel).unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            response = method(health_pb2.HealthCheckRequest(), timeout=timeout_seconds)
        except grpc.RpcError:
            return False
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        """Close the channel; calls on it end."""
        if self._channel is not None and self._pid == os.getpid():
            self._channel.close()
        self._channel = None

    def error(self, failure: grpc.RpcError) -> LynearmError:
        """The typed error behind a failed call."""
        call = cast("grpc.Call", failure)
        metadata = dict(call.trailing_metadata() or ())
        status = call.code().name
        details = _details(metadata.get(STATUS_METADATA_KEY, b""))
        name = _text(metadata.get(ERROR_NAME_METADATA_KEY, "")) or details.reason
        if status == "UNAVAILABLE" and not name:
            return ServiceUnavailableError(
                f"no trace service answers at {self.target} ({call.details()})",
                "start one with `lynearm serve`, or name another with --service",
            )
        remedy = _text(metadata.get(REMEDY_METADATA_KEY, ""))
        error = error_from_status(status, call.details() or "", name, remedy)
        if details.retry_seconds is not None:
            error.retry_seconds = details.retry_seconds
        return error


def is_transient(failure: grpc.RpcError) -> bool:
    """Whether the same call may succeed once the service is back, or has room again."""
    call = cast("grpc.Call", failure)
    code = call.code()
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return True
    metadata = dict(call.trailing_metadata() or ())
    name = _text(metadata.get(ERROR_NAME_METADATA_KEY, ""))
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        # The service says so where waiting helps: a full disk, a rate, too many calls at a time.
        return _details(metadata.get(STATUS_METADATA_KEY, b"")).retry_seconds is not None
    # A server that is stopped or killed may also reset the stream, which gRPC reports in these two.
    reset = "RST_STREAM" in (call.details() or "")
    return not name and reset and code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


class Backoff:
    """Waits between tries: doubling, with full jitter, so that a fleet does not return all at once.

    Args:
        patience_seconds: Time without success after which `spent` is true.
    """

    def __init__(self, patience_seconds: float) -> None:
        self._patience_seconds = patience_seconds
        self._tries = 0
        self._since: float | None = None

    def failed(self) -> float:
        """Count a failure; the seconds to wait before the next try."""
        if self._since is None:
            self._since = time.monotonic()
        ceiling = min(LAST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2.0**self._tries)
        self._tries = min(self._tries + 1, 16)
        return ceiling * random.uniform(0.5, 1.0)

    def succeeded(self) -> None:
        """Forget the failures."""
        self._tries = 0
        self._since = None

    @property
    def spent(self) -> bool:
        """Whether patience has run out."""
        return self._since is not None and time.monotonic() - self._since >= self._patience_seconds


def _details(value: str | bytes) -> StatusDetails:
    try:
        return parse_status(value if isinstance(value, bytes) else b"")
    except LynearmError:
        return StatusDetails()  # written by something on the way, such as a proxy


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
