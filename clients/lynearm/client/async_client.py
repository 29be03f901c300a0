"""What the async clients of all services have in common: the twin of `sync_client`."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self, TypeVar

import grpc

from lynearm.client.async_connection import AsyncConnection
from lynearm.client.calls import Call
from lynearm.client.client_settings import DEFAULT_TIMEOUT_SECONDS, ClientSettings
from lynearm.client.credentials import Credentials
from lynearm.client.endpoints import DEFAULT_TARGET
from lynearm.client.retries import not_ready

Result = TypeVar("Result")


class AsyncClient(ClientSettings):
    """A client with a connection. The tasks of one event loop share it; a channel opens at the first call.

    Args:
        target: host:port of the service, several as a sequence, or with commas.
        timeout_seconds: Deadline of each single call, tries and waits included.
        patience_seconds: How long calls that go on wait for a service that went away.
        credentials: TLS and token; None: what the environment says (`lynearm.client.credentials`).

    Raises:
        InvalidInputError: if an address is not host:port.
        ConfigError: if a token would go out in plain text.
    """

    def __init__(
        self,
        target: str | Sequence[str] = DEFAULT_TARGET,
        *,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        patience_seconds: float = math.inf,
        credentials: Credentials | None = None,
    ) -> None:
        super().__init__(
            target,
            timeout_seconds=timeout_seconds,
            patience_seconds=patience_seconds,
            credentials=credentials,
        )
        self._connection = AsyncConnection(self._endpoints, self._credentials)

    async def __aenter__(self) -> Self:
        """The client itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the channels."""
        await self.close()

    async def close(self) -> None:
        """As `SyncClient.close`."""
        await self._connection.close()

    async def is_serving(self, *, timeout_seconds: float = 5.0) -> bool:
        """As `SyncClient.is_serving`."""
        for _ in self._endpoints.targets:
            target = self._endpoints.current
            if await self._connection.is_serving(target, timeout_seconds):
                return True
            self._endpoints.leave(target)
        return False

    async def wait_until_ready(
        self, timeout_seconds: float = math.inf, on_wait: Callable[[], None] | None = None
    ) -> None:
        """As `SyncClient.wait_until_ready`."""
        retries = self._ready_retries(timeout_seconds)
        while not await self.is_serving(timeout_seconds=min(5.0, self._timeout_seconds)):
            pause_seconds = retries.lost(not_ready(self._endpoints, timeout_seconds))
            if on_wait is not None:
                on_wait()
                on_wait = None
            await asyncio.sleep(min(pause_seconds, 1.0))

    async def send(self, call: Call[Result], /) -> Result:
        """Send a call; what its answer means.

        Raises:
            LynearmError: what the service said.
        """
        return await self._ask(call, None)

    async def _ask(self, call: Call[Result], timeout_seconds: float | None) -> Result:
        retries = self._short_retries(idempotent=call.idempotent)
        deadline = time.monotonic() + self._deadline_seconds(timeout_seconds)
        while True:
            target = self._endpoints.current
            try:
                return await self._connection.ask(target, call, deadline - time.monotonic())
            except grpc.RpcError as failure:
                pause_seconds = retries.failed(failure, target)
            await asyncio.sleep(min(pause_seconds, max(deadline - time.monotonic(), 0.0)))
