from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from traces.clusters import Cluster, run_cluster
from traces.harness import LoopThread, RunningServer, StartServer, create

from lynearm.traces.config import ServeConfig
from lynearm.v1.trace_service_pb2_grpc import TraceServiceStub


@pytest.fixture(scope="session")
def loop() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.close()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """PostgreSQL and S3; started by the first test that asks."""
    with run_cluster() as running:
        yield running


@pytest.fixture(params=["local", "cluster"])
def storage(request: pytest.FixtureRequest) -> dict[str, Any]:
    """An empty catalog and block store, as `ServeConfig` takes them: one pair, then the other."""
    if request.param != "cluster":
        return {"shared": True} if request.param == "shared" else {}
    cluster: Cluster = request.getfixturevalue("cluster")
    return cluster.storage()


@pytest.fixture
def start_server(loop: LoopThread, tmp_path: Path, storage: dict[str, Any]) -> Iterator[StartServer]:
    """Starts servers on one storage, stopped after the test; takes what `ServeConfig` takes."""
    started: list[RunningServer] = []

    def start(**config: Any) -> RunningServer:
        config = {"data_dir": tmp_path / "data", "port": 0, "drain_seconds": 60.0, **storage, **config}
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
