"""A trace server in a thread of its own, which goes on trying until it can serve.

Whoever starts a process again, as Ray does, starts it whatever the world is like: the database may be away,
the port may be somebody else's for a while. An actor whose constructor raises is never started again, so what
stands in the way is kept as a state, and tried again.

The thread has the only event loop of its process, since gRPC's asyncio breaks with several.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, TypeAlias

import uvloop

from lynearm.traces.config import ServeConfig
from lynearm.traces.server import TraceServer
from lynearm.wire.errors import InternalError, LynearmError

logger = logging.getLogger(__name__)

Phase: TypeAlias = Literal["starting", "serving", "stopped"]

RETRY_SECONDS = 2.0
"""Between two tries to serve: long for a port, short for a database that comes back."""


@dataclass(frozen=True, slots=True)
class ServerState:
    """Where a server is, at one moment."""

    phase: Phase
    error: LynearmError | None = None
    """What the last try to serve ran into; None once it serves."""
    process_id: int = 0


class ServerThread:
    """Serves from `start` until `stop`.

    Args:
        config: The server's. With a fixed port it comes back at the address that it had.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._state = ServerState("starting", process_id=os.getpid())
        # As that of `lynearm.traces.server.run_server`.
        self._loop = uvloop.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="trace-server", daemon=True)

    @property
    def state(self) -> ServerState:
        """Where it is."""
        return self._state

    def start(self) -> None:
        """Begin to serve, or to try."""
        self._thread.start()

    def stop(self) -> None:
        """Drain; returns at once. Harmless when repeated."""
        with suppress(RuntimeError):  # its loop is closed: it has stopped
            self._loop.call_soon_threadsafe(self._stop.set)

    def join(self) -> None:
        """Wait until it has stopped: all that it acknowledged is durable, and its port is free."""
        self._thread.join()

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve())
        finally:
            self._state = ServerState("stopped", self._state.error, os.getpid())

    async def _serve(self) -> None:
        while not self._stop.is_set():
            try:
                async with TraceServer(self._config):
                    self._state = ServerState("serving", process_id=os.getpid())
                    await self._stop.wait()
            except LynearmError as error:
                self._note(error)
            except Exception as error:
                logger.exception("the server failed")
                self._note(InternalError(f"{type(error).__name__}: {error}"))
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), RETRY_SECONDS)

    def _note(self, error: LynearmError) -> None:
        before, self._state = self._state, ServerState("starting", error, os.getpid())
        if str(before.error) != str(error):
            logger.error("cannot serve, and try again each %g s: %s", RETRY_SECONDS, error)
