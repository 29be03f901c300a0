"""A server on its way down: what it says, what it still does, and when it is gone."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from traces.harness import (
    Producer,
    RunningServer,
    ServerProcess,
    StartServer,
    code,
    create,
    error_name,
    make_block,
    make_spec,
)

from lynearm.client import TraceClient
from lynearm.traces.servicer import SERVICE_NAME
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.wire.errors import DrainingError, ServiceUnavailableError
from lynearm.wire.status import STATUS_METADATA_KEY, StatusDetails, parse_status


@contextmanager
def unopened_call(server: RunningServer) -> Iterator[None]:
    """A call that does not say what it wants, and so keeps a drain from ending."""
    end = threading.Event()

    def nothing() -> Iterator[bytes]:
        end.wait(60)
        yield from ()

    start: Any = server.channel.stream_stream(f"/{SERVICE_NAME}/Subscribe", None, None)
    call = start(nothing())
    # Answered after the call began: both came over one connection, in order.
    server.stub.ListStreams(pb.ListStreamsRequest())
    try:
        yield
    finally:
        end.set()
        call.cancel()


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
    with unopened_call(server) as _, draining(server):
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
            assert details == StatusDetails("DRAINING", 1.0)
        with TraceClient(server.server.address, timeout_seconds=30) as client:
            with pytest.raises(DrainingError, match="another server"):
                client.list_streams()
            assert not client.is_serving(30)
        server_ends_here = True
    assert server_ends_here


def test_a_drain_ends_in_time_whatever_still_runs(start_server: StartServer) -> None:
    server = start_server(drain_seconds=0.2)
    with unopened_call(server):
        server.stop()  # waits for the server; the test's own time limit says when that is too long
    with TraceClient(server.server.address, timeout_seconds=5) as client:
        with pytest.raises(ServiceUnavailableError):
            client.list_streams()


def test_sigterm_flushes_what_waits_for_company(tmp_path: Path) -> None:
    # A group would wait for a minute; the drain must not.
    with ServerProcess(tmp_path / "data", group_milliseconds=60_000.0) as server:
        create(server.stub)
        producer = Producer(server.stub)
        for sequence in (1, 2, 3):
            producer.send(sequence, make_block(sequence))
        server.wait_for_log("")
        server.process.send_signal(signal.SIGTERM)
        acks, error = producer.fail()
        assert error_name(error) == "DrainingError"
        assert server.process.wait(60) == 0
    with ServerProcess(tmp_path / "data") as server, TraceClient(server.address) as client:
        assert client.get_stream("s").next_offset == len(acks)
