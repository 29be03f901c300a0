"""The processes of the transport benchmark: workers that do what they are told, servers, CPU clocks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Self

from lynearm.traces.config import ServeConfig

_context = multiprocessing.get_context("spawn")

_START_SECONDS = 120.0
"""For a process to start and answer, on a busy machine."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a piece of work took."""

    wall_seconds: float
    cpu_seconds: float
    result: Any = None
    """What the work returned; of any type, since any function may be work."""


class WorkFailed(Exception):
    """The work of a process raised."""


class Worker:
    """A process that runs functions, one at a time, and says what each took. Use it as a context manager."""

    def __init__(self) -> None:
        self._pipe, theirs = _context.Pipe()
        self._process = _context.Process(target=_work, args=(theirs,), daemon=False)
        self._process.start()

    def __enter__(self) -> Self:
        """The worker itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join(_START_SECONDS)
        if self._process.is_alive():
            self._process.kill()

    def begin(self, function: Callable[..., object], *arguments: object) -> None:
        """Start a function of a module that the process can import."""
        self._pipe.send((function, arguments))

    def wait(self) -> Usage:
        """Wait for what was begun.

        Raises:
            WorkFailed: it raised.
        """
        usage, failure = self._pipe.recv()
        if failure:
            raise WorkFailed(failure)
        found: Usage = usage
        return found

    def run(self, function: Callable[..., object], *arguments: object) -> Usage:
        """Begin, and wait."""
        self.begin(function, *arguments)
        return self.wait()


class ServerProcess:
    """A server in a process of its own. Use it as a context manager.

    Args:
        served: Configuration of a trace server, whose port is 0; or what serves something else until the
            process ends, and calls its argument with host:port.
    """

    def __init__(self, served: ServeConfig | Callable[[Callable[[str], None]], None]) -> None:
        self._pipe, theirs = _context.Pipe()
        self._process = _context.Process(target=_serve, args=(served, theirs), daemon=True)
        self._process.start()
        if not self._pipe.poll(_START_SECONDS):
            raise WorkFailed("the server did not start")
        self.address: str = self._pipe.recv()

    def __enter__(self) -> Self:
        """The server itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let it drain."""
        self._process.terminate()
        self._process.join(_START_SECONDS)

    @property
    def process_id(self) -> int:
        """Of the server."""
        assert self._process.pid is not None
        return self._process.pid

    def cpu_seconds(self) -> float:
        """What its threads have used so far."""
        return cpu_seconds_of(self.process_id)


def cpu_seconds_of(pid: int) -> float:
    """CPU time of a process, to the nanosecond: its clock as clock_getcpuclockid(3) numbers it."""
    return time.clock_gettime(~pid << 3 | 2)


def _work(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while (task := pipe.recv()) is not None:
        function, arguments = task
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            result, failure = function(*arguments), ""
        except Exception as error:
            result, failure = None, f"{function.__name__} in process {os.getpid()}: {error!r}"
        pipe.send((Usage(time.perf_counter() - wall, time.process_time() - cpu, result), failure))


def _serve(served: ServeConfig | Callable[[Callable[[str], None]], None], pipe: Connection) -> None:
    from lynearm.traces.server import run_server

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if isinstance(served, ServeConfig):
        run_server(served, pipe.send)
    else:
        served(pipe.send)
