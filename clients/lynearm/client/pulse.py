"""Wakes the tasks that wait for something to change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Pulse:
    """What `threading.Condition` is to threads, without a lock: tasks change nothing between two awaits."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def send(self) -> None:
        """Something has changed: everything that waits looks again."""
        event, self._event = self._event, asyncio.Event()
        event.set()

    async def wait_for(self, is_done: Callable[[], bool]) -> None:
        """Return once it is so."""
        while not is_done():
            await self._event.wait()

    async def wait_until(self, is_done: Callable[[], bool], timeout_seconds: float | None) -> bool:
        """As `wait_for`; False when the time was over before."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self.wait_for(is_done)
        except TimeoutError:
            return is_done()
        return True
