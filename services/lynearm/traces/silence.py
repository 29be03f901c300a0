"""Tells whose leases may be given to others: those whose holders were not heard of for too long.

Invariants: a lease is silent only when its row has stood unchanged for that long while this process was
listening, counted from when it first saw it so. Time in which it heard nobody, since it was frozen, swapped
out or busy, is not held against anyone: it would take every lease away in the moment in which it is back. No
time is ever compared with that of another machine or of an earlier process, so that a clock that jumps takes
no lease away. Being wrong costs work and no more: who was superseded is refused at publish by the lease's
generation.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from lynearm.traces.job_records import LeaseNews

_TICK_SECONDS = 0.5
"""Between two signs of life of the loop that hears the calls."""

_LATE_SECONDS = 1.0
"""Within which the next sign of life counts as one of a process that was listening meanwhile."""

_REMEMBERED_JOBS = 1000
"""A job that is forgotten is watched from the beginning: its silent leases come back later."""


@dataclass(frozen=True, slots=True)
class _Sighting:
    news: LeaseNews
    since_seconds: float


class SilenceWatch:
    """Remembers when the news of each lease last changed. Threads may share it; `run` has to run beside.

    Args:
        silence_seconds: How long a holder may be silent.
    """

    def __init__(self, silence_seconds: float) -> None:
        self.silence_seconds = silence_seconds
        self._guard = threading.Lock()
        self._jobs: OrderedDict[int, dict[int, _Sighting]] = OrderedDict()
        self._listened_seconds = 0.0
        self._ticked_at = time.monotonic()

    async def run(self) -> None:
        """Count the time in which this loop runs; without end."""
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            with self._guard:
                self._listened_seconds = self._now()
                self._ticked_at = time.monotonic()

    def find_silent(self, job_id: int, held: Mapping[int, LeaseNews]) -> set[int]:
        """See `job_records.FindSilent`."""
        with self._guard:
            now = self._now()
            known = self._jobs.pop(job_id, {})
            seen = {lease_id: _sight(known.get(lease_id), news, now) for lease_id, news in held.items()}
            self._jobs[job_id] = seen
            if len(self._jobs) > _REMEMBERED_JOBS:
                self._jobs.popitem(last=False)
        return {
            lease_id
            for lease_id, sighting in seen.items()
            if now - sighting.since_seconds >= self.silence_seconds
        }

    def _now(self) -> float:
        """Seconds of listening so far."""
        return self._listened_seconds + min(time.monotonic() - self._ticked_at, _LATE_SECONDS)


def _sight(known: _Sighting | None, news: LeaseNews, now: float) -> _Sighting:
    return known if known is not None and known.news == news else _Sighting(news, now)
