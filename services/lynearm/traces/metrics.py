"""Prometheus metrics of one server, and the HTTP port that shows them.

How many series there are is bounded by the program, not by its users: labels are methods, status codes,
reasons and operations; of streams, only the hundred whose subscribers are farthest behind are named.
docs/monitoring.md lists them.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from lynearm.traces.backend import Backend
from lynearm.traces.catalog import CommitOutcome, NewBlock
from lynearm.traces.current_call import Call
from lynearm.traces.observation import Observer, Operation
from lynearm.wire.errors import LynearmError, PreconditionError, StorageError, StorageFullError
from lynearm.wire.status import reason_of

MAX_NAMED_STREAMS = 100

OTHER_STREAMS = "_others"
"""Label of all further streams together; no stream can have the name."""

_NAMESPACE = "lynearm"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_BLOCKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_BYTES = tuple(4**power * 1024 for power in range(9))  # 1 KiB to 64 MiB


class ServerMetrics(Observer):
    """Counts everything that one server does. Each has a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._running: set[Call] = set()
        registry = self.registry
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        registry.register(_Subscribers(self._running))
        counter = partial(Counter, namespace=_NAMESPACE, registry=registry)
        gauge = partial(Gauge, namespace=_NAMESPACE, registry=registry)
        histogram = partial(Histogram, namespace=_NAMESPACE, registry=registry)
        self._calls = counter("calls", "Calls that ended.", ["method", "status"])
        self._calls_running = gauge("calls_running", "Calls that run.", ["method"])
        self._call_seconds = histogram(
            "call_seconds", "Time of calls of one request and one response.", ["method"], buckets=_SECONDS
        )
        self._errors = counter("errors", "Calls that ended with an error of ours.", ["reason"])
        self._received = counter("received_bytes", "Bytes of requests.", ["method"])
        self._sent = counter("sent_bytes", "Bytes of responses.", ["method"])
        self._blocks = counter("committed_blocks", "New blocks.")
        self._block_bytes = counter("committed_bytes", "Bytes of new blocks.")
        self._traces = counter("committed_traces", "Traces in new blocks.")
        self._tokens = counter("committed_completion_tokens", "Completion tokens in new blocks.")
        self._repeated = counter("repeated_blocks", "Blocks that came again and were known.")
        self._refused = counter("refused_blocks", "Blocks that were refused at their commit.", ["reason"])
        self._ack_seconds = histogram(
            "ack_seconds", "Time from a block's arrival until it is durable or refused.", buckets=_SECONDS
        )
        self._group_blocks = histogram("group_blocks", "Blocks committed together.", buckets=_BLOCKS)
        self._group_bytes = histogram("group_bytes", "Bytes committed together.", buckets=_BYTES)
        self._storage_seconds = histogram(
            "storage_seconds",
            "Time of operations on catalog and store.",
            ["part", "operation"],
            buckets=_SECONDS,
        )
        self._storage_errors = counter(
            "storage_errors", "Failures of catalog and store.", ["part", "operation", "reason"]
        )
        self._read_bytes = counter("store_read_bytes", "Bytes read from the store.")
        self._reloads = counter("reloads", "Changed files that were read anew.", ["file", "outcome"])
        self._draining = gauge("draining", "1 while the server is on its way down.")

    def watch_backend(self, backend: Backend) -> None:
        """Show what the backend holds in memory."""
        gauge = partial(Gauge, namespace=_NAMESPACE, registry=self.registry)
        gauge("queued_bytes", "Blocks that wait for their commit.").set_function(
            lambda: backend.committer.queued_bytes
        )
        gauge("cache_bytes", "Recent blocks kept for readers.").set_function(lambda: backend.cache.size_bytes)

    def drain(self) -> None:
        """Show that the server is on its way down."""
        self._draining.set(1)

    def begin_call(self, call: Call) -> None:
        """See `Observer`."""
        self._running.add(call)
        self._calls_running.labels(call.method).inc()

    def received(self, call: Call, size_bytes: int) -> None:
        """See `Observer`."""
        self._received.labels(call.method).inc(size_bytes)

    def sent(self, call: Call, size_bytes: int) -> None:
        """See `Observer`."""
        self._sent.labels(call.method).inc(size_bytes)

    def end_call(self, call: Call) -> None:
        """See `Observer`."""
        self._running.discard(call)
        self._calls_running.labels(call.method).dec()
        self._calls.labels(call.method, call.status).inc()
        if call.reason:
            self._errors.labels(call.reason).inc()
        if not call.is_long:
            self._call_seconds.labels(call.method).observe(call.elapsed_seconds)

    def end_operation(self, operation: Operation) -> None:
        """See `Observer`."""
        self._storage_seconds.labels(operation.part, operation.name).observe(operation.seconds)
        if _is_failure(operation.error):
            reason = _reason(operation.error)
            self._storage_errors.labels(operation.part, operation.name, reason).inc()
        elif (operation.part, operation.name) == ("store", "write"):
            self._group_blocks.observe(operation.block_count)
            self._group_bytes.observe(operation.size_bytes)
        elif (operation.part, operation.name) == ("store", "read"):
            self._read_bytes.inc(operation.size_bytes)

    def committed(self, blocks: Sequence[NewBlock], outcomes: Sequence[CommitOutcome]) -> None:
        """See `Observer`."""
        for block, outcome in zip(blocks, outcomes, strict=True):
            if isinstance(outcome, LynearmError):
                self._refused.labels(reason_of(type(outcome))).inc()
            elif not outcome.is_new:
                self._repeated.inc()
            else:
                self._blocks.inc()
                self._block_bytes.inc(block.facts.size_bytes)
                self._traces.inc(block.facts.trace_count)
                self._tokens.inc(block.facts.completion_token_count)

    def answered(self, seconds: float) -> None:
        """See `Observer`."""
        self._ack_seconds.observe(seconds)

    def reloaded(self, what: str, ok: bool) -> None:
        """See `Observer`."""
        self._reloads.labels(what, "ok" if ok else "failed").inc()


class _Subscribers(Collector):
    """How far behind the subscribers of each stream are, found when somebody asks."""

    def __init__(self, running: set[Call]) -> None:
        self._running = running

    def collect(self) -> Iterable[GaugeMetricFamily]:
        counts: defaultdict[str, int] = defaultdict(int)
        lags: defaultdict[str, int] = defaultdict(int)
        # A copy made at once: this is the thread of the HTTP port.
        for call in list(self._running):
            if call.tail is not None and call.sent_offset is not None:
                counts[call.stream] += 1
                lag = call.tail.next_offset - call.sent_offset - 1
                lags[call.stream] = max(lags[call.stream], lag)
        named = set(sorted(lags, key=lambda stream: -lags[stream])[:MAX_NAMED_STREAMS])
        subscribers = _family("subscribers", "Subscribers that have got a block.")
        behind = _family("subscriber_lag_blocks", "Blocks that the slowest subscriber is behind.")
        for stream in sorted(named):
            subscribers.add_metric([stream], counts[stream])
            behind.add_metric([stream], lags[stream])
        others = set(lags) - named
        if others:
            subscribers.add_metric([OTHER_STREAMS], sum(counts[stream] for stream in others))
            behind.add_metric([OTHER_STREAMS], max(lags[stream] for stream in others))
        return subscribers, behind


@asynccontextmanager
async def show_metrics(registry: CollectorRegistry, host: str, port: int) -> AsyncGenerator[int]:
    """Answer scrapes over HTTP, from a thread of its own, until the context ends; yields the port.

    Raises:
        PreconditionError: if the port is in use.
    """
    try:
        server, thread = start_http_server(port, host.strip("[]"), registry)
    except OSError as error:
        raise PreconditionError(
            f"cannot show metrics on {host}:{port} ({error.strerror})",
            "stop what uses the port, or choose another with --metrics-port",
        ) from error
    try:
        yield int(server.server_port)
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        thread.join()


def _family(name: str, help_text: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{_NAMESPACE}_{name}", help_text, labels=["stream"])


def _is_failure(error: Exception | None) -> bool:
    # Other errors of ours are answers: there is no such stream, the producer was fenced off.
    return error is not None and (
        isinstance(error, StorageError | StorageFullError) or not isinstance(error, LynearmError)
    )


def _reason(error: Exception | None) -> str:
    return reason_of(type(error)) if isinstance(error, LynearmError) else "INTERNAL"
