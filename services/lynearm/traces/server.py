"""The trace server: one process, one data directory, one port."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

import grpc
import grpc.aio
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from lynearm.traces import failpoints
from lynearm.traces.backend import Backend, open_backend
from lynearm.traces.calls import CallGate
from lynearm.traces.commit import stopping
from lynearm.traces.config import MIB, ServeConfig
from lynearm.traces.security import open_security
from lynearm.traces.servicer import SERVICE_NAME, TraceServicer, service_handler
from lynearm.traces.watching import open_watching
from lynearm.wire.addresses import join_address
from lynearm.wire.allocation import keep_freed_memory
from lynearm.wire.errors import PreconditionError

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 4 * MIB
"""gRPC's default, so that any client reads what is sent; a block of 3 MiB with its prompt ids fits."""

MAX_CALLS_PER_CONNECTION = 1024
"""Further ones wait in the client: the last bound on calls that never say what they want."""

MAX_METADATA_BYTES = 8192
"""Of a call's headers, gRPC's default; a token and a trace context take a few hundred."""

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_LAST_WORDS_SECONDS = 0.5
"""For statuses on their way, and for watchers of the health service, who never leave by themselves."""

_OPTIONS: tuple[tuple[str, int], ...] = (
    # A second server on the port must fail, not share it.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Both, since between them gRPC refuses by chance.
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.max_concurrent_streams", MAX_CALLS_PER_CONNECTION),
    # Two minutes would be gRPC's patience with a peer that says nothing.
    ("grpc.server_handshake_timeout_ms", 20_000),
    # A frozen peer is noticed after 15 s; without both timeouts gRPC waits a minute.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Below the period of any client's keepalive, or the server would hang up on it.
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
)


class TraceServer:
    """Serves while its context is open: `async with TraceServer(config) as server: …`.

    Leaving drains: health says NOT_SERVING, new calls are refused and subscriptions end, both as unavailable,
    what publishers have sent is committed and acknowledged, and whatever then still runs after
    `drain_seconds` is cut off.

    Args:
        config: Where to keep data and where to listen.

    Raises:
        PreconditionError: on entering, when a port or the data directory is in use, the catalog's blocks are
            in another store, or the blocks are those of another catalog.
        ConfigError: on entering, when the TLS files or the tokens file cannot be used.
        StorageError: on entering, when catalog or blocks cannot be used.
        ServiceUnavailableError: on entering, when they cannot be reached.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._port = 0
        self._metrics_port = 0
        self._stack = AsyncExitStack()

    @property
    def port(self) -> int:
        """TCP port; the one that was found where the configuration says 0."""
        return self._port

    @property
    def metrics_port(self) -> int:
        """TCP port of the metrics; 0 where there are none."""
        return self._metrics_port

    @property
    def address(self) -> str:
        """What clients connect to, host:port."""
        return join_address(self._config.host, self._port)

    async def __aenter__(self) -> Self:
        """Open the data directory and listen."""
        async with AsyncExitStack() as stack:
            failpoints.arm_from_environment()
            keep_freed_memory()
            _check_port(self._config.host, self._config.port)
            watching = await stack.enter_async_context(open_watching(self._config))
            security = await stack.enter_async_context(open_security(self._config, watching.observation))
            backend = await stack.enter_async_context(open_backend(self._config, watching.observation))
            watching.watch_backend(backend)
            gate = CallGate(self._config.max_calls)
            options = (*_OPTIONS, ("grpc.max_allowed_incoming_connections", self._config.max_connections))
            server = grpc.aio.server(interceptors=(security.interceptor,), options=options)
            servicer = TraceServicer(backend, max_streams=self._config.max_streams)
            server.add_generic_rpc_handlers((service_handler(servicer, gate),))
            health_servicer = health.aio.HealthServicer()
            health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
            if self._config.reflection:
                names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
                reflection.enable_server_reflection(names, server)
            self._metrics_port = watching.metrics_port
            self._port = _bind(server, self._config, security.credentials)
            await server.start()
            stack.push_async_callback(self._drain, server, health_servicer, backend, gate)
            stack.callback(watching.drain)
            await health_servicer.set(SERVICE_NAME, health_pb2.HealthCheckResponse.SERVING)
            self._stack = stack.pop_all()
        shown = f"{self._config.metrics_host}:{self._metrics_port}" if self._metrics_port else "off"
        logger.info("%s; metrics: %s", security.summary, shown)
        logger.info("serving %s at %s", self._config.places, self.address)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drain, commit and close."""
        await self._stack.__aexit__(kind, error, trace)
        logger.info("stopped serving %s", self._config.places)

    async def _drain(
        self,
        server: grpc.aio.Server,
        health_servicer: health.aio.HealthServicer,
        backend: Backend,
        gate: CallGate,
    ) -> None:
        await health_servicer.enter_graceful_shutdown()
        gate.close(stopping())
        backend.committer.hurry()
        backend.tails.drain(stopping())
        if not await gate.wait_idle(self._config.drain_seconds):
            logger.warning("some calls did not end within %g s and are cut off", self._config.drain_seconds)
        await server.stop(_LAST_WORDS_SECONDS)


def run_server(config: ServeConfig, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, then drain. Blocks; call it in the main thread.

    A second signal ends the process at once, which loses nothing that was acknowledged.

    Args:
        config: Where to keep data and where to listen.
        on_ready: Called with host:port once the server answers.

    Raises:
        LynearmError: as for `TraceServer`.
    """
    handlers = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
    try:
        # Its loop turns several times for each block, in C rather than in Python.
        uvloop.run(_serve(config, on_ready))
    finally:
        # Such a loop leaves its own behind when it is closed.
        for number, handler in handlers.items():
            # None: one that was not set in Python, and can be neither named nor put back there.
            if handler is not None:
                signal.signal(number, handler)


async def _serve(config: ServeConfig, on_ready: Callable[[str], None]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, stop.set)
    async with TraceServer(config) as server:
        on_ready(server.address)
        await stop.wait()
        for number in _STOP_SIGNALS:
            loop.remove_signal_handler(number)


def _check_port(host: str, port: int) -> None:
    """Bind once with plain sockets, whose errors say what is wrong; gRPC's only say that something is."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
    except OSError as error:
        raise _cannot_listen(host, port, error.strerror or str(error)) from error


def _bind(server: grpc.aio.Server, config: ServeConfig, credentials: grpc.ServerCredentials | None) -> int:
    address = join_address(config.host, config.port)
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise _cannot_listen(config.host, config.port, str(error)) from error


def _cannot_listen(host: str, port: int, reason: str) -> PreconditionError:
    return PreconditionError(
        f"cannot listen on {join_address(host, port)} ({reason})",
        "stop the server that uses the port, or choose another with --port",
    )
