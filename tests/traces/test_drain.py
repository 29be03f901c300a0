"""A server on its way down: what it says, what it still does, and when it is gone."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from traces.harness import (
    Producer,
    RunningServer,
    StartServer,
    code,
    create,
    error_name,
    make_block,
)
from traces.serving import ServeCommand

from lynearm.client import TraceClient
from lynearm.traces.servicer import SERVICE_NAME
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.wire.errors import DrainingError, ServiceUnavailableError
from lynearm.wire.status import STATUS_METADATA_KEY, StatusDetails, parse_status


@contextmanager
def unopened_call(server: RunningServer) -> Iterator[Callable[[], None]]:
    """A call that does not say what it wants, and so keeps a drain from ending until it is ended."""
    end = threading.Event()

    def nothing() -> Iterator[bytes]:
        end.wait(60)
        yield from ()

    start: Any = server.channel.stream_stream(f"/{SERVICE_NAME}/Subscribe", None, None)
    call = start(nothing())
    # Answered after the call began: both came over one connection, in order.
    server.stub.ListStreams(pb.ListStreamsRequest())

    def finish() -> None:
        end.set()
        call.cancel()

    try:
        yield finish
    finally:
        finish()


@contextmanager
def draining(server: RunningServer) -> Iterator[None]:
    thread = threading.Thread(target=server.stop)
    thread.start()
    try:
        wait_until_not_serving(server)
        yield
    finally:
        thread.join(60)
        assert not thread.is_alive()


def health(server: RunningServer, service: str = "") -> int:
    stub: Any = health_pb2_grpc.HealthStub(server.channel)  # Any: its methods are not typed
    return int(stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=30).status)


def wait_until_not_serving(server: RunningServer) -> None:
    for _ in range(600):
        if health(server, SERVICE_NAME) == health_pb2.HealthCheckResponse.NOT_SERVING:
            return
        time.sleep(0.05)
    raise AssertionError("the server does not drain")


def test_a_draining_server_says_so_to_everybody(start_server: StartServer) -> None:
    server = start_server()
    create(server.stub)
    with unopened_call(server) as finish, draining(server):
        assert health(server) == health_pb2.HealthCheckResponse.NOT_SERVING
        for call in (
            lambda: server.stub.ListStreams(pb.ListStreamsRequest(), timeout=30),
            lambda: Producer(server.stub),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert (code(caught.value), error_name(caught.value)) == ("UNAVAILABLE", "DrainingError")
            metadata = dict(cast("grpc.Call", caught.value).trailing_metadata() or ())
            details = parse_status(cast("bytes", metadata[STATUS_METADATA_KEY]))
            assert details == StatusDetails("DrainingError", 1.0)
        client = TraceClient(server.server.address, timeout_seconds=30)
        with client, pytest.raises(DrainingError, match="another server"):
            client.list_streams()
        finish()


def test_a_drain_ends_in_time_whatever_still_runs(start_server: StartServer) -> None:
    server = start_server(drain_seconds=0.2)
    with unopened_call(server):
        server.stop()  # the test's own time limit says when that takes too long
    client = TraceClient(server.server.address, timeout_seconds=5)
    with client, pytest.raises(ServiceUnavailableError):
        client.list_streams()


def test_sigterm_flushes_and_acknowledges_what_waits_for_company(tmp_path: Path) -> None:
    # A group would wait for ten seconds; the drain gives two.
    slow = ("--set", "group_milliseconds=10000", "--drain-seconds", "2")
    with ServeCommand(tmp_path / "data", *slow) as server:
        create(server.stub)
        producer = Producer(server.stub)
        for sequence in (1, 2, 3):
            producer.send(sequence, make_block(sequence))
        server.wait_for_metric("lynearm_queued_bytes", 3 * 6000)
        server.process.send_signal(signal.SIGTERM)
        acks, error = producer.fail()
        assert (acks, error_name(error)) == ({1: 0, 2: 1, 3: 2}, "DrainingError")
        assert server.process.wait(60) == 0
    with ServeCommand(tmp_path / "data") as server, TraceClient(server.address) as client:
        assert client.get_stream("s").next_offset == 3
