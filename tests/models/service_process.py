"""A real trace service for tests, which they may stop, kill and start again."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from lynearm.client import TraceClient
from lynearm.wire.errors import LynearmError


def unused_target() -> str:
    """An address of this machine at which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


class ServiceProcess:
    """A trace server in a process of its own, on a port that survives its restarts.

    Takes what `ServeConfig` takes, as long as it is a number.
    """

    def __init__(self, data_dir: Path, **settings: float) -> None:
        self._data_dir = data_dir
        self._settings = settings
        self.target = unused_target()
        self.port = int(self.target.rpartition(":")[2])
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        code = (
            "import json, sys; from pathlib import Path\n"
            "from lynearm.traces.config import ServeConfig\n"
            "from lynearm.traces.server import run_server\n"
            "settings = json.loads(sys.argv[3])\n"
            "config = ServeConfig(data_dir=Path(sys.argv[1]), port=int(sys.argv[2]), **settings)\n"
            "run_server(config, lambda *_: None)\n"
        )
        arguments = [str(self._data_dir), str(self.port), json.dumps(self._settings)]
        self._process = subprocess.Popen([sys.executable, "-c", code, *arguments])
        try:
            with TraceClient(self.target) as client:
                client.wait_until_ready(60)
        except LynearmError:
            self.kill()
            raise

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(30)
            self._process = None

    def freeze(self) -> None:
        """Stop it as a debugger would: connections stay, nothing answers."""
        self._send(signal.SIGSTOP)

    def thaw(self) -> None:
        self._send(signal.SIGCONT)

    def kill(self) -> None:
        self.stop(signal.SIGKILL)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def _send(self, number: signal.Signals) -> None:
        if self._process is None:
            raise ValueError(f"no service runs that {number.name} could be sent to")
        self._process.send_signal(number)
