"""All that watches a server, as its configuration and its environment ask for it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lynearm.traces.call_log import CallLog
from lynearm.traces.config import ServeConfig
from lynearm.traces.observation import Observation, Observer
from lynearm.traces.tracing import is_tracing_wanted, open_tracing

if TYPE_CHECKING:
    from lynearm.traces.backend import Backend
    from lynearm.traces.metrics import ServerMetrics


@dataclass(frozen=True, slots=True)
class Watching:
    """Who watches a server."""

    observation: Observation
    metrics: ServerMetrics | None
    metrics_port: int
    """0 where there are no metrics."""

    def watch_backend(self, backend: Backend) -> None:
        """Show what the backend holds in memory."""
        if self.metrics is not None:
            self.metrics.watch_backend(backend)

    def drain(self) -> None:
        """Show that the server is on its way down."""
        if self.metrics is not None:
            self.metrics.drain()


@asynccontextmanager
async def open_watching(config: ServeConfig) -> AsyncGenerator[Watching]:
    """Make ready what watches a server, until the context ends.

    Raises:
        PreconditionError: the port of the metrics is in use.
        MissingDependencyError: what is asked for is not installed.
    """
    async with AsyncExitStack() as stack:
        observers: list[Observer] = []
        if is_tracing_wanted():
            observers.append(await stack.enter_async_context(open_tracing()))
        metrics, port = None, 0
        if config.metrics_port is not None:
            from lynearm.traces.metrics import ServerMetrics, show_metrics

            metrics = ServerMetrics()
            observers.append(metrics)
            port = await stack.enter_async_context(
                show_metrics(metrics.registry, config.metrics_host, config.metrics_port)
            )
        observers.append(CallLog())
        yield Watching(Observation(tuple(observers)), metrics, port)
