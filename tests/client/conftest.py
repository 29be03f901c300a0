"""One service for the tests of a module that neither stop it nor mind the streams of others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from models.service_process import ServiceProcess


@pytest.fixture(scope="module")
def shared_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    with ServiceProcess(tmp_path_factory.mktemp("service") / "data") as process:
        yield process


@pytest.fixture
def stream(request: pytest.FixtureRequest) -> str:
    """A name for a stream that no other test uses."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name.lower())
    return name[:100].strip("-")
