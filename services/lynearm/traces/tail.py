"""The live end of each stream, as this process knows it, and the waking of those who wait for more.

Invariants: a tail never runs ahead of the catalog, only ever advances, and is never polled by who waits on
it. Whoever wants to wait registers the tail first and reads the catalog second; then no commit in between is
missed. Where other servers commit too, `wakeups` advances the tails as they do.
All of it lives on the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import cast
from weakref import WeakValueDictionary

from lynearm.wire.errors import LynearmError

LAST_WRITE_SECONDS = 2.0
"""How long a call that must end waits for its peer to take the message under way."""


class StreamTail:
    """How far one stream is. Readers and publishers of the stream hold it; then it may go."""

    def __init__(self) -> None:
        self.next_offset = 0
        """Blocks below it are committed."""
        self.sealed = False
        """No block will be added beyond next_offset."""
        self._advanced = asyncio.Event()
        self._ended = asyncio.Event()
        self._end_reason: LynearmError | None = None

    def advance(self, next_offset: int, *, sealed: bool = False) -> None:
        """Take note of a newer state and wake who waits. Older news changes nothing."""
        self.next_offset = max(self.next_offset, next_offset)
        self.sealed = self.sealed or sealed
        self._advanced.set()
        self._advanced = asyncio.Event()

    async def wait_beyond(self, offset: int) -> int:
        """Wait until the block at `offset` is there or never will be; returns next_offset."""
        while self.next_offset <= offset and not self.sealed:
            await self._advanced.wait()
        return self.next_offset

    def end(self, reason: LynearmError) -> None:
        """Ask every call on the stream to end with `reason`; the first reason counts."""
        self._end_reason = self._end_reason or reason
        self._ended.set()

    async def wait_end(self) -> LynearmError:
        """Wait until calls on the stream must end; returns why."""
        await self._ended.wait()
        return cast("LynearmError", self._end_reason)  # `end` sets it before the event


async def run_until_end(
    tail: StreamTail, work: Coroutine[object, object, None], *, writing: asyncio.Lock | None = None
) -> None:
    """Run `work` to its end, unless calls on the stream must end before; then it is cancelled.

    Args:
        tail: Says when calls must end.
        work: The call's work.
        writing: Held by `work` while it writes to its peer. It is cancelled between two writes where it
            can be: gRPC takes no status for a call that has a message under way.

    Raises:
        LynearmError: why calls must end; else whatever `work` raises.
    """
    working = asyncio.create_task(work)
    ending = asyncio.create_task(tail.wait_end())
    try:
        await asyncio.wait((working, ending), return_when=asyncio.FIRST_COMPLETED)
        if not working.done() and writing is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(writing.acquire(), LAST_WRITE_SECONDS)
        if not working.done():
            raise ending.result()
        working.result()
    finally:
        for task in (working, ending):
            task.cancel()
        # Nothing of the call may run on after its end.
        await asyncio.gather(working, ending, return_exceptions=True)


class Tails:
    """The tails that somebody in this process holds."""

    def __init__(self) -> None:
        self._tails: WeakValueDictionary[int, StreamTail] = WeakValueDictionary()
        self._draining: LynearmError | None = None

    def register(self, stream_id: int) -> StreamTail:
        """The stream's tail; new ones know nothing until the caller advances them from the catalog."""
        tail = self._tails.get(stream_id)
        if tail is None:
            tail = self._tails[stream_id] = StreamTail()
            if self._draining is not None:
                tail.end(self._draining)
        return tail

    def stream_ids(self) -> list[int]:
        """Streams whose tails somebody holds."""
        return list(self._tails.keys())

    def advance(self, stream_id: int, next_offset: int, *, sealed: bool = False) -> None:
        """Pass on that a stream got further."""
        tail = self._tails.get(stream_id)
        if tail is not None:
            tail.advance(next_offset, sealed=sealed)

    def end(self, stream_id: int, reason: LynearmError) -> None:
        """Ask every call on one stream to end."""
        tail = self._tails.get(stream_id)
        if tail is not None:
            tail.end(reason)

    def drain(self, reason: LynearmError) -> None:
        """Ask every call on every stream to end, present and future."""
        self._draining = reason
        for tail in list(self._tails.values()):
            tail.end(reason)
