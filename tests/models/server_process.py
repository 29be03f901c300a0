"""Servers in processes of their own, with any configuration, failpoints, clock or limits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

from traces.harness import make_block, make_spec

from lynearm.client import TraceClient
from lynearm.traces.failpoints import VARIABLE

_CODE = """
import json, sys
from pathlib import Path
exec(sys.argv[2])
from lynearm.traces.config import ServeConfig
from lynearm.traces.server import run_server
given = json.loads(sys.argv[1])
config = ServeConfig(**{**given, "data_dir": Path(given["data_dir"])})
run_server(config, lambda address: print(address, flush=True))
"""


class ServerEnded(Exception):
    """The server did not start; its log says why."""


class Server:
    """A trace server to be frozen, starved, or told to fail. Its standard error goes to a file.

    Args:
        data_dir: Its data directory.
        failpoints: What it is armed with.
        prelude: Python code that its process runs first.
        environment: Further variables.
        config: Fields of `ServeConfig`.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        failpoints: str = "",
        prelude: str = "",
        environment: dict[str, str] | None = None,
        **config: Any,
    ) -> None:
        given = json.dumps({"data_dir": str(data_dir), "port": 0, "group_milliseconds": 0.0, **config})
        self._log = data_dir.with_name(data_dir.name + ".log")
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _CODE, given, prelude],
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, VARIABLE: failpoints, **(environment or {})},
                text=True,
            )
        assert self.process.stdout is not None
        self.target = self.process.stdout.readline().strip()
        if not self.target:
            self.__exit__()
            raise ServerEnded(self.log)

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def rss_bytes(self) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()


def publish_singly(client: TraceClient, numbers: range, *, size_bytes: int = 2000) -> None:
    """Publish `make_block` of each number to stream "s", each in an object of its own."""
    client.create_stream(make_spec(), allow_existing=True)
    with client.publisher("s", f"p{numbers.start}") as publisher:
        for number in numbers:
            publisher.publish(make_block(number, size_bytes), [f"prompt-{number}"])
            publisher.flush()


def read_all(client: TraceClient) -> list[bytes]:
    """Every block of stream "s" from its start to its end."""
    with client.subscribe("s", follow=False) as blocks:
        return [bytes(received.block) for received in blocks]


def object_files(data_dir: Path) -> list[Path]:
    return [path for path in (data_dir / "blocks").glob("??/*") if path.is_file()]
