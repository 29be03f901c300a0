"""The streams that a run reads: found when it begins, and opened as sources."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from lynearm.client import TraceClient
from lynearm.student.mixing import StreamPlan
from lynearm.student.reporting import Reporter
from lynearm.student.source import StreamSource
from lynearm.wire.errors import ServiceUnavailableError, StreamNotFoundError
from lynearm.wire.protobuf import StreamInfo
from lynearm.wire.specs import StreamSpec

_LOOK_FOR_STREAM_SECONDS = 0.5


def find_stream(
    client: TraceClient, name: str, deadline: float, *, stop: threading.Event, reporter: Reporter
) -> StreamInfo:
    """A stream, waited for until the deadline.

    Args:
        client: Of the service.
        name: Of the stream.
        deadline: By `time.monotonic`.
        stop: Ends the waiting.
        reporter: Hears that it is waited for.

    Raises:
        StreamNotFoundError, ServiceUnavailableError: if it is not there in time.
    """
    announced = False
    while True:
        try:
            return client.get_stream(name)
        except (StreamNotFoundError, ServiceUnavailableError):
            if stop.is_set() or time.monotonic() >= deadline:
                raise
        if not announced:
            reporter.stage("waiting", f"stream {name!r} to be created")
            announced = True
        stop.wait(_LOOK_FOR_STREAM_SECONDS)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run reads."""

    client: TraceClient
    plans: tuple[StreamPlan, ...]
    specs: tuple[StreamSpec, ...]
    """Of each plan's stream."""

    def sources(
        self,
        *,
        prefetch_blocks: int,
        skip_damaged: bool,
        should_stop: Callable[[], bool],
        reporter: Reporter,
    ) -> list[StreamSource]:
        """One for each stream, closed."""
        return [
            StreamSource(
                self.client,
                plan.name,
                prefetch_blocks=prefetch_blocks,
                should_stop=should_stop,
                reporter=reporter,
                skip_damaged=skip_damaged,
                named=len(self.plans) > 1,
            )
            for plan in self.plans
        ]
