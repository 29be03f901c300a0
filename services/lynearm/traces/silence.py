"""Tells whose leases may be given to others: those whose holders were not heard of for too long.

Invariants: a lease is silent only when its row has stood unchanged for that long by the monotonic clock of
this process, counted from when this process first saw it so. No time is ever compared with that of another
machine or of an earlier process, so that a clock that jumps takes no lease away. Being wrong costs work and
no more: who was superseded is refused at publish by the lease's generation.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from lynearm.traces.job_records import LeaseNews

_REMEMBERED_JOBS = 1000
"""A job that is forgotten is watched from the beginning: its silent leases come back later."""


@dataclass(frozen=True, slots=True)
class _Sighting:
    news: LeaseNews
    since_seconds: float


class SilenceWatch:
    """Remembers when the news of each lease last changed. Threads may share it.

    Args:
        silence_seconds: How long a holder may be silent.
    """

    def __init__(self, silence_seconds: float) -> None:
        self.silence_seconds = silence_seconds
        self._guard = threading.Lock()
        self._jobs: OrderedDict[int, dict[int, _Sighting]] = OrderedDict()

    def find_silent(self, job_id: int, held: Mapping[int, LeaseNews]) -> set[int]:
        """See `job_records.FindSilent`."""
        now = time.monotonic()
        with self._guard:
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


def _sight(known: _Sighting | None, news: LeaseNews, now: float) -> _Sighting:
    return known if known is not None and known.news == news else _Sighting(news, now)
