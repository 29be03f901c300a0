"""OpenTelemetry spans of calls and of what they make catalog and store do.

On when the standard variables ask for it: OTEL_TRACES_EXPORTER=otlp, or an OTEL_EXPORTER_OTLP_ENDPOINT or
OTEL_EXPORTER_OTLP_TRACES_ENDPOINT. All other OTEL_* variables of the SDK hold too: service name, resource
attributes, headers, sampler, batch sizes. This module is the one place of the server that reads them.
Spans name streams, producers and callers; they hold no prompt, no completion and no token.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc

from lynearm.traces.access import is_open
from lynearm.traces.current_call import Call
from lynearm.traces.observation import Observer, Operation
from lynearm.wire.errors import MissingDependencyError

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

_CARRIED = frozenset({"traceparent", "tracestate"})

_LAST_SPANS_SECONDS = 3.0
"""How long a server that stops waits for a collector to take its last spans."""

_SERVER_ERRORS = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)
"""Statuses that make a server's span an error, by OpenTelemetry's conventions for gRPC."""


def is_tracing_wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment asks for traces."""
    exporter = environment.get("OTEL_TRACES_EXPORTER", "")
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or exporter == "none":
        return False
    return exporter == "otlp" or any(environment.get(name) for name in _ENDPOINTS)


@asynccontextmanager
async def open_tracing() -> AsyncGenerator[Observer]:
    """An observer that sends spans to a collector until the context ends.

    Raises:
        MissingDependencyError: if OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise MissingDependencyError(
            "the OTEL_* variables ask for traces, but OpenTelemetry is not installed",
            "pip install 'lynearm[tracing]', or set OTEL_TRACES_EXPORTER=none",
        ) from error
    resource = Resource.create()  # with what OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say
    if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "lynearm"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter: Any = OTLPSpanExporter()  # half typed
    provider.add_span_processor(BatchSpanProcessor(exporter))
    try:
        yield CallTracing(provider.get_tracer("lynearm.traces"))
    finally:
        # The flush ignores a time limit of its own; the exporter, once shut down, gives up, and so it ends.
        flushing = asyncio.create_task(asyncio.to_thread(provider.force_flush))
        await asyncio.wait((flushing,), timeout=_LAST_SPANS_SECONDS)
        await asyncio.to_thread(exporter.shutdown)
        await flushing
        await asyncio.to_thread(provider.shutdown)


class CallTracing(Observer):
    """A span for each call, which goes on the caller's trace where one came with it.

    Args:
        tracer: Makes the spans.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._spans: dict[Call, Span] = {}

    def begin_call(self, call: Call) -> None:
        """See `Observer`. The span is the current one of the call's task, which ends with the call."""
        from opentelemetry import context, propagate, trace

        if is_open(call.method):
            return  # health checks come every few seconds, and say nothing
        carrier = {key: value for key, value in call.metadata if key in _CARRIED and isinstance(value, str)}
        service, _, method = call.method.lstrip("/").partition("/")
        span = self._tracer.start_span(
            f"{service}/{method}",
            propagate.extract(carrier),
            trace.SpanKind.SERVER,
            {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method},
        )
        self._spans[call] = span
        call.trace_id = trace.format_trace_id(span.get_span_context().trace_id)
        context.attach(trace.set_span_in_context(span))

    def end_call(self, call: Call) -> None:
        """See `Observer`."""
        from opentelemetry.trace import Status, StatusCode

        span = self._spans.pop(call, None)
        if span is None:
            return
        attributes: dict[str, str | int] = {
            "rpc.grpc.status_code": _status_number(call.status),
            "lynearm.received_bytes": call.received_bytes,
            "lynearm.sent_bytes": call.sent_bytes,
            "lynearm.stream": call.stream,
            "lynearm.producer": "" if call.target is None else call.target.producer_id,
            "lynearm.caller": "" if call.caller is None else call.caller.name,
            "error.type": call.reason,
        }
        span.set_attributes({name: value for name, value in attributes.items() if value != ""})
        if call.status in _SERVER_ERRORS:
            span.set_status(Status(StatusCode.ERROR, call.reason))
        span.end()

    def end_operation(self, operation: Operation) -> None:
        """See `Observer`. Part of the call's trace; for a group, which serves many calls, one of its own."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        now_nano = time.time_ns()
        span = self._tracer.start_span(
            f"{operation.part} {operation.name}",
            kind=SpanKind.CLIENT,
            attributes={"lynearm.blocks": operation.block_count, "lynearm.bytes": operation.size_bytes},
            start_time=now_nano - int(operation.seconds * 1e9),
        )
        if operation.error is not None:
            span.set_status(Status(StatusCode.ERROR, type(operation.error).__name__))
        span.end(now_nano)


def _status_number(name: str) -> int:
    code: Any = grpc.StatusCode[name]  # typed by the value that Python gives it
    return int(code.value[0])
