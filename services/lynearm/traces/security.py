"""What a configuration says about TLS and tokens, made ready for a server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

import grpc

from lynearm.traces.callers import AnonymousCallers, Callers, TokenCallers, quota_of
from lynearm.traces.config import ServeConfig
from lynearm.traces.interception import CallInterceptor
from lynearm.traces.observation import Observation
from lynearm.traces.tls import ServerCertificate, TlsFiles
from lynearm.wire.addresses import is_loopback

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Security:
    """What stands between the network and the calls."""

    interceptor: CallInterceptor
    credentials: grpc.ServerCredentials | None
    """None: plain text."""
    summary: str
    """For the log."""


@asynccontextmanager
async def open_security(config: ServeConfig, observation: Observation) -> AsyncGenerator[Security]:
    """Read certificate and tokens; until the context ends, follow their files.

    Args:
        config: Names the files.
        observation: Who is told of calls, and of files that are read anew.

    Raises:
        ConfigError: if a file cannot be used.
    """
    async with AsyncExitStack() as stack:
        credentials = None
        if config.tls_cert is not None and config.tls_key is not None:
            files = TlsFiles(config.tls_cert, config.tls_key, config.tls_client_ca)
            certificate = ServerCertificate(files, partial(observation.reloaded, "certificate"))
            credentials = certificate.credentials()
        callers = await _open_callers(config, observation, stack)
        interceptor = CallInterceptor(
            callers, max_open_calls=config.max_calls_per_caller, observers=observation.observers
        )
        _warn_if_open(config)
        yield Security(interceptor, credentials, _summary(config))


async def _open_callers(config: ServeConfig, observation: Observation, stack: AsyncExitStack) -> Callers:
    quota = quota_of(config.max_calls_per_caller, config.requests_per_second, config.publish_bytes_per_second)
    if config.tokens is None:
        return AnonymousCallers(quota)
    callers = TokenCallers(config.tokens, quota, partial(observation.reloaded, "tokens"))
    following = asyncio.create_task(callers.follow(), name="follow-tokens")

    async def stop() -> None:
        following.cancel()
        with suppress(asyncio.CancelledError):
            await following

    stack.push_async_callback(stop)
    return callers


def _warn_if_open(config: ServeConfig) -> None:
    if is_loopback(config.host):
        return
    if config.tokens is None:
        logger.warning("without tokens, anybody who reaches %s may read, add and delete all", config.host)
    if config.tls_cert is None:
        logger.warning("without TLS, traces and tokens cross the network to %s in plain text", config.host)


def _summary(config: ServeConfig) -> str:
    tls = "plain text" if config.tls_cert is None else "mTLS" if config.tls_client_ca else "TLS"
    return f"{tls}, {'no tokens' if config.tokens is None else 'tokens'}"
