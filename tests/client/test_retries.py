"""When a call is tried again: against a server that fails as servers, proxies and networks do."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from models.service_process import unused_target
from models.trace_blocks import make_spec

from lynearm.client import AsyncTraceClient, TraceClient
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.wire.errors import (
    ERROR_NAME_METADATA_KEY,
    DeadlineError,
    InternalError,
    RateLimitedError,
    ServiceUnavailableError,
    StreamExistsError,
)
from lynearm.wire.protobuf import spec_to_proto
from lynearm.wire.status import STATUS_METADATA_KEY, encode_status

Behaviour = Callable[[grpc.ServicerContext], None]


class FailingServer:
    """Answers as a service with one stream, unless a behaviour is queued for the next call."""

    def __init__(self, target: str = "127.0.0.1:0") -> None:
        self.calls: list[str] = []
        self.behaviours: list[Behaviour] = []
        self.released = threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(4))
        self._server.add_generic_rpc_handlers((_Handler(self),))
        self.target = f"127.0.0.1:{self._server.add_insecure_port(target)}"
        self._server.start()

    def answer(self, method: str, context: grpc.ServicerContext) -> bytes:
        self.calls.append(method)
        if self.behaviours:
            self.behaviours.pop(0)(context)
        info = pb.Stream(spec=spec_to_proto(make_spec()), next_offset=7)
        return pb.GetStreamResponse(stream=info).SerializeToString()

    def close(self) -> None:
        self.released.set()
        self._server.stop(None).wait()


class _Handler(grpc.GenericRpcHandler):
    def __init__(self, server: FailingServer) -> None:
        self._server = server

    def service(self, handler_call_details: Any) -> grpc.RpcMethodHandler[Any, Any]:
        method = handler_call_details.method.rpartition("/")[2]
        return grpc.unary_unary_rpc_method_handler(
            lambda _request, context: self._server.answer(method, context)
        )


def abort(code: grpc.StatusCode, details: str = "", name: str = "") -> Behaviour:
    def behave(context: grpc.ServicerContext) -> None:
        if name:
            context.set_trailing_metadata(((ERROR_NAME_METADATA_KEY, name),))
        context.abort(code, details)

    return behave


# A proxy, or a connection that broke, says UNAVAILABLE without a name; our servers name their error.
BROKEN = abort(grpc.StatusCode.UNAVAILABLE, "connection reset by peer")
# What grpc.aio says when it writes to a call that is over, until it has learnt why.
OVER = abort(grpc.StatusCode.INTERNAL, "Internal error from Core")
DRAINING = abort(grpc.StatusCode.UNAVAILABLE, "it is stopping", "ServiceUnavailableError")


@pytest.fixture
def server() -> Iterator[FailingServer]:
    failing = FailingServer()
    yield failing
    failing.close()


@pytest.fixture(params=[TraceClient, AsyncTraceClient])
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Calls a method of a new client, sync or async, at an address."""

    def call_sync(target: str, method: str, *arguments: Any, **options: Any) -> Any:
        with TraceClient(target) as client:
            return getattr(client, method)(*arguments, **options)

    def call_async(target: str, method: str, *arguments: Any, **options: Any) -> Any:
        async def scenario() -> Any:
            async with AsyncTraceClient(target) as client:
                return await getattr(client, method)(*arguments, **options)

        return asyncio.run(scenario())

    return call_sync if request.param is TraceClient else call_async


def test_an_idempotent_call_is_tried_again(server: FailingServer, call: Callable[..., Any]) -> None:
    server.behaviours = [BROKEN, abort(grpc.StatusCode.CANCELLED), OVER]
    assert call(server.target, "get_stream", "s").next_offset == 7
    assert server.calls == ["GetStream"] * 4


def test_a_call_that_may_have_been_carried_out_is_not_tried_again(
    server: FailingServer, call: Callable[..., Any]
) -> None:
    server.behaviours = [BROKEN]
    with pytest.raises(ServiceUnavailableError, match="may or may not have been carried out"):
        call(server.target, "delete_stream", "s")
    assert server.calls == ["DeleteStream"]


def test_a_call_that_was_refused_before_it_began_is_tried_again(
    server: FailingServer, call: Callable[..., Any]
) -> None:
    server.behaviours = [DRAINING]
    call(server.target, "delete_stream", "s")
    assert server.calls == ["DeleteStream"] * 2


def test_a_call_that_found_no_connection_is_tried_elsewhere(
    server: FailingServer, call: Callable[..., Any]
) -> None:
    call(f"{unused_target()},{server.target}", "delete_stream", "s")
    assert server.calls == ["DeleteStream"]


def test_a_service_that_was_away_for_long_is_found_at_once(server: FailingServer) -> None:
    with TraceClient(server.target) as client:
        assert client.get_stream("s").next_offset == 7
        server.close()
        # Long enough for gRPC to try less and less often.
        for _ in range(4):
            with pytest.raises(ServiceUnavailableError):
                client.get_stream("s")
        successor = FailingServer(server.target)
        try:
            assert client.get_stream("s").next_offset == 7
        finally:
            successor.close()


@pytest.mark.parametrize("retry_seconds", [None, 0.05, 60.0])
def test_a_service_that_is_asked_too_often_is_asked_again_when_it_says(
    server: FailingServer, call: Callable[..., Any], retry_seconds: float | None
) -> None:
    error = RateLimitedError("too fast", "slow down")
    error.retry_seconds = retry_seconds

    def limit(context: grpc.ServicerContext) -> None:
        status = encode_status(8, error.message, error)
        context.set_trailing_metadata(((STATUS_METADATA_KEY, status),))
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, error.message)

    server.behaviours = [limit]
    if retry_seconds == 0.05:
        call(server.target, "delete_stream", "s")  # it was refused before it began
        assert server.calls == ["DeleteStream"] * 2
    else:
        with pytest.raises(RateLimitedError) as caught:
            call(server.target, "delete_stream", "s")
        assert caught.value.retry_seconds == retry_seconds or retry_seconds is None
        assert server.calls == ["DeleteStream"]


@pytest.mark.parametrize(
    ("behaviour", "expected"),
    [
        (abort(grpc.StatusCode.ALREADY_EXISTS, "it is another"), StreamExistsError),
        (abort(grpc.StatusCode.UNKNOWN, "what a proxy says"), InternalError),
        (abort(grpc.StatusCode.INTERNAL, "", "InternalError"), InternalError),
    ],
)
def test_what_another_try_does_not_change_is_raised_at_once(
    server: FailingServer, call: Callable[..., Any], behaviour: Behaviour, expected: type[Exception]
) -> None:
    server.behaviours = [behaviour]
    with pytest.raises(expected):
        call(server.target, "seal_stream", "s")
    assert server.calls == ["SealStream"]


def test_a_service_that_does_not_answer_meets_the_deadline(
    server: FailingServer, call: Callable[..., Any]
) -> None:
    def hang(_context: grpc.ServicerContext) -> None:
        server.released.wait(30)

    server.behaviours = [hang]
    with pytest.raises(DeadlineError, match="did not answer in time"):
        call(server.target, "get_stream", "s", timeout_seconds=0.2)
    assert server.calls == ["GetStream"]


def test_tries_share_one_deadline(server: FailingServer, call: Callable[..., Any]) -> None:
    deadlines: list[float] = []

    def note_and_break(context: grpc.ServicerContext) -> None:
        remaining = context.time_remaining()
        assert remaining is not None
        deadlines.append(time.monotonic() + remaining)
        BROKEN(context)

    server.behaviours = [note_and_break] * 2
    call(server.target, "get_stream", "s", timeout_seconds=600.0)
    assert len(deadlines) == 2
    assert abs(deadlines[1] - deadlines[0]) < 5.0
