"""Waits for the next trace, and says what for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from lynearm.student.reader import PositionedTrace, TraceReader
from lynearm.student.reporting import Reporter

_POLL_SECONDS = 0.2
"""How often a run that waits looks whether it should stop."""

_ANNOUNCE_SECONDS = 1.0
"""Shorter gaps are not worth a change of the display."""


class WatchedSource:
    """The traces of one pass, until they end or the run should stop.

    Args:
        reader: Gives the traces.
        waiting_reason: Why the subscription receives nothing; empty while it is connected.
        should_stop: Whether to give up waiting.
        reporter: Hears of waiting.
    """

    def __init__(
        self,
        reader: TraceReader,
        *,
        waiting_reason: Callable[[], str],
        should_stop: Callable[[], bool],
        reporter: Reporter,
    ) -> None:
        self._reader = reader
        self._waiting_reason = waiting_reason
        self._should_stop = should_stop
        self._reporter = reporter
        self._returned: deque[PositionedTrace] = deque()

    @property
    def exhausted(self) -> bool:
        """Whether every trace of the pass has been taken."""
        return not self._returned and self._reader.exhausted

    def take(self) -> PositionedTrace | None:
        """The next trace; waits for it. None when all have been taken, or the run should stop.

        Raises:
            LynearmError: as for `TraceReader.poll`.
        """
        if self._returned:
            return self._returned.popleft()
        positioned = self._reader.poll(0.0)
        if positioned is not None or self._reader.exhausted:
            return positioned
        return self._wait()

    def give_back(self, traces: Sequence[PositionedTrace]) -> None:
        """Traces that were taken and come first again, in their order."""
        self._returned.extendleft(reversed(traces))

    def _wait(self) -> PositionedTrace | None:
        started = time.monotonic()
        announced = ""
        positioned: PositionedTrace | None = None
        while positioned is None and not self._reader.exhausted and not self._should_stop():
            positioned = self._reader.poll(_POLL_SECONDS)
            reason = self._waiting_reason() or "the teacher's next block"
            waited_seconds = time.monotonic() - started
            if positioned is None and waited_seconds > _ANNOUNCE_SECONDS and reason != announced:
                self._reporter.stage("waiting", reason)
                announced = reason
        self._reporter.waiting_seconds += time.monotonic() - started
        return positioned
