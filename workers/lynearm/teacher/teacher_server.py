"""The teacher's server: one process, one engine, one port."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from lynearm.teacher.engine import TeacherEngine
from lynearm.teacher.engine_loop import EngineLoop
from lynearm.teacher.engine_start import prefer_first_runner
from lynearm.teacher.request_table import RequestTable
from lynearm.teacher.serving_config import ServeTeacherConfig
from lynearm.teacher.teacher_access import TokenInterceptor, server_credentials, warn_if_open
from lynearm.teacher.teacher_service import SERVICE_NAME, TeacherService
from lynearm.wire.addresses import host_of, join_address
from lynearm.wire.allocation import keep_freed_memory
from lynearm.wire.errors import LynearmError, PreconditionError
from lynearm.wire.scoring import TeacherInfo

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 4 << 20
"""gRPC's default, so that any client reads what is sent."""

_LAST_WORDS_SECONDS = 0.5
"""For statuses on their way, and for watchers of the health service, who never leave by themselves."""

_OPTIONS: tuple[tuple[str, int], ...] = (
    # A second server on the port must fail, not share it.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A frozen client is noticed after 15 s, and its requests are aborted.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Below the period of any client's keepalive, or the server would hang up on it.
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
)


class TeacherServer:
    """Serves while its context is open: `async with TeacherServer(config) as server: …`.

    Leaving drains: health says NOT_SERVING, new calls are refused, calls of Score are read no further and end
    as unavailable once what was read is answered; whatever still runs after `drain_seconds` is cut off.

    Args:
        config: Which model, and where to listen.
        make_engine: Makes the engine, on the thread that runs it; None: as the config says.

    Raises:
        PreconditionError: on entering, when the port is in use.
        ConfigError: on entering, when the model, the TLS files or the tokens cannot be used.
        MissingDependencyError: on entering, without vLLM.
    """

    def __init__(
        self, config: ServeTeacherConfig, make_engine: Callable[[], TeacherEngine] | None = None
    ) -> None:
        self._config = config
        self._make_engine = make_engine or (lambda: _make_engine(config))
        self._port = 0
        self._stack = AsyncExitStack()
        self._failed = asyncio.Event()

    @property
    def address(self) -> str:
        """What clients connect to, host:port."""
        return join_address(host_of(self._config.bind), self._port)

    @property
    def begun_requests(self) -> int:
        """Requests that were given to the engine so far."""
        return self._table.begun

    @property
    def failure(self) -> LynearmError | None:
        """Why the engine does not work any more; None while it does."""
        return self._engine.failure

    async def wait_failed(self) -> None:
        """Return when the engine has failed: nothing but a new process helps."""
        await self._failed.wait()

    async def __aenter__(self) -> Self:
        """Load the model, then listen."""
        loop = asyncio.get_running_loop()
        async with AsyncExitStack() as stack:
            keep_freed_memory()
            config = self._config
            interceptors = [TokenInterceptor(config.token_file)] if config.token_file is not None else []
            server = grpc.aio.server(interceptors=interceptors, options=_OPTIONS)
            # Before the model is loaded: a port in use is said at once.
            self._port = _bind(server, config)

            def note_failure(_error: LynearmError) -> None:
                loop.call_soon_threadsafe(self._failed.set)

            self._engine = EngineLoop(self._make_engine, note_failure)
            engine = await asyncio.to_thread(self._engine.start)
            stack.push_async_callback(asyncio.to_thread, self._engine.close)
            service, health_servicer = await self._add_services(server, engine)
            await server.start()
            stack.push_async_callback(self._drain, server, service, health_servicer)
            await health_servicer.set(SERVICE_NAME, health_pb2.HealthCheckResponse.SERVING)
            warn_if_open(config)
            self._stack = stack.pop_all()
        logger.info("teacher %s answers at %s", config.model, self.address)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drain and close."""
        await self._stack.__aexit__(kind, error, trace)
        logger.info("teacher %s has stopped", self._config.model)

    async def _add_services(
        self, server: grpc.aio.Server, engine: TeacherEngine
    ) -> tuple[TeacherService, health.aio.HealthServicer]:
        config = self._config
        teacher = await asyncio.to_thread(_describe, engine, config)
        self._table = RequestTable(
            self._engine, max_in_flight=config.requests_in_flight, recent_bytes=config.recent_mib << 20
        )
        service = self._service = TeacherService(
            self._table, teacher, engine.tokenizer, call_buffer_bytes=config.call_buffer_mib << 20
        )
        server.add_generic_rpc_handlers((service.handler(),))
        health_servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
        return service, health_servicer

    async def _drain(
        self, server: grpc.aio.Server, service: TeacherService, health_servicer: health.aio.HealthServicer
    ) -> None:
        await health_servicer.enter_graceful_shutdown()
        service.drain()
        if not await service.wait_idle(self._config.drain_seconds):
            logger.warning("some calls did not end within %g s and are cut off", self._config.drain_seconds)
        await server.stop(_LAST_WORDS_SECONDS)


def run_teacher_server(config: ServeTeacherConfig, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, then drain. Blocks; call it in the main thread.

    A second signal ends the process at once.

    Args:
        config: Which model, and where to listen.
        on_ready: Called with host:port once the teacher answers.

    Raises:
        LynearmError: as for `TeacherServer`; ServiceUnavailableError if the engine has failed.
    """
    asyncio.run(_serve(config, on_ready))


async def _serve(config: ServeTeacherConfig, on_ready: Callable[[str], None]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    async with TeacherServer(config) as server:
        on_ready(server.address)
        ends = [asyncio.create_task(stop.wait()), asyncio.create_task(server.wait_failed())]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
        for number in signals:
            loop.remove_signal_handler(number)
        if server.failure is not None:
            raise server.failure


def _make_engine(config: ServeTeacherConfig) -> TeacherEngine:
    prefer_first_runner()
    return TeacherEngine(config.engine_config())


def _describe(engine: TeacherEngine, config: ServeTeacherConfig) -> TeacherInfo:
    spec, tokenizer = engine.describe()
    return TeacherInfo(
        spec, tokenizer, config.license, min(config.top_k, engine.top_k), config.max_chosen_ids
    )


def _bind(server: grpc.aio.Server, config: ServeTeacherConfig) -> int:
    credentials = server_credentials(config)
    try:
        if credentials is None:
            return server.add_insecure_port(config.bind)
        return server.add_secure_port(config.bind, credentials)
    except RuntimeError as error:
        raise PreconditionError(
            f"cannot listen on {config.bind} ({error})",
            "stop the server that uses the port, or choose another with --bind",
        ) from error
