from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from traces.harness import LoopThread, RunningServer, StartServer, create

from lynearm.traces.config import ServeConfig
from lynearm.v1.trace_service_pb2_grpc import TraceServiceStub


@pytest.fixture(scope="session")
def loop() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.close()


@pytest.fixture
def start_server(loop: LoopThread, tmp_path: Path) -> Iterator[StartServer]:
    """Starts servers that are stopped after the test; takes what `ServeConfig` takes."""
    started: list[RunningServer] = []

    def start(**config: Any) -> RunningServer:
        config = {"data_dir": tmp_path / "data", "port": 0, "drain_seconds": 60.0, **config}
        started.append(RunningServer(loop, ServeConfig(**config)))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture
def server(start_server: StartServer) -> RunningServer:
    return start_server()


@pytest.fixture
def stub(server: RunningServer) -> TraceServiceStub:
    """A connection to a server with one stream, "s"."""
    create(server.stub)
    return server.stub
