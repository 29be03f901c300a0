"""One stream as a run reads it: pass after pass, ahead of the trainer, waited for with a word on why."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from lynearm.client import Subscription, TraceClient
from lynearm.student.reader import PositionedTrace, TraceReader
from lynearm.student.reporting import Reporter
from lynearm.wire.errors import CorruptBlockError
from lynearm.wire.traces import Cursor

_POLL_SECONDS = 0.2
"""How often a run that waits looks whether it should stop."""

_ANNOUNCE_SECONDS = 1.0
"""Shorter gaps are not worth a change of the display."""

_ANNOUNCE_AGAIN_SECONDS = 10.0
"""Whoever shows lines at intervals passes over some: a long wait is said until it has been heard."""


class StreamSource:
    """The traces of one stream in its order; every pass has a subscription and a reader of its own.

    Args:
        client: Of the service that has the stream.
        name: Of the stream.
        prefetch_blocks: Decoded blocks that may wait.
        should_stop: Whether to give up waiting.
        reporter: Hears of waiting.
        skip_damaged: Whether to pass over blocks that are damaged.
        named: Whether to say the stream's name with what is waited for, as where there are several.
    """

    def __init__(
        self,
        client: TraceClient,
        name: str,
        *,
        prefetch_blocks: int,
        should_stop: Callable[[], bool],
        reporter: Reporter,
        skip_damaged: bool = False,
        named: bool = False,
    ) -> None:
        self._client = client
        self._name = name
        self._prefetch_blocks = prefetch_blocks
        self._should_stop = should_stop
        self._reporter = reporter
        self._skip_damaged = skip_damaged
        self._named = named
        self._returned: deque[PositionedTrace] = deque()
        self._stack = ExitStack()
        self._subscription: Subscription | None = None
        self._reader: TraceReader | None = None

    @property
    def is_open(self) -> bool:
        """Whether a pass is in progress."""
        return self._reader is not None

    @property
    def next_offset(self) -> int:
        """Blocks that the stream is known to have; 0 when closed."""
        return self._reader.next_offset if self._reader else 0

    @property
    def received_all(self) -> bool:
        """Whether the stream's last block has arrived; True when closed."""
        return self._reader is None or self._reader.received_all

    @property
    def damaged_offsets(self) -> tuple[int, ...]:
        """Offsets of the blocks that this pass has passed over; none when closed."""
        if self._subscription is None or self._reader is None:
            return ()
        return (*self._subscription.damaged_offsets, *self._reader.damaged_offsets)

    @property
    def exhausted(self) -> bool:
        """Whether every trace of the pass has been taken."""
        return not self._returned and (self._reader is None or self._reader.exhausted)

    def open(self, start: Cursor) -> None:
        """Begin, or begin again, at a trace.

        Raises:
            LynearmError: as for `TraceClient.subscribe`.
        """
        self.close()
        self._subscription = self._stack.enter_context(
            self._client.subscribe(
                self._name, start=start.offset, on_corrupt="skip" if self._skip_damaged else "raise"
            )
        )
        self._reader = self._stack.enter_context(
            TraceReader(
                self._subscription,
                start=start,
                prefetch_blocks=self._prefetch_blocks,
                dictionaries=self._client.dictionaries(self._name, wait=True),
                skip_damaged=self._skip_damaged,
                on_close=self._subscription.close,
            )
        )

    def close(self) -> None:
        """End the pass; what was not taken is forgotten."""
        self._reader = self._subscription = None
        self._returned.clear()
        self._stack.close()

    def take(self) -> PositionedTrace | None:
        """The next trace; waits for it. None when all have been taken, or the run should stop.

        Raises:
            LynearmError: as for `TraceReader.poll`.
        """
        if self._returned:
            return self._returned.popleft()
        if self._reader is None:
            return None
        try:
            positioned = self._reader.poll(0.0)
            if positioned is not None or self._reader.exhausted:
                return positioned
            return self._wait(self._reader)
        except CorruptBlockError as error:
            raise CorruptBlockError(
                error.message,
                "bring it back from a copy and resume, or resume without its traces: --set on_corrupt=skip",
            ) from error

    def give_back(self, traces: Sequence[PositionedTrace]) -> None:
        """Traces that were taken and come first again, in their order."""
        self._returned.extendleft(reversed(traces))

    def _wait(self, reader: TraceReader) -> PositionedTrace | None:
        started = time.monotonic()
        announced, announced_at = "", -math.inf
        positioned: PositionedTrace | None = None
        while positioned is None and not reader.exhausted and not self._should_stop():
            positioned = reader.poll(_POLL_SECONDS)
            reason = self._waiting_reason()
            waited_seconds = time.monotonic() - started
            is_due = reason != announced or waited_seconds - announced_at > _ANNOUNCE_AGAIN_SECONDS
            if positioned is None and waited_seconds > _ANNOUNCE_SECONDS and is_due:
                self._reporter.stage("waiting", reason)
                announced, announced_at = reason, waited_seconds
        self._reporter.waiting_seconds += time.monotonic() - started
        return positioned

    def _waiting_reason(self) -> str:
        reason = self._subscription.waiting_reason if self._subscription else ""
        reason = reason or "the teacher's next block"
        return f"stream {self._name}: {reason}" if self._named else reason
