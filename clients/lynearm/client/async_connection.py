"""The channels of the async client, one for each address, opened when they are first used."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio

from lynearm.client import methods
from lynearm.client.calls import Call
from lynearm.client.credentials import Credentials
from lynearm.client.endpoints import Endpoints
from lynearm.client.forks import (
    forget_aio_channel,
    is_aio_idling,
    leave_to_parent,
    note_aio_channel,
    opening,
)
from lynearm.client.retries import client_closed
from lynearm.v1 import teacher_service_pb2 as teacher_pb
from lynearm.v1 import trace_service_pb2 as pb
from lynearm.wire.allocation import keep_freed_memory

_REST_SECONDS = 0.05
"""Bound on the wait for grpc.aio's thread after the last channel was closed: calls that were cancelled need a
few milliseconds to let go of it, and where something else uses grpc.aio it does not end."""

_LOOK_SECONDS = 0.001

Result = TypeVar("Result")
_Response_co = TypeVar("_Response_co", covariant=True)


class AsyncResponses(Protocol[_Response_co]):
    """A call whose responses are read; what grpc.aio returns, of which its stubs name no type.

    A read that is cancelled ends the call. A call that is cancelled ends its read with `CancelledError`,
    though nobody has cancelled the task that reads.
    """

    async def read(self) -> _Response_co:
        """The next response, or `grpc.aio.EOF`; raises grpc.aio.AioRpcError when the call failed."""
        ...

    def cancel(self) -> bool:
        """End the call."""
        ...


class AsyncConnection:
    """Channels to every address of a service, in one event loop; another loop or process opens its own.

    A process that was forked while such a channel was open cannot use gRPC; see `lynearm.client.forks`.

    Args:
        endpoints: The addresses.
        credentials: Of the client.
    """

    def __init__(self, endpoints: Endpoints, credentials: Credentials) -> None:
        self.endpoints = endpoints
        self._credentials = credentials
        self.generation = 0
        """Grows when the connection is closed: what was made before belongs to the past."""
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._owner: tuple[int, asyncio.AbstractEventLoop | None] = (0, None)
        keep_freed_memory()

    def publish(self, target: str, requests: AsyncIterator[bytes]) -> AsyncResponses[pb.PublishResponse]:
        """Begin to publish; requests are framed by hand."""
        call: AsyncResponses[pb.PublishResponse] = methods.publish_method(self._channel(target))(
            requests, metadata=self._credentials.call_metadata()
        )
        return call

    def subscribe(self, target: str, requests: AsyncIterator[pb.SubscribeRequest]) -> AsyncResponses[bytes]:
        """Begin to subscribe; responses are bytes."""
        call: AsyncResponses[bytes] = methods.subscribe_method(self._channel(target))(
            requests, metadata=self._credentials.call_metadata()
        )
        return call

    def fetch(
        self, target: str, request: pb.FetchBlocksRequest, timeout_seconds: float
    ) -> AsyncResponses[bytes]:
        """Begin to fetch; responses are bytes."""
        method = methods.fetch_method(self._channel(target))
        call: AsyncResponses[bytes] = method(
            request, timeout=timeout_seconds, metadata=self._credentials.call_metadata()
        )
        return call

    def score(
        self, target: str, requests: AsyncIterator[teacher_pb.ScoreRequest], timeout_seconds: float | None
    ) -> AsyncResponses[teacher_pb.ScoreResponse]:
        """Begin to have a teacher score completions."""
        call: AsyncResponses[teacher_pb.ScoreResponse] = methods.score_method(self._channel(target))(
            requests, timeout=timeout_seconds, metadata=self._credentials.call_metadata()
        )
        return call

    def generate(
        self, target: str, request: teacher_pb.GenerateRequest, timeout_seconds: float | None
    ) -> AsyncResponses[teacher_pb.GenerateResponse]:
        """Begin to have a teacher answer a prompt."""
        call: AsyncResponses[teacher_pb.GenerateResponse] = methods.generate_method(self._channel(target))(
            request, timeout=timeout_seconds, metadata=self._credentials.call_metadata()
        )
        return call

    async def ask(self, target: str, call: Call[Result], timeout_seconds: float) -> Result:
        """Call, and wait for the answer.

        Raises:
            grpc.RpcError: if the call failed.
            ServiceUnavailableError: if the client was closed meanwhile.
        """
        generation = self.generation
        calling = methods.call_method(self._channel(target), call)(
            call.request, timeout=timeout_seconds, metadata=self._credentials.call_metadata()
        )
        try:
            answer = [one async for one in calling] if call.streamed else await calling
        except asyncio.CancelledError as error:
            if is_being_cancelled() or generation == self.generation:
                raise
            raise client_closed(call.method) from error
        return call.read(answer)

    async def is_serving(self, target: str, timeout_seconds: float) -> bool:
        """Whether the service at an address answers its health check with SERVING."""
        method = methods.health_method(self._channel(target))
        try:
            answer = await method(
                methods.HEALTH_REQUEST, timeout=timeout_seconds, metadata=self._credentials.call_metadata()
            )
        except grpc.RpcError:
            return False
        return methods.is_serving(answer)

    async def close(self) -> None:
        """Close the channels; calls on them end. The next call opens others.

        The process may fork at once then, without another turn of the loop.
        """
        self._leave_others()
        self.generation += 1
        channels, self._channels = self._channels, {}
        while channels:
            await _close_channel(channels.popitem()[1])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REST_SECONDS):
                while is_aio_idling():
                    await asyncio.sleep(_LOOK_SECONDS)

    def _channel(self, target: str) -> grpc.aio.Channel:
        self._leave_others()
        channel = self._channels.get(target)
        if channel is None:
            with opening():
                channel = self._channels[target] = _open_channel(target, self._credentials)
                note_aio_channel(channel)
        return channel

    def _leave_others(self) -> None:
        owner = (os.getpid(), asyncio.get_running_loop())
        if self._owner != owner:
            if self._owner[0] != owner[0]:
                leave_to_parent(self._channels)
            self._channels, self._owner = {}, owner


def _open_channel(target: str, credentials: Credentials) -> grpc.aio.Channel:
    options = (*methods.CHANNEL_OPTIONS, *credentials.channel_options())
    secure = credentials.channel_credentials()
    if secure is None:
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, secure, options=options)


async def _close_channel(channel: grpc.aio.Channel) -> None:
    await channel.close()
    forget_aio_channel(channel)


def is_being_cancelled() -> bool:
    """Whether somebody has cancelled this task, so that its `CancelledError` must go on."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def is_end(response: Any) -> bool:
    """Whether a read gave the end of the call in place of a response."""
    return response is grpc.aio.EOF
