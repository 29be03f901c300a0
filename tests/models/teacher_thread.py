"""A real teacher server on a thread of the test's process, over an engine that several tests share."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from lynearm.teacher.engine import TeacherEngine
from lynearm.teacher.serving_config import ServeTeacherConfig
from lynearm.teacher.teacher_server import TeacherServer


class TeacherThread:
    """Serves while its context is open. Leaving drains.

    Args:
        engine: Works on the server's thread meanwhile, and is closed at the end; `shared_engine`
            goes on.
        settings: Of `ServeTeacherConfig`.
    """

    def __init__(self, engine: TeacherEngine, **settings: Any) -> None:
        given = {"model": "tiny", "bind": "127.0.0.1:0", "drain_seconds": 20.0, "top_k": 16}
        self._config = ServeTeacherConfig(**(given | settings))
        self.engine = engine
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="teacher-server")

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait(60)
        if self._error is not None:
            raise self._error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._thread.join(60)

    @property
    def target(self) -> str:
        return self.server.address

    @property
    def begun(self) -> int:
        """Requests that were given to the engine."""
        return self.server.begun_requests

    def stop(self) -> None:
        """Begin to drain."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            async with TeacherServer(self._config, lambda: self.engine) as self.server:
                self._ready.set()
                await self._stop.wait()
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._ready.set()


def wait_until(condition: Callable[[], bool], timeout_seconds: float = 20.0) -> None:
    """Return once a condition holds; fail the test if it does not in time."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.005)
