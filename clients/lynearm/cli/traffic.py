"""Shows what a trace service takes in, by asking it as any client would."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

from lynearm.wire.errors import LynearmError

INTERVAL_SECONDS = 2.0
"""Between two looks. Each lists all streams: a few milliseconds of the catalog's time."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a service holds, and what it has taken in lately."""

    address: str
    streams: int
    traces: int
    tokens: int
    """Completion tokens."""
    size_bytes: int
    tokens_per_second: float = 0.0
    bytes_per_second: float = 0.0


@contextmanager
def watch_traffic(on_traffic: Callable[[Traffic], None]) -> Generator[Callable[[str], None]]:
    """A function that starts to watch the service at an address; leaving the context ends it."""
    stop = threading.Event()
    threads: list[threading.Thread] = []

    def start(address: str) -> None:
        thread = threading.Thread(target=_watch, args=(address, on_traffic, stop), daemon=True)
        threads.append(thread)
        thread.start()

    try:
        yield start
    finally:
        stop.set()
        for thread in threads:
            thread.join(INTERVAL_SECONDS)


def _watch(address: str, on_traffic: Callable[[Traffic], None], stop: threading.Event) -> None:
    from lynearm.client import TraceClient

    before: Traffic | None = None
    looked_at = 0.0
    with TraceClient(address, timeout_seconds=INTERVAL_SECONDS, patience_seconds=0.0) as client:
        while not stop.wait(INTERVAL_SECONDS):
            try:
                infos = client.list_streams()
            except LynearmError:
                continue  # busy, or about to stop; the next look tells
            now = time.monotonic()
            traffic = Traffic(
                address,
                streams=len(infos),
                traces=sum(info.trace_count for info in infos),
                tokens=sum(info.completion_token_count for info in infos),
                size_bytes=sum(info.size_bytes for info in infos),
            )
            on_traffic(with_rates(traffic, before, now - looked_at))
            before, looked_at = traffic, now


def with_rates(traffic: Traffic, before: Traffic | None, seconds: float) -> Traffic:
    """The traffic with rates since an earlier look; 0 without one, or where a stream was deleted since."""
    if before is None:
        return traffic
    return Traffic(
        traffic.address,
        traffic.streams,
        traffic.traces,
        traffic.tokens,
        traffic.size_bytes,
        tokens_per_second=max(0, traffic.tokens - before.tokens) / seconds,
        bytes_per_second=max(0, traffic.size_bytes - before.size_bytes) / seconds,
    )
