from __future__ import annotations

from collections.abc import Iterator

import pytest
from models.service_process import ServiceProcess
from models.trace_blocks import PACKINGS, publish_traces

from lynearm.client import TraceClient


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TraceClient]:
    """Of a service with sealed streams of the same traces, packed in several ways."""
    data_dir = tmp_path_factory.mktemp("service") / "data"
    with ServiceProcess(data_dir) as service, TraceClient(service.target) as one:
        for stream, sizes in PACKINGS.items():
            publish_traces(one, stream, sizes)
            one.seal_stream(stream)
        yield one
