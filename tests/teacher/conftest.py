"""A tiny real teacher in a real vLLM engine, once per session, and a real trace service."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from models.teaching import teach_config
from models.tiny_llama import build_tiny_llama

from lynearm.client import TraceClient
from lynearm.teacher.engine import TeacherEngine

END_TOKENS = [0, 2, *range(300, 384)]
"""A fifth of the vocabulary ends a completion, so that empty and short ones come by themselves."""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = build_tiny_llama(tmp_path_factory.mktemp("teacher") / "tiny")
    path = directory / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": END_TOKENS}))
    return directory


@pytest.fixture(scope="session")
def engine(tiny_model: Path) -> Iterator[TeacherEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        made = TeacherEngine(teach_config(tiny_model))
        yield made
        made.close()


class ServiceProcess:
    """A trace service in a process of its own, on a port that survives its restarts."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.target = f"127.0.0.1:{probe.getsockname()[1]}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        code = (
            "import sys; from pathlib import Path\n"
            "from lynearm.traces.config import ServeConfig\n"
            "from lynearm.traces.server import run_server\n"
            "run_server(ServeConfig(data_dir=Path(sys.argv[1]), port=int(sys.argv[2])), print)\n"
        )
        port = self.target.rpartition(":")[2]
        self._process = subprocess.Popen([sys.executable, "-c", code, str(self._data_dir), port])
        with TraceClient(self.target) as client:
            client.wait_until_ready(60)

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(30)
            self._process = None


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceProcess]:
    process = ServiceProcess(tmp_path / "data")
    process.start()
    yield process
    process.kill()
