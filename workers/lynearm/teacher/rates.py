"""How fast something grows."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

RATE_WINDOW_SECONDS = 15.0


class RateMeter:
    """Growth per second of a counter that never falls, over a window.

    Args:
        window_seconds: How far back it looks.
        clock: Seconds that only grow.
    """

    def __init__(
        self, window_seconds: float = RATE_WINDOW_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._window_seconds = window_seconds
        self._clock = clock
        self._seen: deque[tuple[float, float]] = deque()

    def update(self, count: float) -> float:
        """The rate, now that the counter stands at `count`."""
        now = self._clock()
        self._seen.append((now, count))
        while len(self._seen) > 2 and now - self._seen[0][0] > self._window_seconds:
            self._seen.popleft()
        since, earlier = self._seen[0]
        return (count - earlier) / (now - since) if now > since else 0.0
