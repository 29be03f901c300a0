"""Work leased ahead of an engine, so that it never waits for the service: a thread asks, the engine takes.

Invariants: what is leased ahead is bounded. A prompt is taken once. At the end, leases that were not begun
are given back; of one that was begun, the rest is still to be taken.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass

from lynearm.client.leases import Lease, PromptWorker
from lynearm.wire.errors import LynearmError
from lynearm.wire.work import LeasedPrompt

logger = logging.getLogger(__name__)

_ASK_SECONDS = 1.0
"""Between two questions while others hold all that is left."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """A prompt to answer, and the lease that covers it."""

    lease: Lease
    prompt: LeasedPrompt


class LeaseAhead:
    """Holds two to three leases that the engine has not begun.

    Args:
        worker: Asks the service; its `max_units` is the size of a lease.
        lease_units: The same.
    """

    def __init__(self, worker: PromptWorker, lease_units: int) -> None:
        self._worker = worker
        self._enough = 2 * lease_units
        self._changed = threading.Condition()
        # Guarded by _changed.
        self._waiting: deque[Assignment] = deque()
        self._begun: Lease | None = None
        self._units = 0
        self._is_dry = False
        self._closed = False
        self._error: LynearmError | None = None
        self._thread = threading.Thread(target=self._run, name="lease-ahead", daemon=True)
        self._thread.start()

    @property
    def is_dry(self) -> bool:
        """Whether nothing is left here, and the service had nothing when it was asked last."""
        with self._changed:
            return self._is_dry and not self._waiting

    def next(self) -> Assignment | None:
        """A prompt to begin with; None while there is none.

        Raises:
            LynearmError: what the service said to the thread.
        """
        with self._changed:
            if self._error is not None and not self._waiting:
                raise self._error
            while self._waiting:
                found = self._take()
                if not found.lease.is_lost:
                    return found
        return None

    def wait(self, timeout_seconds: float) -> None:
        """Return once there may be something, or after the time."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._waiting or self._is_dry or self._error is not None, timeout_seconds
            )

    def keep_begun(self) -> None:
        """Lease nothing more, and give back what was not begun: `next` ends with the lease that was.

        A service that is away may hold the thread; what it leases then is given back once the service
        answers.
        """
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._is_dry = True
            untouched = {one.lease for one in self._waiting if one.lease is not self._begun}
            self._waiting = deque(one for one in self._waiting if one.lease is self._begun)
            self._changed.notify_all()
        if untouched:
            _release(self._worker, untouched)

    def _take(self) -> Assignment:
        found = self._waiting.popleft()
        self._begun = found.lease
        self._units -= len(found.prompt.sample_indices)
        self._changed.notify_all()
        return found

    def _run(self) -> None:
        try:
            while self._has_room():
                lease = self._worker.take()
                if not self._add(lease):
                    return
        except LynearmError as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _has_room(self) -> bool:
        """Wait until there is room for a lease; False once there shall be no more."""
        with self._changed:
            asked = time.monotonic()
            while not self._closed:
                pause = asked + _ASK_SECONDS - time.monotonic() if self._is_dry else 0.0
                if self._units < self._enough and pause <= 0:
                    return True
                self._changed.wait(pause if pause > 0 else None)
        return False

    def _add(self, lease: Lease | None) -> bool:
        with self._changed:
            self._is_dry = self._closed or lease is None
            if lease is not None and not self._closed:
                self._waiting.extend(Assignment(lease, prompt) for prompt in lease.prompts)
                self._units += lease.open_count
            late = lease if self._closed else None
            self._changed.notify_all()
        if late is not None:
            _release(self._worker, {late})
        return late is None


def _release(worker: PromptWorker, leases: set[Lease]) -> None:
    try:
        worker.release(leases)
    except LynearmError as error:
        logger.warning("job %s: leases come back later: %s", worker.job_name, error)
