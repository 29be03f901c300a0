from __future__ import annotations

from collections.abc import Iterator

import pytest
from models.service_process import ServiceProcess


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a real trace service."""
    with ServiceProcess(tmp_path_factory.mktemp("service") / "data") as process:
        yield process.target
