"""A TCP proxy that delays, cuts and swallows what it forwards."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias, TypeVar

T = TypeVar("T")

Direction: TypeAlias = Literal["up", "down"]

_CHUNK_BYTES = 16_384


class Proxy:
    """Stands between clients and a service, in a thread of its own.

    Args:
        target: host:port of the service.
        seed: Of delays and cuts.
        delay_seconds: Longest delay of a chunk.
        cut_bytes: After how many bytes, on average, a connection is reset; 0 for never.
    """

    def __init__(self, target: str, *, seed: int = 0, delay_seconds: float = 0.0, cut_bytes: int = 0) -> None:
        self._port = int(target.rpartition(":")[2])
        self._rng = random.Random(seed)
        self._delay_seconds = delay_seconds
        self._cut_bytes = cut_bytes
        self._connections: list[_Pair] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.cuts = 0
        self.swallowed_bytes = 0
        self.target = ""

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def swallow(self, direction: Direction) -> None:
        """Forward nothing more that way on the connections that there are; neither end is told."""
        for pair in self._connections:
            pair.swallowing.add(direction)

    def cut(self) -> None:
        """Reset the connections that there are."""
        pairs, self._connections = self._connections, []
        for pair in pairs:
            self._loop.call_soon_threadsafe(pair.abort)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _close(self) -> None:
        self._server.close()
        for pair in self._connections:
            pair.abort()
        await asyncio.sleep(0.05)
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            writer.transport.abort()
            return
        pair = _Pair(writer, up_writer, self._draw_cut())
        self._connections.append(pair)
        await asyncio.gather(
            self._pump(pair, "up", reader, up_writer), self._pump(pair, "down", up_reader, writer)
        )

    async def _pump(
        self, pair: _Pair, direction: Direction, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError):
            while chunk := await source.read(_CHUNK_BYTES):
                if self._delay_seconds:
                    await asyncio.sleep(self._rng.uniform(0, self._delay_seconds))
                if direction in pair.swallowing:
                    self.swallowed_bytes += len(chunk)
                    continue
                pair.left_bytes -= len(chunk)
                if pair.left_bytes < 0:
                    # What is behind the cut is lost, and perhaps a part of what is before it.
                    sink.write(chunk[: self._rng.randrange(len(chunk))])
                    self.cuts += 1
                    break
                sink.write(chunk)
                await sink.drain()
        if direction not in pair.swallowing:
            pair.abort()

    def _draw_cut(self) -> float:
        return self._rng.uniform(0, 2 * self._cut_bytes) if self._cut_bytes else float("inf")


class _Pair:
    """The two connections of one client, and how much passes before they are reset."""

    def __init__(self, down: asyncio.StreamWriter, up: asyncio.StreamWriter, left_bytes: float) -> None:
        self._writers = (down, up)
        self.left_bytes = left_bytes
        self.swallowing: set[Direction] = set()

    def abort(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
